"""Masks and patches over all shapes: counts are exact, nothing depends on how a batch is shared."""

import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clmae.config import ConfigError
from clmae.masking import (
    Draw,
    Hard,
    Hiding,
    cells,
    hidings,
    keep_count,
    keep_highest,
    keep_lowest,
    make_hiding,
    maskings,
    noise,
    part_count,
    split,
)
from clmae.patches import grid_size, patchify, sincos_2d, unpatchify

rules = pytest.mark.parametrize("name", sorted(maskings))
every_hiding = pytest.mark.parametrize("name", sorted(hidings))
grids = st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda g: g[0] * g[1] >= 2)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def possible(n, ratio):
    return 1 <= n - round(ratio * n) < n


@rules
@settings(max_examples=40, deadline=None)
@given(grid=grids, ratio=st.floats(0.05, 0.95), b=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_rules_hide_exactly_what_is_asked(name, grid, ratio, b, seed):
    n = grid[0] * grid[1]
    if not possible(n, ratio):
        with pytest.raises(ValueError, match="mask ratio"):
            maskings[name](b, n, ratio, generator=generator(seed), grid=grid)
        return
    mask = maskings[name](b, n, ratio, generator=generator(seed), grid=grid)
    again = maskings[name](b, n, ratio, generator=generator(seed), grid=grid)
    k = keep_count(n, ratio)
    assert mask.keep.dtype == torch.long and mask.keep.shape == (b, k)
    assert mask.hidden.dtype == torch.float32 and mask.keep.device == mask.hidden.device == torch.device(
        "cpu"
    )
    assert all(len(set(row)) == k for row in mask.keep.tolist())
    assert torch.equal(mask.hidden.sum(1), torch.full((b,), float(n - k)))
    assert mask.hidden.gather(1, mask.keep).sum() == 0
    assert torch.equal(mask.keep, again.keep)


@rules
@settings(max_examples=20, deadline=None)
@given(b=st.integers(2, 12), cut=st.integers(1, 11), seed=st.tuples(st.integers(0, 99), st.integers(0, 9999)))
def test_shares_of_a_batch_are_the_batch(name, b, cut, seed):
    cut = min(cut, b - 1)
    whole = Draw(seed=seed).mask(maskings[name], b, 16, 0.75, (4, 4))
    first = Draw(seed=seed, start=0, total=b).mask(maskings[name], cut, 16, 0.75, (4, 4))
    second = Draw(seed=seed, start=cut, total=b).mask(maskings[name], b - cut, 16, 0.75, (4, 4))
    assert torch.equal(whole.keep, torch.cat([first.keep, second.keep]))


@rules
def test_steps_and_images_get_different_masks(name):
    masks = [Draw(seed=(0, step)).mask(maskings[name], 8, 64, 0.75, (8, 8)).hidden for step in range(2)]
    assert not torch.equal(*masks)
    assert len({tuple(row) for row in masks[0].tolist()}) > 1


@rules
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rules_draw_on_the_generators_device(name):
    generators = [torch.Generator("cuda").manual_seed(0) for _ in range(2)]
    mask, again = (maskings[name](4, 64, 0.75, generator=g, grid=(8, 8)) for g in generators)
    assert mask.keep.is_cuda and mask.hidden.is_cuda
    assert (mask.hidden.sum(1) == 48).all() and torch.equal(mask.keep, again.keep)


RECORDED = {
    "random": [[12, 2, 3, 13], [11, 2, 12, 3]],
    "block": [[0, 4, 8, 12], [15, 14, 12, 13]],
    "grid": [[13, 7, 15, 5], [0, 10, 2, 8]],
}


@pytest.mark.parametrize("name", RECORDED)
def test_masks_of_recorded_runs_stay_what_they_were(name):
    mask = maskings[name](2, 16, 0.75, generator=generator(0), grid=(4, 4))
    assert mask.keep.tolist() == RECORDED[name]


@rules
def test_a_rule_survives_pickling(name):
    again = pickle.loads(pickle.dumps(maskings[name]))
    assert again is maskings[name] and "ratio" in inspect.signature(again).parameters


@pytest.mark.parametrize("name", sorted(set(maskings) - {"random"}))
def test_a_grid_of_other_size_is_refused(name):
    with pytest.raises(ValueError, match="3 by 5 has 15 patches, not 16"):
        maskings[name](2, 16, 0.5, generator=generator(0), grid=(3, 5))


@settings(max_examples=40, deadline=None)
@given(grid=grids, low=st.floats(0, 4), width=st.floats(0.05, 4), seed=st.integers(0, 999))
def test_noise_of_any_band_orders_every_patch(grid, low, width, seed):
    n = math.prod(grid)
    order = noise.order(2, n, generator=generator(seed), grid=grid, low=low, high=low + width)
    assert torch.equal(order.sort(1).values, torch.arange(n).expand(2, n))


@settings(max_examples=60, deadline=None)
@given(grid=grids, share=st.floats(0, 1), seed=st.integers(0, 999), data=st.data())
def test_cells_are_hidden_whole_but_one(grid, share, seed, data):
    n, side = math.prod(grid), 1 + share * (max(grid) - 1)
    order = cells.order(1, n, generator=generator(seed), grid=grid, side=side)
    assert torch.equal(order.sort(1).values, torch.arange(n)[None])
    shift = side * torch.rand(1, 1, 2, generator=generator(seed))[0, 0]
    corners = [
        ((r + shift[0]) // side, (c + shift[1]) // side) for r in range(grid[0]) for c in range(grid[1])
    ]
    met = [tuple(float(x) for x in corners[i]) for i in order[0].tolist()]
    changes = sum(one != two for one, two in zip(met, met[1:]))
    assert changes == len(set(met)) - 1  # the order finishes a cell before it begins the next


@settings(max_examples=60, deadline=None)
@given(b=st.integers(1, 5), parts=st.integers(1, 8), size=st.integers(1, 9), seed=st.integers(0, 999))
def test_parts_show_every_patch_once(b, parts, size, seed):
    n = parts * size
    order = torch.rand(b, n, generator=generator(seed)).argsort(1)
    mask = split(order, parts)
    assert mask.keep.shape == (parts * b, size) and mask.hidden.shape == (parts * b, n)
    assert torch.equal((1 - mask.hidden).reshape(parts, b, n).sum(0), torch.ones(b, n))
    assert mask.hidden.gather(1, mask.keep).sum() == 0
    for p in range(parts):
        for i in range(b):
            assert mask.keep[p * b + i].tolist() == order[i, p * size : (p + 1) * size].tolist()


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 200), ratio=st.floats(-0.5, 1.5))
def test_part_count_is_exact_or_an_error(n, ratio):
    try:
        parts = part_count(n, ratio)
    except ValueError as error:
        assert "\n" not in str(error) and ("parts" in str(error))
        return
    assert parts >= 2 and n % parts == 0 and abs(1 / (1 - ratio) - parts) <= 0.05 * parts


