"""Masks and patches over all shapes: counts are exact, nothing depends on how a batch is shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clmae.masking import Draw, keep_count, keep_highest, keep_lowest, maskings
from clmae.patches import grid_size, patchify, sincos_2d, unpatchify

rules = pytest.mark.parametrize("name", sorted(maskings))
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
