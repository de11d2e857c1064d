"""The blocks of E2MISeg: residual convolutions, hybrid feature representation, group aggregation of
skips.

Source: E2MISeg (Jiang et al. 2026) and its specification in this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segfleet.models.e2mi_seg.attention import PairedAttention
from segfleet.models.norm import ChannelNorm
from segfleet.models.registry import ModelError

DILATIONS = (1, 2, 6, 7)
NORMS = {"batch": nn.BatchNorm3d, "instance": partial(nn.InstanceNorm3d, affine=True)}


def conv3(a: int, b: int) -> nn.Conv3d:
    return nn.Conv3d(a, b, 3, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """`leaky(norm(conv3(leaky(norm(conv3(x))))) + shortcut)`; the shortcut is the identity, or a
    normalised 1x1 where the width changes."""

    def __init__(self, a: int, b: int, norm: type[nn.Module] | partial = nn.InstanceNorm3d) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv3(a, b), norm(b), nn.LeakyReLU(0.01), conv3(b, b), norm(b))
        self.shortcut = (
            nn.Identity() if a == b else nn.Sequential(nn.Conv3d(a, b, 1, bias=False), norm(b))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.convs(x) + self.shortcut(x), 0.01)


class HybridBlock(nn.Module):
    """HFR: a convolutional branch gives paired attention its queries and keys (or, with
    `qk_source="tokens"`, is added to the output, `local_weight` times).

    Maps (B, C, Z, Y, X) to the same shape. The position embedding and the attention's projections
    depend on the grid (Z, Y, X). early_skip: the block's input is added before the last convolution
    instead of after it.
    """

    def __init__(
        self,
        channels: int,
        grid: Sequence[int],
        projected: int,
        heads: int,
        *,
        norm: str,
        local_norm: bool,
        local_residual: bool,
        local_weight: float,
        residual_blocks: int,
        dropout: float,
        attention: dict[str, object],
        early_skip: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ModelError(f"e2mi_seg: norm is '{norm}', expected one of: {', '.join(NORMS)}")
        self.local_residual, self.joins_late = local_residual, attention["qk_source"] == "tokens"
        self.local_weight, self.early_skip = local_weight, early_skip
        tokens = grid[0] * grid[1] * grid[2]
        local: list[nn.Module] = []
        for _ in range(2):
            local += [
                conv3(channels, channels),
                *([NORMS[norm](channels)] if local_norm else []),
                nn.LeakyReLU(0.01),
            ]
        self.local = nn.Sequential(*local)
        self.position = nn.Parameter(torch.zeros(1, tokens, channels))
        self.norm = nn.LayerNorm(channels)
        self.attention = PairedAttention(channels, tokens, projected, heads, **attention)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.refine = nn.Sequential(
            *(ResidualBlock(channels, channels, NORMS[norm]) for _ in range(residual_blocks)),
            nn.Dropout3d(dropout),
            nn.Conv3d(channels, channels, 1),
        )
        self.out = nn.Conv3d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        if self.local_residual:
            y = x + y
        t = rearrange(x, "b c z y x -> b (z y x) c") + self.position
        keys = rearrange(y, "b c z y x -> b c (z y x)")
        t = t + self.scale * self.attention(self.norm(t), keys)
        _, _, depth, rows, columns = x.shape
        a = rearrange(t, "b (z y x) c -> b c z y x", z=depth, y=rows, x=columns)
        r = a + self.refine(a)
        if self.joins_late:
            r = r + self.local_weight * y
        return self.out(r + x) if self.early_skip else self.out(r) + x


class GroupAggregation(nn.Module):
    """MFGA: bring `deep` to the skip's size, guess the classes from it, and mix both in four
    channel groups of growing dilation.

    (B, C_in, coarse) and (B, C, fine) -> (B, C, fine); C must be a multiple of 4. The guess is not
    supervised.
    `grid`: the fine grid, when dilations are to be clamped to it.
    """

    def __init__(
        self,
        a: int,
        b: int,
        num_classes: int,
        factor: Sequence[int],
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if b % 4:
            raise ModelError(f"e2mi_seg: every width must be a multiple of 4, found {b}")
        width = b // 2 + num_classes
        self.up = nn.ConvTranspose3d(a, b, tuple(factor), stride=tuple(factor), bias=False)
        self.guess = nn.Conv3d(b, num_classes, 1)
        self.group_norm = ChannelNorm(width)
        self.convs = nn.ModuleList()
        for dilation in DILATIONS:
            reach = tuple(min(dilation, max(size - 1, 1)) for size in grid) if grid else dilation
            self.convs.append(
                nn.Conv3d(width, width, 3, padding=reach, dilation=reach, groups=width)
            )
        self.mix = nn.Sequential(ChannelNorm(4 * width), nn.Conv3d(4 * width, b, 1, bias=False))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        v = self.up(deep)
        m = self.guess(v)
        groups = zip(self.convs, v.chunk(4, 1), skip.chunk(4, 1), strict=True)
        return self.mix(
            torch.cat(
                [conv(self.group_norm(torch.cat((v_g, s_g, m), 1))) for conv, v_g, s_g in groups], 1
            )
        )