def test_an_order_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 patches don't divide into 4 parts"):
        split(torch.arange(10)[None], 4)


@settings(max_examples=30, deadline=None)
@given(b=st.integers(2, 9), cut=st.integers(1, 8), shape=st.lists(st.integers(1, 4), max_size=3))
def test_noise_of_a_share_is_the_share_of_the_noise(b, cut, shape):
    cut = min(cut, b - 1)
    for kind in ("uniform", "gumbel"):
        whole = getattr(Draw((3, 1)), kind)(b, *shape)
        shares = [
            getattr(Draw((3, 1), start=s, total=b), kind)(size, *shape)
            for s, size in ((0, cut), (cut, b - cut))
        ]
        assert whole.shape == (b, *shape) and torch.equal(whole, torch.cat(shares))


def test_gumbel_noise_is_finite_even_at_zero(monkeypatch):
    monkeypatch.setattr(Draw, "uniform", lambda self, b: torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert Draw((0,)).gumbel(3).isfinite().all()


def test_forks_are_independent_and_keep_their_rows():
    draw = Draw((0, 5), start=2, total=9)
    streams = [draw, draw.fork(0), draw.fork(1), draw.fork(0).fork(0)]
    assert all((fork.start, fork.total) == (2, 9) and type(fork) is Draw for fork in streams)
    noises = torch.stack([stream.uniform(4, 500).flatten() for stream in streams])
    assert (torch.corrcoef(noises) - torch.eye(4)).abs().max() < 0.1
    assert torch.equal(draw.fork(1).uniform(4, 500), draw.fork(1).uniform(4, 500))


@every_hiding
@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 7), st.integers(4, 8)),
    b=st.integers(2, 6),
    cut=st.integers(1, 5),
    pos=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_hidings_keep_their_promises(name, grid, b, cut, pos, seed):
    n, cut = math.prod(grid), min(cut, b - 1)
    hiding, tokens = make_hiding(grid, 0.75, name), torch.zeros(b, n, 1)
    hiding.learn(torch.rand(b, n, generator=generator(seed)), torch.ones(b, n))
    hiding.after_step(pos)
    whole = hiding.propose(tokens, pos, Draw((seed,)))
    shares = [
        hiding.propose(tokens[rows], pos, Draw((seed,), start=rows.start, total=b))
        for rows in (slice(0, cut), slice(cut, b))
    ]
    assert isinstance(hiding, Hiding) and hiding.ratio == 0.75
    assert torch.equal(whole.keep, torch.cat([share.keep for share in shares]))
    assert whole.keep.shape[1] == keep_count(n, hiding.ratio_at(pos))
    assert torch.equal(whole.hidden.sum(1), torch.full((b,), float(n - whole.keep.shape[1])))
    order = hiding.order(tokens, pos, Draw((seed,)))
    assert torch.equal(order.sort(1).values, torch.arange(n).expand(b, n))


