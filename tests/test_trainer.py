"""The loop: resumed anywhere it ends the same, a loss that is no number stops it, slices are the batch."""

import os
import pickle
import resource
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clmae import data, files, trainer
from clmae.config import Stopped, UserError, read_params
from clmae.mae import build_mae, fill, load
from clmae.objectives import Loss, make_objective, objectives
from clmae.trainer import fit, make_fabric, replay_step

everyone = pytest.mark.parametrize("name", sorted(objectives))
some = pytest.mark.parametrize("name", ["cl_mae", "rc_mae"])  # two nets, and a teacher


class Noise:
    """48 images of smooth noise in batches of 12; a function of the step, as the trainer asks."""

    batch_size, steps_per_epoch = 12, 4

    def __init__(self):
        coarse = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")

    def rows(self, step, start, stop):
        first = (step % self.steps_per_epoch) * self.batch_size
        return self.images[first + start : first + stop]


class Long(Noise):
    """The same, called one epoch."""

    steps_per_epoch = 20

    def rows(self, step, start, stop):
        return super().rows(step % 4, start, stop)


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
    assert fit(again, Noise(), steps=12, rate=3e-3, folder=tmp_path) == history
    assert torch.equal(weights(again), weights(peaceful))


@some
@pytest.mark.parametrize("at", [2, 7])
def test_stopped_by_a_signal_it_ends_the_same(name, at, tmp_path):
    def ask(objective):
        os.kill(os.getpid(), signal.SIGUSR1)

    peaceful, again = make(name), make(name, seed=5)
    history = fit(peaceful, Noise(), steps=12, rate=3e-3)
    with pytest.raises(Stopped, match=rf"^stopped by SIGUSR1 after step {at + 1} of 12, .*run the same"):
        fit(make(name), Noise(), steps=12, rate=3e-3, folder=tmp_path, at={at: ask})
    assert (tmp_path / f"step-{at + 1}.json").exists()  # within the step
    assert fit(again, Noise(), steps=12, rate=3e-3, folder=tmp_path) == history
    assert torch.equal(weights(again), weights(peaceful))


@some
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_checkpoint_is_passed_over(name, suffix, tmp_path, capsys):
    peaceful, again = make(name), make(name, seed=5)
    history = fit(peaceful, Noise(), steps=12, rate=3e-3)
    with pytest.raises(KeyboardInterrupt):
        fit(make(name), Noise(), steps=12, rate=3e-3, folder=tmp_path, at={7: stop}, minutes=1e-9)
    newest = tmp_path / f"step-7{suffix}"
    newest.write_bytes(newest.read_bytes()[:-20])
    assert fit(again, Noise(), steps=12, rate=3e-3, folder=tmp_path) == history
    assert torch.equal(weights(again), weights(peaceful))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("clmae: warning: damaged checkpoint put aside") and "from step 6" in line
    assert (tmp_path / f"step-7{suffix}.damaged").exists()


