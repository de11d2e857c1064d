"""Deformable convolution against plain, shifted and hand-written ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from segfleet.models.deform import DeformConv2d, deform_conv2d, read_in_order
from segfleet.models.registry import ModelError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["rows_columns", "interleaved"])
def test_zero_offsets_are_a_plain_convolution(groups, layout):
    x, weight, bias = draw(2, 4, 5, 7), draw(8, 4 // groups, 3, 3, seed=1), draw(8, seed=2)
    found = deform_conv2d(
        x, torch.zeros(2, 18, 5, 7, dtype=x.dtype), weight, bias, groups, layout=layout
    )
    torch.testing.assert_close(found, F.conv2d(x, weight, bias, padding=1, groups=groups))


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 2), (-2, 1), (9, 9)])
def test_integer_offsets_are_a_shifted_convolution(down, right):
    x, weight = draw(1, 3, 6, 5), draw(2, 3, 3, 3, seed=1)
    offset = torch.cat(
        (torch.full((1, 9, 6, 5), float(down)), torch.full((1, 9, 6, 5), float(right))), 1
    ).double()
    padded = F.pad(x, (1 + abs(right),) * 2 + (1 + abs(down),) * 2)
    wide = F.conv2d(padded, weight)
    expected = wide[..., abs(down) + down :, abs(right) + right :][..., :6, :5]
    torch.testing.assert_close(deform_conv2d(x, offset, weight), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_memory_format_changes_nothing(groups):
    x, weight, offset = (
        draw(2, 4, 5, 7),
        draw(8, 4 // groups, 3, 3, seed=1),
        2 * draw(2, 18, 5, 7, seed=2),
    )
    expected = deform_conv2d(x, offset, weight, None, groups)
    x, weight, offset = (
        t.contiguous(memory_format=torch.channels_last).requires_grad_()
        for t in (x, weight, offset)
    )
    found = deform_conv2d(x, offset, weight, None, groups)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert all(t.grad is not None for t in (x, weight, offset))


def test_fractional_offsets_match_the_sum_over_taps_and_corners():
    x, weight, offset = draw(1, 2, 4, 3), draw(1, 2, 3, 3, seed=1), 2 * draw(1, 18, 4, 3, seed=2)
    expected = torch.zeros(4, 3, dtype=x.dtype)
    for r in range(4):
        for c in range(3):
            for t in range(9):
                row = r + t // 3 - 1 + float(offset[0, t, r, c])
                column = c + t % 3 - 1 + float(offset[0, 9 + t, r, c])
                for i in (math.floor(row), math.floor(row) + 1):
                    for j in (math.floor(column), math.floor(column) + 1):
                        if 0 <= i < 4 and 0 <= j < 3:
                            share = (1 - abs(row - i)) * (1 - abs(column - j))
                            expected[r, c] += share * (weight[0, :, t // 3, t % 3] @ x[0, :, i, j])
    torch.testing.assert_close(deform_conv2d(x, offset, weight)[0, 0], expected)
    interleaved = offset.view(1, 2, 9, 4, 3).transpose(1, 2).reshape(1, 18, 4, 3)
    torch.testing.assert_close(
        deform_conv2d(x, interleaved, weight, layout="interleaved")[0, 0], expected
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients(groups, recompute):
    x, weight, bias = draw(1, 2, 4, 3), draw(2, 2 // groups, 3, 3, seed=1), draw(2, seed=3)
    # away from the kinks
    offset = 0.3 + 0.1 * torch.rand(
        1, 18, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    leaves = [t.requires_grad_() for t in (x, offset, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *t: deform_conv2d(*t, groups, recompute=recompute), leaves
    )


def test_samples_are_not_kept_for_the_backward_pass():
    x, offset, weight = (
        draw(1, 8, 16, 16).requires_grad_(),
        draw(1, 18, 16, 16, seed=1),
        draw(8, 8, 3, 3, seed=2).requires_grad_(),
    )
    kept = {True: 0, False: 0}
    for recompute in kept:

        def count(t, recompute=recompute):
            kept[recompute] = max(kept[recompute], t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            deform_conv2d(x, offset, weight, recompute=recompute)
    assert kept[False] >= 9 * x.numel() and kept[True] <= offset.numel()


def test_positions_stay_exact_under_autocast():
    x = torch.arange(64.0).repeat(1, 1, 4, 1)
    offset, weight = torch.zeros(1, 18, 4, 64), torch.zeros(1, 1, 3, 3)
    offset[:, 13], weight[0, 0, 1, 1] = 0.25, 1.0  # centre tap, column
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = deform_conv2d(x, offset, weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[..., :63].float(), x[..., :63] + 0.25, rtol=1 / 256, atol=0)


def test_module_starts_as_a_plain_convolution():
    torch.manual_seed(0)
    block, x = DeformConv2d(4, 6), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(
        block(x), F.conv2d(x, block.kernel.weight, padding=1), rtol=1e-4, atol=1e-4
    )
    assert DeformConv2d(4, 6, offset_bias="random").offset.bias.abs().min() > 0


def test_wrong_shapes_and_names_are_refused():
    x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 3, 3)
    with pytest.raises(ModelError, match=r"offsets of shape \(1, 18, 4, 4\).*found \(1, 9, 4, 4\)"):
        deform_conv2d(x, torch.zeros(1, 9, 4, 4), weight)
    with pytest.raises(ModelError, match="rows_columns, interleaved"):
        deform_conv2d(x, torch.zeros(1, 18, 4, 4), weight, layout="pairs")
    with pytest.raises(ModelError, match="zero, random"):
        DeformConv2d(2, 2, offset_bias="one")


def test_reading_in_order_is_grid_sample_and_so_are_its_gradients():
    x, grid = draw(2, 3, 4, 6).requires_grad_(), draw(2, 5, 7, 2, seed=1).requires_grad_()
    assert (grid.abs() > 1).any() and (grid.abs() < 1).any(), "inside and outside"
    weight, found = draw(2, 3, 5, 7, seed=2), []
    for read in (read_in_order, lambda x, grid: F.grid_sample(x, grid, align_corners=False)):
        out = read(x, grid)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (x, grid))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_reading_in_order_reads_nothing_outside_where_a_position_is_no_number():
    grid = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).view(1, 4, 1, 1).expand(1, 4, 1, 2)
    grid = grid.clone().requires_grad_()
    out = read_in_order(torch.ones(1, 1, 3, 3, requires_grad=True), grid)
    out.sum().backward()  # an index outside would be an error
    assert out.shape == (1, 1, 4, 1)
