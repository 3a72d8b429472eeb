"""Health numbers against brute force; what each dying masker is called; resumed = uninterrupted."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clmae import health
from clmae.health import Health, HealthMonitor, Look, correlation, examine, random_masks, verdict
from clmae.losses import hidden_mean, patch_error
from clmae.mae import build_mae
from clmae.masking import Draw, keep_count, keep_highest, maskings, split
from clmae.patches import patchify

GRID, N = (4, 6), 24


class Patient(nn.Module):
    """An objective whose logits are a function of how much a patch holds (b, n) and the place in training."""

    def __init__(self, wish=None, ratio=0.75, parts=1):
        super().__init__()
        torch.manual_seed(0)
        small = {"width": 16, "depth": 1, "heads": 2}
        self.mae = build_mae(
            (16, 24), 4, **small, **{f"decoder_{key}": value for key, value in small.items()}
        )
        self.wish, self.mask_ratio, self.parts = wish, ratio, parts

    @property
    def encoder(self):
        return self.mae.encoder

    def target(self, images):
        return patchify(images, self.encoder.patch_size)

    def logits(self, tokens, pos):
        content = (tokens - self.encoder.positions).norm(dim=-1)
        return self.wish(content, pos)

    def scores(self, tokens, pos):
        return self.logits(tokens, pos).sigmoid() if self.wish else None

    def choose(self, tokens, pos, draw):
        values = self.logits(tokens, pos) if self.wish else draw.uniform(*tokens.shape[:2])
        if self.parts > 1:
            return split(values.argsort(dim=1, descending=True), self.parts)
        return keep_highest(values, keep_count(N, self.mask_ratio))


def pictures(b, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    loud = torch.rand(b, 1, 4, 6, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (2 * loud * torch.randn(b, 3, 16, 24, generator=g)).to(dtype)


def fixed_map(seed):
    return 3 * torch.randn(N, generator=torch.Generator().manual_seed(seed))


def far(content):
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0)) - torch.tensor([1.5, 2.5])
    return place.norm(dim=-1).expand_as(content)


def chance(content, size, seed):
    return size * torch.randn(content.shape, generator=torch.Generator().manual_seed(seed))


patients = {
    "alive": lambda c, pos: -c + chance(c, 0.3, round(1000 * pos)),
    "collapsed": lambda c, pos: fixed_map(1).expand_as(c) + 0.1 * pos,
    "centre-only": lambda c, pos: far(c) + chance(c, 0.2, round(1000 * pos)),
    "undecided": lambda c, pos: chance(c, 1e-3, round(1000 * pos)),
    "fixed": lambda c, pos: -c,
    "no masker": None,
}


def record(step, steps=40, epoch=None):
    return {"step": step, "pos": (step - 1) / (steps - 1), "epoch": epoch or step // 4, "lr": 1e-3}


@pytest.mark.parametrize("name", patients)
def test_every_illness_has_its_name(name):
    monitor, patient = HealthMonitor(pictures(60).split(25), seed=0), Patient(patients[name])
    told = [monitor(record(step), patient) for step in (4, 8, 12)]
    assert [t["health.verdict"].split(":")[0] for t in told[1:]] == [name, name]
    assert told[0]["health.verdict"].split(":")[0] == ("alive" if name == "fixed" else name)
    assert ("health.entropy" in told[0]) == (name != "no masker")
    assert "health.agreement" not in told[0] and "health.agreement" in told[1]
    assert all(isinstance(v, float) for key, v in told[1].items() if key != "health.verdict")


def test_a_border_masker_and_noise_on_one_map_are_found_too():
    images = [pictures(80)]
    border = HealthMonitor(images, 0)(record(4), Patient(lambda c, pos: -far(c) + chance(c, 0.1, 0)))
    assert border["health.verdict"].startswith("centre-only: hides the border")

    class Noisy(Patient):
        def choose(self, tokens, pos, draw):
            noisy = self.logits(tokens, pos) + 3 * draw.gumbel(len(tokens), N)
            return keep_highest(noisy, keep_count(N, self.mask_ratio))

    told = HealthMonitor(images, 0)(record(4), Noisy(lambda c, pos: fixed_map(1).expand_as(c) / 3))
    assert told["health.diversity"] > 0.7 and told["health.verdict"].startswith("collapsed")


def test_what_is_planned_is_no_illness():
    still = {"health.spread": 0.2, "health.agreement": 1.0}
    assert verdict(still).startswith("fixed: 100.0 %")
    assert verdict(still | {"pos": 0.95, "epoch": 57}) == "alive"  # the learning rate is 0
    slow = {"health.spread": 0.2, "health.agreement": 0.9997}
    assert verdict(slow | {"pos": 0.5, "epoch": 30}).startswith("fixed")
    assert verdict(slow | {"pos": 0.5, "epoch": 800}) == "alive"  # the same pace, in a longer training
    assert verdict({"health.spread": 0.001, "factor": -0.02}) == "alive"
    assert verdict({"health.spread": 0.001, "factor": -0.5}).startswith("undecided")
    equal = {"health.spread": 0.4, "health.always": 0.7, "health.never": 0.23}
    assert verdict(equal) == "collapsed: 93 % of positions equal for all images"


@given(data=st.data(), b=st.integers(2, 9), scale=st.sampled_from([1.0, 1e-3]))
def test_numbers_are_their_definitions(data, b, scale):
    k, seed = data.draw(st.integers(1, N - 1)), data.draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    rows = lambda: torch.rand(b, N, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, before = keep_highest(rows(), k).hidden, keep_highest(rows(), k).hidden
    score, error, measured = 0.5 + scale * (rows() - 0.5), rows(), (rows() < 0.8).double()
    pair = torch.tensor([3.0, 2.0], dtype=torch.float64)
    look = Look(hidden, score, rows(), error, measured, pair, 2 * pair, before)
    told = Health(GRID)
    for part in data.draw(st.sampled_from([[b], [1, b - 1]])):
        start = told.images
        cut = (v if v.shape == (2,) else v[start : start + part] for v in look)
        told.add(Look(*cut))
    told = {name.removeprefix("health."): value for name, value in told.numbers().items()}

    apart = [(x != y).double().mean().item() for x, y in itertools.combinations(hidden, 2)]
    ratio = hidden.mean().item()
    assert told["ratio"] == pytest.approx(ratio)
    assert told["diversity"] == pytest.approx(sum(apart) / len(apart) / (2 * ratio * (1 - ratio)))
    assert told["agreement"] == pytest.approx((hidden == before).double().mean().item())
    assert told["gap"] == 1 and told["learned"] == 1.5 and "always" not in told

    s = score.flatten()
    away = (s - s.mean()) / s.std(correction=0)
    assert told["spread"] == pytest.approx(s.std(correction=0).item(), rel=1e-6)
    shape = ((away**3).mean() ** 2 + 1) / (away**4).mean()
    assert told["bimodality"] == pytest.approx(shape.item(), rel=1e-5)
    entropy = -(s * s.log2() + (1 - s) * (1 - s).log2()).mean()
    assert told["entropy"] == pytest.approx(entropy.item())

    def each(x, chosen):
        found = [
            torch.corrcoef(torch.stack([h[c], v[c]]))[0, 1] for h, v, c in zip(hidden.double(), x, chosen)
        ]
        found = [value.item() for value in found if value.isfinite()]
        return sum(found) / len(found) if found else None

    for name, x, chosen in [
        ("variance", look.variance, torch.ones_like(measured)),
        ("error", error, measured),
    ]:
        expected = each(x, chosen.bool())
        assert told.get(name) == (expected if expected is None else pytest.approx(expected, abs=1e-9))


@given(b=st.integers(1, 4), ratio=st.sampled_from([0.5, 0.75, 0.875, 0.6, 0.9]), seed=st.integers(0, 999))
def test_random_masks_hide_the_ratio_and_measure_every_patch_where_it_divides(b, ratio, seed):
    hidden = random_masks(Draw(seed=(seed,)), b, N, GRID, ratio).hidden.unflatten(0, (-1, b))
    assert (hidden.sum(2) == N - keep_count(N, ratio)).all()
    if ratio in (0.5, 0.75, 0.875):
        assert (hidden.sum(0) == len(hidden) - 1).all()
    else:
        assert len(hidden) == health.RANDOM_MASKS


@pytest.mark.parametrize("parts", [1, 4])
def test_losses_are_the_losses(parts):
    patient, images = Patient(patients["fixed"], parts=parts), pictures(6)
    look = examine(patient, images, 0.5, Draw(seed=(3,)))
    with torch.no_grad():
        said = patient.mae(images, lambda t: patient.choose(t, 0.5, Draw(seed=(3,))))
        target = patchify(images, 4).repeat(parts, 1, 1)
        expected = hidden_mean(patch_error(said.patches, target), said.mask.hidden)
    torch.testing.assert_close((look.learned[0] / look.learned[1]).float(), expected)
    assert torch.equal(look.hidden, said.mask.hidden[:6])
    every = (3 * look.error.double()).sum() / look.random[1]  # each patch was hidden three times
    torch.testing.assert_close(every, look.random[0] / look.random[1])


def test_interrupted_and_resumed_it_says_the_same(tmp_path):
    def life(steps, monitor):
        return [monitor(record(step), Patient(patients["alive"])) for step in steps]

    def fresh(folder=tmp_path):
        return HealthMonitor(pictures(40).split(16), 5, folder)

    peaceful = life((4, 8, 12, 16), fresh(None))
    (tmp_path / "masks-3.safetensors").write_bytes(b"left by somebody else")
    first = life((4, 8, 12), fresh())
    again = life((12, 16), fresh())  # the checkpoint of step 12 was never written
    assert first + again[1:] == peaceful and again[0] == first[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "masks-12.safetensors",
        "masks-16.safetensors",
    ]


@pytest.mark.parametrize("back", [4, 10, 12, 20])
def test_fallen_back_to_any_checkpoint_there_is_it_says_the_same(tmp_path, back):
    def life(steps, monitor):
        return [monitor(record(step), Patient(patients["alive"])) for step in steps]

    def checkpoints(steps):
        for step in steps:
            (tmp_path / f"step-{step}.json").write_text("{}")

    fresh = lambda folder=tmp_path: HealthMonitor(pictures(40).split(16), 5, folder)  # noqa: E731
    ends = (4, 8, 12, 16, 20, 24)
    peaceful = life(ends, fresh(None))
    monitor = fresh()
    for end in ends[:5]:
        life([end], monitor)
        checkpoints([end] if end in (4, 12, 20) else [10] if end == 8 else [])
    left = [end for end in ends if end > back]
    for path in tmp_path.glob("step-*.json"):  # the newer ones were damaged
        if int(path.stem[5:]) > back:
            path.unlink()
    assert life(left, fresh()) == peaceful[-len(left) :]


def test_batches_and_the_random_side_throw_dice_of_their_own(monkeypatch):
    class Chance(Patient):
        def choose(self, tokens, pos, draw):
            return draw.mask(maskings["random"], len(tokens), N, 0.75, GRID)

    seen, plain = [], health.random_masks
    monkeypatch.setattr(health, "random_masks", lambda *a: seen.append(plain(*a)) or seen[-1])
    same = pictures(8)
    found = HealthMonitor([same, same], 0).look(Chance(), 0.5, Draw(seed=(1,)), None)
    first, second = found.hidden().split(8)
    assert not torch.equal(first, second) and not torch.equal(seen[0].keep, seen[1].keep)
    assert not any(torch.equal(first.float(), part) for part in seen[0].hidden.split(8))


def test_it_is_judged_as_it_is_evaluated():
    class Strict(Patient):
        def scores(self, tokens, pos):
            assert not self.training and not torch.is_grad_enabled()
            return super().scores(tokens, pos)

    HealthMonitor([pictures(2)], 0)(record(4), Strict(patients["alive"]).train())


def test_looking_changes_nothing_and_precision_follows_the_model():
    patient = Patient(patients["alive"]).double()
    patient.mae.eval()
    before = {name: value.clone() for name, value in patient.state_dict().items()}
    state = torch.get_rng_state()
    told = HealthMonitor([pictures(4)], 0)(record(4), patient.train())
    assert patient.training and patient.mae.training
    assert all(torch.equal(before[name], value) for name, value in patient.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in patient.parameters())
    assert "health.always" not in told and "health.image" not in told  # four images say nothing about places


def test_an_error_leaves_the_objective_in_training():
    patient = Patient(patients["alive"]).train()
    with pytest.raises(RuntimeError):
        HealthMonitor([torch.zeros(2, 5, 16, 24)], 0)(record(4), patient)
    assert patient.training


def test_one_grey_image_gives_finite_numbers_and_no_false_alarm():
    told = HealthMonitor([torch.zeros(1, 3, 16, 24)], 0)(record(4), Patient(patients["alive"]))
    assert told["health.ratio"] == 0.75 and "health.diversity" not in told and "health.variance" not in told
    assert told["health.verdict"] == "alive"


def test_each_epoch_throws_other_dice():
    monitor, patient = HealthMonitor([pictures(40)], 0), Patient()
    told = [monitor(record(step), patient) for step in (4, 8)]
    assert told[0]["health.random"] != told[1]["health.random"]
    assert told[1]["health.agreement"] == pytest.approx(0.75**2 + 0.25**2, abs=0.05)


def test_correlation_needs_two_values():
    constant, moving = torch.ones(2, 5), torch.arange(10.0).reshape(2, 5)
    assert correlation(constant, moving).isnan().all()
    for n in range(3, 60):  # where the mean of equal numbers is not that number, by rounding
        row = torch.full((1, n), 0.1, dtype=torch.float64)
        assert correlation(row, torch.arange(float(n))[None]).isnan().all()
    assert correlation(moving, moving).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("ratio", [0.5, 0.74, 0.75, 0.76, 0.9])
def test_random_masks_hide_as_many_as_the_objective(ratio):
    hidden = random_masks(Draw(seed=(0,)), 3, 64, (8, 8), ratio).hidden
    assert (hidden.sum(1) == 64 - keep_count(64, ratio)).all()


def test_a_masker_that_does_nothing_is_indifferent():
    told = {"health.spread": 0.4, "health.gap": 1.001, "health.error": 0.01, "factor": 5.0}
    assert verdict(told).startswith("indifferent: ") and "1.001" in verdict(told)
    assert verdict(told | {"factor": 0.1}) == "alive"  # where λ is near 0, random masks are the plan
    assert verdict(told | {"health.gap": 1.06}) == "alive" == verdict(told | {"health.error": 0.3})
