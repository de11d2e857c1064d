"""The sliding window: tiles, weights, padding, mirroring."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.inference import sliding_window as module
from segfleet.pipeline.inference.room import Layout, layout, padded_count
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


def by_hand(net, x, patch):
    """Tile by tile, as it was before GPUs."""
    starts = [tile_starts(size, p) for size, p in zip(x.shape[1:], patch, strict=True)]
    weight, total, weights = importance(patch), 0, torch.zeros(x.shape[1:])
    with torch.no_grad():
        for corner in itertools.product(*starts):
            box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            found = net(x[(slice(None), *box)][None])[0]
            total = torch.zeros(len(found), *x.shape[1:]) if isinstance(total, int) else total
            total[(slice(None), *box)] += found * weight
            weights[box] += weight
    return total / weights


def test_on_a_cpu_the_bits_are_those_of_one_tile_after_another():
    torch.manual_seed(2)
    net, x = torch.nn.Conv3d(1, 3, 3, padding=1), image(1, 11, 19, 23)
    assert torch.equal(sliding_window(net, x, patch=(8, 8, 8), dims=3), by_hand(net, x, (8, 8, 8)))


class Memory:
    """A card of `size` bytes of which a tile takes `tile`; the window's sums are not counted."""

    def __init__(self, size: int, tile: int):
        self.size, self.tile, self.dropped = size, tile, 0

    def free(self):
        return self.size

    def begin(self):
        pass

    def peak(self):
        return self.tile

    def drop_cache(self):
        self.dropped += 1


@pytest.mark.parametrize("dims", [2, 3])
def test_as_many_tiles_as_fit_go_at_once_and_change_nothing_but_rounding(dims):
    torch.manual_seed(2)
    net = (torch.nn.Conv3d, torch.nn.Conv2d)[dims == 2](1, 3, 3, padding=1)
    x, passes = image(1, 11, 19, 23), []

    def forward(t):
        passes.append(len(t))
        return net(t)

    alone = sliding_window(net, x, patch=(8, 8, 8), dims=dims)
    memory = Memory(2**20, 2**17)
    found = sliding_window(forward, x, patch=(8, 8, 8), dims=dims, memory=memory)
    left = 0.8 * 2**20 - 4 * (3 + 4) * 11 * 19 * 23
    fitting = 2 ** int(math.log2(left / 2**17))
    assert set(passes[1:-1]) == {fitting} and passes[0] == 1
    assert passes[-1] in (1, 2, 4, 8, 16) and passes[-1] <= fitting, "a size met before"
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    again = sliding_window(forward, x, patch=(8, 8, 8), dims=dims, memory=memory)
    assert torch.equal(found, again)


def test_a_pass_that_does_not_fit_after_all_is_halved():
    net, x = torch.nn.Conv3d(1, 3, 3, padding=1), image(1, 16, 24, 24)
    passes, memory = [], Memory(2**30, 2**20)

    def forward(t):
        passes.append(len(t))
        if len(t) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return net(t)

    found = sliding_window(forward, x, patch=(8, 8, 8), dims=3, memory=memory)
    assert passes[:7] == [1, 128, 64, 32, 16, 8, 4] and set(passes[7:]) == {2}
    assert memory.dropped == 6
    torch.testing.assert_close(
        found, sliding_window(net, x, patch=(8, 8, 8), dims=3), rtol=1e-5, atol=1e-6
    )


def test_a_tile_that_does_not_fit_is_an_error():
    def forward(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        sliding_window(forward, image(1, 8, 8, 8), patch=(8, 8, 8), dims=3, memory=Memory(2**30, 1))


@pytest.mark.parametrize(
    "tiles, batch, count", [(1, 8, 1), (3, 8, 4), (5, 8, 8), (8, 8, 8), (5, 6, 6), (2, 3, 2)]
)
def test_a_pass_is_filled_up_to_a_size_that_was_met_before(tiles, batch, count):
    assert padded_count(tiles, batch) == count


@pytest.mark.parametrize(
    "free, tile, asked, expected",
    [
        (2**37, 2**30, 1, Layout(True, 4)),  # of 128 cubed no more than four pay
        (2**37, 2**30, 7, Layout(True, 7)),  # the recipe says so
        (3 * 2**30, 2**30, 1, Layout(True, 1)),
        (2**31, 2**30, 1, Layout(False, 1)),  # a tile fits, the sums do not
        (2**29, 2**30, 1, Layout(False, 1)),  # it has just fitted
    ],
)
def test_sums_and_tiles_share_what_is_free(free, tile, asked, expected):
    assert layout(free, tile, (128**3, 400 * 10**5, 2), asked) == expected


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def test_what_is_fetched_from_a_device_is_added_a_pass_later_in_the_same_order(monkeypatch):
    waited = []

    class Event:
        def synchronize(self):
            waited.append(len(waited))

    monkeypatch.setattr(module, "_fetched", lambda t: (t.as_subclass(torch.Tensor), Event()))
    whole, parts = (module._Sums((4, 4, 8), (4, 4, 4), torch.device("cpu")) for _ in range(2))
    for start in (0, 2, 4):
        box = (slice(0, 4), slice(0, 4), slice(start, start + 4))
        found = image(1, 2, 4, 4, 4) + start
        whole.add([box], found)
        if parts.total is None:
            parts.place(2, "cpu")
        parts.add([box], found.as_subclass(Elsewhere))
        assert len(waited) == start // 2, "it waits for the pass before, not for this one"
    assert torch.equal(whole.mean(), parts.mean()) and len(waited) == 3


def test_sums_give_way_to_a_network_that_needs_the_device():
    sums = module._Sums((4, 4, 4), (4, 4, 4), None)
    sums.place(2, "cpu")
    assert not sums.to_host(), "they are on the host already"
    sums.place(2, "meta")
    with pytest.raises(NotImplementedError, match="meta"):  # it tries to fetch them
        sums.to_host()
