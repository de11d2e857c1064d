"""The sliding window: tiles, weights, padding, mirroring."""

from __future__ import annotations

import math

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.sliding_window import (
    importance,
    mirrored,
    sliding_window,
    tile_starts,
)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [16, 17, 24, 31, 32, 33, 100, 517])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_tiles_follow_the_formula_cover_everything_and_are_evenly_spread(size, overlap):
    starts = tile_starts(size, 16, overlap)
    assert len(starts) == math.ceil((size - 16) / (16 * (1 - overlap))) + 1
    assert starts[0] == 0 and starts[-1] == size - 16
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert all(s <= 16 * (1 - overlap) + 1 for s in steps), (
        "steps are no wider than asked, but for rounding"
    )
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert set().union(*(range(s, s + 16) for s in starts)) == set(range(size))


def test_tiles_of_an_exact_fit_are_not_doubled_by_floating_point():
    assert tile_starts(13, 10, 0.7) == [0, 3]
    assert tile_starts(16, 10, 0.7) == [0, 3, 6]


def test_known_placement():
    assert tile_starts(100, 64, 0.5) == [0, 18, 36]
    assert tile_starts(64, 64, 0.5) == [0]


def test_importance_peaks_in_the_middle_and_is_positive_everywhere():
    weight = importance((8, 16, 32))
    assert weight.shape == (8, 16, 32) and weight.max() == 1 and weight.min() > 0
    assert weight[4, 8, 16] == 1
    assert weight[4, 8, 16 + 4] == pytest.approx(math.exp(-0.5))  # one sigma = 32 / 8
    assert importance((1, 4, 4)).shape == (1, 4, 4)


def test_importance_lifts_what_underflows():
    weight = importance((2,) * 14)  # the corner is exp(-8 * 14), less than float32 can hold
    assert (weight > 0).all() and weight[(0,) * 14] == weight.min()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("shape", [(1, 13, 21, 30), (2, 3, 5, 7), (1, 1, 40, 9)])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_constant_network_gives_the_constant(dims, shape, batch):
    def constant(x):
        level = torch.tensor([0.25, 0.75]).reshape(1, 2, *[1] * dims)
        return level.expand(len(x), 2, *x.shape[2:])

    found = sliding_window(constant, image(*shape), patch=(8, 8, 16), batch=batch, dims=dims)
    assert found.shape == (2, *shape[1:]) and found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1).expand_as(found)
    )


@pytest.mark.parametrize(
    "dims, mirror_axes", [(3, ()), (3, (0, 1, 2)), (2, ()), (2, (1, 2)), (3, (2,))]
)
@pytest.mark.parametrize("shape", [(2, 13, 21, 30), (1, 3, 5, 40)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_the_identity_gives_the_image_back(dims, mirror_axes, shape, overlap):
    x = image(*shape)
    found = sliding_window(
        lambda t: t,
        x,
        patch=(6, 8, 16),
        overlap=overlap,
        mirror_axes=mirror_axes,
        batch=3,
        dims=dims,
    )
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_an_image_of_the_patch_size_is_one_direct_pass():
    torch.manual_seed(0)
    net = torch.nn.Conv3d(1, 2, 3, padding=1)
    x = image(1, 6, 8, 10)
    calls = []

    def forward(t):
        calls.append(tuple(t.shape))
        return net(t).softmax(1)

    found = sliding_window(forward, x, patch=(6, 8, 10), dims=3)
    assert calls == [(1, 1, 6, 8, 10)]
    torch.testing.assert_close(found, net(x[None]).softmax(1)[0].detach())


def test_two_overlapping_tiles_by_hand():
    """A network that says the tile's first voxel everywhere: the sum of two weighted constants,
    divided by the weights."""
    x = torch.arange(6.0).reshape(1, 1, 1, 6)
    found = sliding_window(
        lambda t: t[..., :1].expand_as(t), x, patch=(1, 1, 4), overlap=0.5, dims=3
    )[0, 0, 0]
    weight = importance((1, 1, 4))[0, 0]
    left, right = torch.zeros(6), torch.zeros(6)
    left[:4], right[2:] = weight, weight
    torch.testing.assert_close(found, (0.0 * left + 2.0 * right) / (left + right))


def test_slices_do_not_see_each_other_in_2d():
    seen = []

    def forward(t):
        assert t.ndim == 4
        seen.append(t.shape[0])
        return t.mean((2, 3), keepdim=True).expand_as(t)

    x = image(1, 5, 8, 8)
    found = sliding_window(forward, x, patch=(4, 8, 8), batch=2, dims=2)
    assert seen == [2, 2, 1]
    torch.testing.assert_close(found, x.mean((2, 3), keepdim=True).expand_as(x))


def test_mirroring_is_the_mean_over_all_flips_flipped_back():
    x = image(1, 1, 4, 6)

    def forward(t):
        return t.cumsum(-1) + 2 * t.cumsum(-2)

    by_hand = (
        forward(x)
        + forward(x.flip(2)).flip(2)
        + forward(x.flip(3)).flip(3)
        + forward(x.flip((2, 3))).flip((2, 3))
    ) / 4
    torch.testing.assert_close(mirrored(forward, x, (2, 3)), by_hand)
    whole = sliding_window(forward, x[0][:, None], patch=(1, 4, 6), mirror_axes=(1, 2), dims=2)
    torch.testing.assert_close(whole[:, 0], by_hand[0])


def test_the_padding_is_centred_and_cut():
    seen = []

    def forward(t):
        seen.append(t)
        return t

    x = torch.ones(1, 3, 4, 5)
    found = sliding_window(forward, x, patch=(6, 4, 8), dims=3)
    assert found.shape == x.shape
    tile = seen[0][0, 0]
    assert tile.shape == (6, 4, 8) and tile[1:4, :, 1:6].eq(1).all() and tile.sum() == 60


def test_same_input_same_bits():
    torch.manual_seed(1)
    net = torch.nn.Conv3d(1, 3, 3, padding=1)
    x = image(1, 11, 19, 23)
    a, b = (sliding_window(net, x, patch=(8, 8, 8), mirror_axes=(0,), dims=3) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad


def test_a_diverged_network_is_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        sliding_window(lambda t: t * float("nan"), image(1, 4, 4, 4), patch=(4, 4, 4), dims=3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch": (8, 8)}, "three sizes"),
        ({"patch": (0, 8, 8)}, "at least 1"),
        ({"overlap": 1.0}, "less than 1"),
        ({"mirror_axes": (3,)}, "mirror_axes"),
        ({"mirror_axes": (1, 1)}, "mirror_axes"),
        ({"dims": 2, "mirror_axes": (0,)}, "mirror_axes"),
        ({"dims": 4}, "dims"),
        ({"batch": 0}, "batch"),
    ],
)
def test_impossible_settings_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        sliding_window(lambda t: t, image(1, 8, 8, 8), **{"patch": (8, 8, 8), "dims": 3, **wrong})


def test_a_network_that_changes_the_size_is_refused():
    with pytest.raises(InputError, match="gave size"):
        sliding_window(lambda t: t[..., ::2], image(1, 8, 8, 8), patch=(8, 8, 8), dims=3)