@every_hiding
def test_hidings_are_made_where_parameters_have_no_memory(name):
    with torch.device("meta"):  # how a run's settings are checked
        assert isinstance(make_hiding((6, 4), 0.75, {"name": name}), Hiding)


@every_hiding
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_hidings_answer_on_the_tokens_device(name):
    hiding = make_hiding((4, 4), 0.75, name)
    hiding = hiding.cuda() if isinstance(hiding, torch.nn.Module) else hiding
    here, there = torch.zeros(3, 16, 1), torch.zeros(3, 16, 1, device="cuda")
    hiding.learn(torch.rand(3, 16, device="cuda"), torch.ones(3, 16, device="cuda"))
    mask = hiding.propose(there, 0.0, Draw((0,)))
    assert mask.keep.is_cuda and mask.hidden.is_cuda
    if not isinstance(hiding, torch.nn.Module):
        assert torch.equal(mask.keep.cpu(), hiding.propose(here, 0.0, Draw((0,))).keep)


@pytest.mark.parametrize(
    "wrong, error, line",
    [
        ("blok", ConfigError, "unknown masking rule 'blok'.*did you mean 'block'"),
        ({"low": 1.0}, ConfigError, "unknown masking rule None"),
        ({"name": "random", "low": 1.0}, ConfigError, "mask.random: unknown parameter 'low'"),
        ({"name": "noise", "grid": (2, 2)}, ConfigError, "mask.noise: unknown parameter 'grid'"),
        ({"name": "noise", "low": 2.0}, ValueError, "low=2.0, high=2.0"),
        ({"name": "growing_block", "start": 0.5}, ValueError, "1 to 4 patches.*not 0.5"),
        ({"name": "growing_ratio", "end": 1.0}, ValueError, "leaves 0 of 16 patches"),
        ({"name": "hard", "momentum": 1.5}, ValueError, "momentum of hard masks"),
    ],
)
def test_a_wrong_setting_is_one_clear_line_at_once(wrong, error, line):
    with pytest.raises(error, match=line):
        make_hiding((4, 4), 0.75, wrong)


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 8), cuts=st.sets(st.integers(1, 7)), seed=st.integers(0, 999), steps=st.integers(1, 3)
)
def test_hard_masks_remember_alike_however_a_batch_is_split(b, cuts, seed, steps):
    whole, split_up = Hard((3, 4), 0.5), Hard((3, 4), 0.5)
    edges = [0, *sorted(c for c in cuts if c < b), b]
    for step in range(steps):
        error = torch.rand(b, 12, generator=generator(seed + step))
        hidden = maskings["random"](b, 12, 0.5, generator=generator(seed + step)).hidden
        whole.learn(error, hidden)
        for start, stop in zip(edges, edges[1:]):
            before = split_up.difficulty.clone()
            split_up.learn(error[start:stop], hidden[start:stop])
            assert torch.equal(before, split_up.difficulty)  # nothing moves within a step
        whole.after_step(0.0)
        split_up.after_step(0.0)
    torch.testing.assert_close(split_up.state_dict(), whole.state_dict())