@some
def test_what_a_kill_left_goes_even_if_no_step_is_left(name, tmp_path, monkeypatch):
    def killed(self):  # after the last checkpoint is whole, before the oldest is gone
        if (tmp_path / "step-12.json").exists():
            raise KeyboardInterrupt
        tidy(self)

    tidy = trainer.Checkpoints.tidy
    monkeypatch.setattr(trainer.Checkpoints, "tidy", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(make(name), Noise(), steps=12, rate=3e-3, folder=tmp_path)
    assert len(list(tmp_path.glob("step-*.json"))) == 3
    monkeypatch.undo()
    fit(make(name), Noise(), steps=12, rate=3e-3, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step-*.json")) == ["step-12.json", "step-8.json"]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_among_the_checkpoints_does_not_run(tmp_path):
    work, boom = tmp_path / "work", tmp_path / "boom"
    history = fit(make("mae"), Noise(), steps=8, rate=3e-3, folder=work)
    for bomb in (pickle.dumps(Bomb(str(boom))), pickle.dumps(Bomb(str(boom)), protocol=0)):
        for path in work.glob("step-*"):
            path.write_bytes(bomb)
        newest = work / "step-8.safetensors"  # one whose hash is right
        files.write_json(work / "step-8.json", {"step": 8, "history": [], "sha256": files.sha256(newest)})
        with pytest.raises(UserError, match="not a valid safetensors file"):
            files.read_tensors(newest)
        assert fit(make("mae"), Noise(), steps=8, rate=3e-3, folder=work) == history
        assert not boom.exists()
    with pytest.raises(FileNotFoundError):
        boom.rmdir()
    pickle.loads(bomb)
    assert boom.exists()  # it would have gone off


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint(tmp_path):
    whole = fit(make("mae"), Noise(), steps=12, rate=3e-3)

    def shrink(objective):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"step-8\S*: cannot be written: file too large") as error:
            fit(make("mae"), Noise(), steps=12, rate=3e-3, folder=tmp_path, at={5: shrink})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(error.value)
    assert {p.stem for p in tmp_path.iterdir()} == {"step-0", "step-4"}
    assert fit(make("mae", seed=5), Noise(), steps=12, rate=3e-3, folder=tmp_path) == whole


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory"])
def test_a_full_memory_says_how_to_keep_the_batch(said, tmp_path):
    def full(*_):
        raise RuntimeError(said)

    objective = make("mae")
    objective.loss = full
    with pytest.raises(
        UserError, match=r"out of memory with 6 images in it .*train.accumulate: 4 puts 3 there"
    ):
        fit(objective, Noise(), steps=4, rate=1e-3, accumulate=2)


def sick_from(objective, *steps):
    """The objective with a gradient that is not finite, under a finite loss, at these steps."""
    sound = objective.loss

    def loss(phase, images, pos, draw):
        found = sound(phase, images, pos, draw)
        zero = found.total * 0
        return Loss(found.total + (zero.sqrt() if draw.seed[1] in steps else 0), found.parts)

    objective.loss = loss
    return objective


@some
@pytest.mark.parametrize("bad", [5, 7])
def test_a_gradient_that_is_no_number_is_found_and_replayed(name, bad, tmp_path):
    said = rf"weights and batch of step {bad}: python -m clmae replay .*incident$"
    with pytest.raises(UserError, match=said) as error:
        fit(sick_from(make(name), bad), Noise(), steps=12, rate=1e-3, folder=tmp_path)
    assert "\n" not in str(error.value)
    again = sick_from(make(name, seed=3), bad)
    finding = replay_step(tmp_path / "incident", again)
    assert finding.direction == "backward, SqrtBackward0" and "zero.sqrt()" in finding.where
    clean, kept = make(name), {}
    keep = {bad: lambda objective: kept.update({k: v.clone() for k, v in objective.state_dict().items()})}
    fit(clean, Noise(), steps=12, rate=1e-3, at=keep)
    there = files.read_tensors(tmp_path / "incident" / f"step-{bad}.safetensors")
    assert all((there[f"objective.{name}"] == value.numpy()).all() for name, value in kept.items())


@everyone
def test_skipped_steps_leave_no_trace(name):
    objective, still = sick_from(make(name), 5), {}

    def look(step):
        return lambda o: still.update({step: {k: v.clone() for k, v in o.state_dict().items()}})

    keep = {5: look(5), 6: look(6)}
    history = fit(objective, Noise(), steps=12, rate=1e-3, nonfinite="skip", at=keep)
    assert all(torch.equal(still[5][k], still[6][k]) for k in still[5])  # a teacher's weights, too
    assert [line["loss.mae.skipped"] for line in history] == [0, 0.25, 0]
    calm = fit(make(name), Noise(), steps=12, rate=1e-3, nonfinite="skip")
    plain = fit(make(name), Noise(), steps=12, rate=1e-3)
    assert [{k: v for k, v in line.items() if not k.endswith(".skipped")} for line in calm] == plain
    with pytest.raises(UserError, match="17 steps of this epoch were skipped by step 19, more than 10"):
        fit(sick_from(make(name), *range(3, 40)), Long(), steps=20, rate=1e-3, nonfinite="skip")


@everyone
def test_a_finished_run_is_not_trained_again(name, tmp_path):
    objective = make(name)
    history = fit(objective, Noise(), steps=8, rate=3e-3, folder=tmp_path)
    before = weights(objective)
    assert fit(objective, Noise(), steps=8, rate=3e-3, folder=tmp_path) == history
    assert torch.equal(weights(objective), before)
    kept = [f"step-{step}.{kind}" for step in (4, 8) for kind in ("json", "safetensors")]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_micro_batches_are_the_batch():
    ends = []
    for accumulate in (1, 3, 12):
        objective = make("mae")
        fit(objective, Noise(), steps=8, rate=3e-3, accumulate=accumulate, fabric=make_fabric("cpu", "64"))
        ends.append(weights(objective))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


class Waves(Noise):
    """Images that can be learned: waves of one length, each with a phase of its own."""

    def __init__(self):
        super().__init__()
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        phases = torch.rand(len(self.images), 1, 1, 1, generator=torch.Generator().manual_seed(1))
        self.images = torch.sin(0.8 * x + 0.4 * y + 6.3 * phases).expand_as(self.images).contiguous()


class HalfNoise(Waves):
    """The same on the left; on the right noise that nobody can foretell."""

    def __init__(self):
        super().__init__()
        self.images[..., 8:] = torch.randn(
            len(self.images), 3, 16, 8, generator=torch.Generator().manual_seed(2)
        )


@everyone
def test_training_learns_and_a_twin_learns_the_same(name):
    first, twin = (fit(make(name), Waves(), steps=60, rate=5e-3) for _ in range(2))
    assert first == twin
    assert first[-1]["loss.mae.reconstruction"] < 0.9 * first[0]["loss.mae.reconstruction"]


def test_a_masker_learns_what_is_hard():
    torch.manual_seed(0)
    mae = build_mae(16, 4, width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
    masker = {"depth": 1, "heads": 2, "head": "token"}
    objective = make_objective(mae, "cl_mae", estimator="rank", temperature=1.0, masker=masker)
    history = fit(objective, HalfNoise(), steps=120, rate=5e-3)
    assert history[-1]["loss.masker.total"] < 0.9 * history[0]["loss.masker.total"]


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


TOKEN = {"depth": 1, "heads": 2, "head": "token"}
RECOMMENDED = {
    "amplitude": 5.0,
    "temperature": 1.0,
    "share": 0.8,
    "masker": {**TOKEN, "reach": 1, "every": 3},
}
EXCESS = {"temperature": 0.5, "excess": True, "masker": {**TOKEN, "every": 2}}
RECIPES = {
    "as recommended": ("cl_mae", {"estimator": "rank", **RECOMMENDED}),
    "hard, taught": ("rc_mae", {"mask": {"name": "hard", "end": 0.9}}),
    "parts, excess": ("cl_rc_emae", {"estimator": "rank", **EXCESS}),
}


def cook(recipe, seed=0):
    name, settings = RECIPES[recipe]
    torch.manual_seed(seed)
    sizes = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return make_objective(build_mae(16, 4, width=32, depth=1, heads=2, **sizes), name, **settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_resume_where_they_were(recipe, tmp_path):
    peaceful, broken, again = cook(recipe), cook(recipe), cook(recipe, seed=5)
    history = fit(peaceful, Noise(), steps=12, rate=3e-3)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, Noise(), steps=12, rate=3e-3, folder=tmp_path, at={7: stop})
    assert fit(again, Noise(), steps=12, rate=3e-3, folder=tmp_path) == history
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), peaceful.state_dict().values()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_take_micro_batches(recipe):
    ends = []
    for accumulate in (1, 3, 12):
        objective = cook(recipe)
        fit(objective, Noise(), steps=8, rate=3e-3, accumulate=accumulate, fabric=make_fabric("cpu", "64"))
        ends.append(weights(objective))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-8)


