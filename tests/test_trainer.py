"""The loop: resumed anywhere it ends the same, a loss that is no number stops it, slices are the batch."""

import pytest
import torch

from clmae.config import UserError
from clmae.mae import build_mae, fill, load
from clmae.objectives import Loss, make_objective, objectives
from clmae.trainer import fit, make_fabric

everyone = pytest.mark.parametrize("name", sorted(objectives))


class Noise:
    """48 images of smooth noise in batches of 12; a function of the step, as the trainer asks."""

    batch_size, steps_per_epoch = 12, 4

    def __init__(self):
        coarse = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")

    def rows(self, step, start, stop):
        first = (step % self.steps_per_epoch) * self.batch_size
        return self.images[first + start : first + stop]


def make(name, seed=0, width=32):
    torch.manual_seed(seed)
    mae = build_mae(16, 4, width=width, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
    return make_objective(mae, name, **({"masker": {"depth": 1, "heads": 2}} if "cl_" in name else {}))


def weights(objective):
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


def stop(objective):
    raise KeyboardInterrupt


@everyone
@pytest.mark.parametrize("at", [1, 4, 6, 11])
def test_interrupted_anywhere_it_ends_the_same(name, at, tmp_path):
    peaceful, broken, again = make(name), make(name), make(name, seed=5)
    history = fit(peaceful, Noise(), steps=12, rate=3e-3)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, Noise(), steps=12, rate=3e-3, folder=tmp_path, at={at: stop})
    if at < 4:  # nothing saved yet: the run starts anew, from its own start
        again = make(name)
    assert fit(again, Noise(), steps=12, rate=3e-3, folder=tmp_path) == history
    assert torch.equal(weights(again), weights(peaceful))


@everyone
def test_a_finished_run_is_not_trained_again(name, tmp_path):
    objective = make(name)
    history = fit(objective, Noise(), steps=8, rate=3e-3, folder=tmp_path)
    before = weights(objective)
    assert fit(objective, Noise(), steps=8, rate=3e-3, folder=tmp_path) == history
    assert torch.equal(weights(objective), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "step-8.safetensors"]


def test_micro_batches_are_the_batch():
    ends = []
    for accumulate in (1, 3, 12):
        objective = make("mae")
        fit(objective, Noise(), steps=8, rate=3e-3, accumulate=accumulate, fabric=make_fabric("cpu", "64"))
        ends.append(weights(objective))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


@everyone
def test_bf16_trains_as_well(name):
    losses = {}
    for precision in ("32", "bf16"):
        objective = make(name)
        history = fit(objective, Noise(), steps=40, rate=5e-3, fabric=make_fabric("cpu", precision))
        losses[precision] = history[-1]["loss.mae.total"]
        assert weights(objective).dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["32"], rel=0.1)


def test_clipping_limits_the_gradient(monkeypatch):
    seen = []
    objective = make("mae")
    step = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.stack(grads).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    fit(objective, Noise(), steps=3, rate=1e-3, clip=0.01)
    assert len(seen) == 3 and max(seen) <= 0.0101


@everyone
def test_a_loss_that_is_no_number_stops_with_step_and_parts(name, tmp_path):
    objective = make(name)
    sound = objective.loss

    def sick(phase, images, pos, draw):
        loss = sound(phase, images, pos, draw)
        bad = draw.seed[1] == 6
        return Loss(loss.total * (torch.nan if bad else 1.0), loss.parts)

    objective.loss = sick
    with pytest.raises(
        UserError, match=r"not finite at step 6: mae.total = nan.*mae.reconstruction = \d"
    ) as error:
        fit(objective, Noise(), steps=12, rate=1e-3, folder=tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "step-4.safetensors").exists()  # the checkpoint from before the trouble


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    fit(make("mae"), Noise(), steps=4, rate=1e-3, folder=tmp_path)
    with pytest.raises(
        UserError, match=r"another shape of model: mae\.\S+ is \(.*32.*\) there and \(.*64.*\) here"
    ):
        fit(make("mae", width=64), Noise(), steps=8, rate=1e-3, folder=tmp_path)


def test_an_encoder_of_another_shape_is_named(tmp_path):
    small, large = make("mae").encoder, make("mae", width=64).encoder
    with pytest.raises(UserError, match="another shape of model"):
        fill(large, small.state_dict(), "encoder.safetensors")
    with pytest.raises(UserError, match="holds no encoder"):
        load(tmp_path)


def test_batches_smaller_than_their_name():
    class One(Noise):
        batch_size, steps_per_epoch = 1, 3

    for name in objectives:
        history = fit(make(name), One(), steps=3, rate=1e-3)
        assert all(value == value for value in history[0].values())