@settings(max_examples=25, deadline=None)
@given(pos=st.floats(0, 1), seed=st.integers(0, 999), b=st.integers(1, 4))
def test_hard_masks_hide_the_hardest_share(pos, seed, b):
    hard = Hard((4, 4), 0.75)
    error = torch.rand(16, generator=generator(seed))
    hard.learn(error[None], torch.ones(1, 16))
    hard.after_step(pos)
    mask = hard.propose(torch.zeros(b, 16, 1), pos, Draw((seed,)))
    hardest = error.argsort(descending=True)[: round(0.5 * pos * 12)]
    assert mask.hidden[:, hardest].all()


def test_hard_masks_continue_from_their_state():
    hard, again = Hard((4, 4), 0.75), Hard((4, 4), 0.75)
    hard.learn(torch.rand(5, 16), torch.ones(5, 16))
    hard.after_step(0.5)
    assert set(hard.state_dict()) == {"difficulty", "seen"}
    again.load_state_dict(hard.state_dict())
    masks = [h.propose(torch.zeros(4, 16, 1), 1.0, Draw((0,))).keep for h in (hard, again)]
    assert torch.equal(*masks)


def test_hard_masks_that_know_nothing_are_random():
    hidden = Hard((4, 4), 0.75).propose(torch.zeros(4000, 16, 1), 1.0, Draw((0,))).hidden
    assert (hidden.mean(0) - 0.75).abs().max() < 0.03


@settings(max_examples=50, deadline=None)
@given(b=st.integers(1, 4), n=st.integers(2, 40), data=st.data())
def test_lowest_and_highest_are_opposites_with_stable_ties(b, n, data):
    k = data.draw(st.integers(1, n - 1))
    values = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=b, max_size=b))
    )
    low, high = keep_lowest(values, k), keep_highest(values, k)
    assert torch.equal(keep_highest(-values, k).keep, low.keep)
    for row, kept, top in zip(values.tolist(), low.keep.tolist(), high.keep.tolist()):
        assert kept == sorted(range(n), key=lambda i: (row[i], i))[:k]
        assert top == sorted(range(n), key=lambda i: (-row[i], i))[:k]


@settings(max_examples=50, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 5), grid=grids, ph=st.integers(1, 6), pw=st.integers(1, 6))
def test_cutting_and_joining_is_the_identity(b, c, grid, ph, pw):
    gh, gw = grid
    images = torch.arange(float(b * c * gh * ph * gw * pw)).reshape(b, c, gh * ph, gw * pw)
    patches = patchify(images, (ph, pw))
    assert patches.shape == (b, gh * gw, ph * pw * c)
    assert torch.equal(unpatchify(patches, (ph, pw), grid_size(images.shape[2:], (ph, pw))), images)
    i, row, column = gh * gw - 1, ph - 1, pw - 1  # the last value of the last patch is the last pixel
    assert patches[0, i, (row * pw + column) * c] == images[0, 0, -1, -1]


@settings(max_examples=25, deadline=None)
@given(grid=grids, quarter=st.integers(2, 32))
def test_every_place_has_its_own_position(grid, quarter):
    positions = sincos_2d(4 * quarter, grid)
    apart = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert positions.isfinite().all() and apart.min() > 1e-3


def test_errors_are_summed_in_double_precision_whatever_the_module_was_cast_to():
    hiding = make_hiding((4, 4), 0.75, "hard").to(torch.float32)
    hiding.learn(torch.rand(2, 16), torch.ones(2, 16))
    assert hiding.total.dtype == torch.float64 and hiding.count.dtype == torch.float64
