"""Deformable convolution (Dai et al. 2017, un-modulated) from one bilinear gather and one matrix
product; no compiled operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segfleet.models.registry import ModelError


def deform_conv2d(
    x_BCYX: Tensor,
    offset_BTYX: Tensor,
    weight_OCyx: Tensor,
    bias_O: Tensor | None = None,
    groups: int = 1,
    *,
    layout: str = "rows_columns",
    recompute: bool = True,
) -> Tensor:
    """Convolution, stride 1 and same size, whose taps are displaced by `offset` pixels and read
    bilinearly, zeros outside the image.

    weight (O, C/groups, k, k), k odd; groups = C is the depthwise case. offset (B, 2k², Y, X), tap
    t = k·row + column: layout "rows_columns": channels 0..k²-1 are the row offsets of the taps, the
    next k² their column offsets; layout "interleaved": row and column offset of tap 0, then of tap
    1, ... (torchvision's order). Positions and samples are float32 (float64 for float64 input)
    under autocast too. The k² samples per pixel are not kept for the backward pass but read again,
    unless `recompute` is False. Raises ModelError when the shapes do not fit.
    """
    k = weight_OCyx.shape[-1]
    expected = (x_BCYX.shape[0], 2 * k * k, *x_BCYX.shape[2:])
    if tuple(offset_BTYX.shape) != expected:
        shape = tuple(offset_BTYX.shape)
        raise ModelError(
            f"deform_conv2d needs offsets of shape {expected} for an input of shape "
            f"{tuple(x_BCYX.shape)}, found {shape}"
        )
    if layout not in ("rows_columns", "interleaved"):
        raise ModelError(
            f"deform_conv2d: layout is '{layout}', expected one of: rows_columns, interleaved"
        )
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_BCYX, offset_BTYX, weight_OCyx, bias_O)
    )
    arguments = (x_BCYX, offset_BTYX, weight_OCyx, bias_O, groups, layout)
    if recompute and needs_grad:
        return checkpoint(
            _gather_and_convolve, *arguments, use_reentrant=False, preserve_rng_state=False
        )
    return _gather_and_convolve(*arguments)


def _gather_and_convolve(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, groups: int, layout: str
) -> Tensor:
    rows = x.shape[2]
    image, grid = x.to(_exact(x)), _grid(offset, weight.shape[-1], layout)
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        samples = read_in_order(image, grid)
    else:
        samples = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)
    # einops notes a tensor's type at its first call, which torch.compile refuses in a checkpoint
    batch, columns = len(samples), samples.shape[-1]
    kernels = weight.reshape(groups, -1, weight[0].numel())  # g o (c row column)
    samples = samples.reshape(batch, groups, -1, rows * columns)  # b g (c tap) (y x)
    out = (kernels @ samples).reshape(batch, -1, rows, columns)  # b (g o) y x
    return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


def read_in_order(x_BCYX: Tensor, grid_BPQ2: Tensor) -> Tensor:
    """`grid_sample`, bilinear with zeros outside, as four look-ups in a table of pixels: (B, C, P,
    Q).

    The gradients that meet in a pixel are then sorted and summed in one order; on CUDA
    `grid_sample` adds them as they come.
    """
    batch, channels, rows, columns = x_BCYX.shape
    column = ((grid_BPQ2[..., 0] + 1) * columns - 1) / 2
    row = ((grid_BPQ2[..., 1] + 1) * rows - 1) / 2
    left, top = column.detach().floor(), row.detach().floor()
    right_share, lower_share = (column - left).unsqueeze(-1), (row - top).unsqueeze(-1)
    pixels = x_BCYX.permute(0, 2, 3, 1).reshape(-1, channels)
    begin = torch.arange(batch, device=x_BCYX.device).view(-1, 1, 1) * (rows * columns)

    def read(row: Tensor, column: Tensor) -> Tensor:
        # comparisons with NaN are false, too: no index is ever outside
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        place = torch.where(inside, row * columns + column, 0.0).long()
        return torch.where(inside.unsqueeze(-1), pixels[begin + place], 0.0)

    upper = read(top, left) * (1 - right_share) + read(top, left + 1) * right_share
    lower = read(top + 1, left) * (1 - right_share) + read(top + 1, left + 1) * right_share
    return (upper * (1 - lower_share) + lower * lower_share).permute(0, 3, 1, 2)


def _exact(t: Tensor) -> torch.dtype:
    """float32, or float64 where it was asked for: half precision cannot tell neighbouring pixels
    apart."""
    return torch.promote_types(t.dtype, torch.float32)


def _grid(offset: Tensor, k: int, layout: str) -> Tensor:
    """Sampling positions (B, k²·Y, X, 2) as `grid_sample` wants them: (column, row), -1 and 1 at
    the image's outer edges."""
    rows, columns = offset.shape[2:]
    dtype, device = _exact(offset), offset.device
    offset = offset.to(dtype)
    if layout == "rows_columns":
        row, column = offset.chunk(2, 1)
    else:
        row, column = offset[:, 0::2], offset[:, 1::2]
    reach = torch.arange(k, dtype=dtype, device=device) - k // 2
    tap_row, tap_column = reach.repeat_interleave(k).view(-1, 1, 1), reach.repeat(k).view(-1, 1, 1)
    row = row + tap_row + torch.arange(rows, dtype=dtype, device=device).view(-1, 1)
    column = column + tap_column + torch.arange(columns, dtype=dtype, device=device)
    grid = torch.stack(((2 * column + 1) / columns - 1, (2 * row + 1) / rows - 1), -1)
    return grid.flatten(1, 2)


class DeformConv2d(nn.Module):
    """Deformable k×k convolution with its own offset branch: a plain k×k convolution with bias, C
    -> 2k² ("rows_columns").

    The offset branch's weight starts at zero; its bias too, so that the block starts as an ordinary
    convolution, or at the framework's default draw (`offset_bias="random"`).
    """

    def __init__(
        self, channels: int, out_channels: int, *, kernel: int = 3, offset_bias: str = "zero"
    ) -> None:
        super().__init__()
        if offset_bias not in ("zero", "random"):
            raise ModelError(f"offset_bias: found '{offset_bias}', expected one of: zero, random")
        self.offset = nn.Conv2d(channels, 2 * kernel * kernel, kernel, padding=kernel // 2)
        # holds and initialises the weight; never called
        self.kernel = nn.Conv2d(channels, out_channels, kernel, bias=False)
        nn.init.zeros_(self.offset.weight)
        if offset_bias == "zero":
            nn.init.zeros_(self.offset.bias)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return deform_conv2d(x_BCYX, self.offset(x_BCYX), self.kernel.weight)