METHODS = read_params(Path(__file__).resolve().parent.parent / "params.yaml").objectives
WAITS = {  # operations whose result the host must have before it can go on
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount",
    "histc", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
READS = "item tolist cpu numpy __array__ __bool__ __float__ __int__ __index__".split()


class Readings(TorchDispatchMode):
    """Within its block, notes (step, what) whenever a value of a tensor is brought to the host."""

    def __init__(self):
        super().__init__()
        self.step, self.found = None, []

    def note(self, what):
        self.found.append((self.step, what))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        if name in WAITS or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in chosen):
            self.note(name)
        return operation(*args, **(kwargs or {}))

    @contextmanager
    def and_methods(self, monkeypatch):
        """The block, with the methods of a tensor that copy without an operation noted, too."""

        def noted(name):
            real = getattr(torch.Tensor, name)
            return lambda tensor, *args, **how: self.note(name) or real(tensor, *args, **how)

        with self, monkeypatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, noted(name))
            yield


@pytest.fixture
def short_stories():
    """240 prepared images of 32 px: an epoch of 60 batches of 4, augmented as in every run."""
    pixels = torch.randint(256, (240, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    store = data.Store(pixels.byte().numpy(), [], [], [0.5] * 3, [0.25] * 3)
    return data.TrainBatches(store, batch_size=4, seed=0)


@pytest.mark.parametrize("name", ["mae", "cl_mae", "rc_mae", "emae"])
def test_nothing_is_read_between_log_points(name, short_stories, monkeypatch):
    """Values come to the host where they are checked or told, in no other step.

    On a CPU, copies in the other direction, which an accelerator may wait for, are not seen.
    """
    clock = SimpleNamespace(monotonic=lambda: 0.0)  # by which no line of progress is due before the last
    monkeypatch.setattr(trainer, "time", clock)
    sizes = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    torch.manual_seed(0)
    mae, readings = build_mae(32, 4, width=32, depth=1, heads=2, **sizes), Readings()
    objective, rows = make_objective(mae, **METHODS[name]), short_stories.rows
    assert "masker" not in METHODS[name] or sum(objective.phases(s) == ("mae", "masker") for s in range(60))

    def next_step(step, *which):
        readings.step = step
        return rows(step, *which)

    monkeypatch.setattr(short_stories, "rows", next_step)
    with readings.and_methods(monkeypatch):
        history = fit(objective, short_stories, steps=60, rate=1e-3)
    assert [line["step"] for line in history] == [60]
    steps = {step for step, _ in readings.found} - {None}  # None: before the first
    assert steps == {0, 50, 59}, [found for found in readings.found if found[0] not in (0, 50, 59)]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(),
        lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: int(x[0]), lambda x: x[x > 0],
        lambda x: x.nonzero(), lambda x: torch.equal(x, x), lambda x: 1 if x.isfinite().all() else 0,
        lambda x: f"{x[0]:.3f}", lambda x: torch.allclose(x, x),
    ],
)  # fmt: skip
def test_every_way_to_read_a_tensor_is_noted(read, monkeypatch):
    x, readings = torch.arange(3.0), Readings()
    with readings.and_methods(monkeypatch):
        (x * 2).exp().sum()
        assert not readings.found
        read(x)
    assert readings.found
