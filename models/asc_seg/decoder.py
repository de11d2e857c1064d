"""The decoder blocks of ASC-Seg: the gate that lets deep features into a skip, and the cross-scale
noise suppression decoder.

Source: specification `asc_seg` sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segfleet.models.asc_seg.encoder import conv
from segfleet.models.registry import ModelError


def enlarge(x_BCYX: Tensor, factor: int) -> Tensor:
    """Bilinear, corners aligned."""
    return (
        x_BCYX
        if factor == 1
        else F.interpolate(x_BCYX, scale_factor=factor, mode="bilinear", align_corners=True)
    )


class Connector(nn.Module):
    """FAC: σ(BN(up(conv1(deep)))) · σ(skip) + skip. deep (B, a, Y/2, X/2), skip (B, c, Y, X) -> (B,
    c, Y, X).

    Published with the convolution after the upsampling: the same function, as bilinear weights sum
    to one, at four times the cost.
    """

    def __init__(self, a: int, c: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(a, c), nn.BatchNorm2d(c)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        gate = torch.sigmoid(self.norm(enlarge(self.conv(deep), 2)))
        return gate * torch.sigmoid(skip) + skip


class MultiScale(nn.Module):
    """MSFA: eight dilated branches at the map's own, the doubled and the halved size, joined. (B,
    C, Y, X) -> the same shape, Y and X even.

    The grouped fusion reads four neighbouring channels, all of one branch; scales meet in the last
    1×1 convolution only.
    """

    DILATIONS = (1, 2, 3, 4, 1, 3, 1, 3)  # branches 0-3 at the own size, 4-5 doubled, 6-7 halved

    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv(c, half, 3, dilation=dilation),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
                conv(half, half),
                nn.BatchNorm2d(half),
            )
            for dilation in self.DILATIONS
        )
        self.fuse = nn.Sequential(
            conv(4 * c, c, 3, groups=c),
            nn.BatchNorm2d(c),
            nn.ReLU(inplace=True),
            conv(c, c),
            nn.BatchNorm2d(c),
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        doubled, halved = enlarge(x_BCYX, 2), F.max_pool2d(x_BCYX, 2)
        own = [branch(x_BCYX) for branch in self.branches[:4]]
        fine = [F.max_pool2d(branch(doubled), 2) for branch in self.branches[4:6]]
        coarse = [enlarge(branch(halved), 2) for branch in self.branches[6:]]
        return self.fuse(torch.cat([*own, *fine, *coarse], 1))


class Denoise(nn.Module):
    """DFB: s = BN(A₇(n) + A₅(n) + A₃(n)) of n = BN(x), then s + s · σ(BN(conv1(s - mean of its 3×3
    neighbours)))."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.enter = nn.BatchNorm2d(c)
        self.scales = nn.ModuleList(
            nn.Sequential(
                conv(c, c, k, groups=c), nn.BatchNorm2d(c), nn.GELU(), conv(c, c), nn.BatchNorm2d(c)
            )
            for k in (7, 5, 3)
        )
        self.join = nn.BatchNorm2d(c)
        self.gate = nn.Sequential(conv(c, c), nn.BatchNorm2d(c), nn.Sigmoid())

    def forward(self, x_BCYX: Tensor) -> Tensor:
        n = self.enter(x_BCYX)
        s = self.join(sum(scale(n) for scale in self.scales))
        high = s - F.avg_pool2d(s, 3, stride=1, padding=1)
        return s * self.gate(high) + s


class SpatialGate(nn.Module):
    """SAB: x + x · m, m one map from the 3×3 means and the 3×3 maxima of x."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mean, self.peak = self._path(c), self._path(c)
        self.gate = nn.Sequential(conv(2, 1, 7), nn.BatchNorm2d(1), nn.Sigmoid())

    @staticmethod
    def _path(c: int) -> nn.Sequential:
        return nn.Sequential(
            conv(c, c), nn.BatchNorm2d(c), nn.GELU(), conv(c, 1), nn.BatchNorm2d(1)
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        mean = self.mean(F.avg_pool2d(x_BCYX, 3, stride=1, padding=1))
        peak = self.peak(F.max_pool2d(x_BCYX, 3, stride=1, padding=1))
        return self.gate(torch.cat([mean, peak], 1)) * x_BCYX + x_BCYX


class ChannelGate(nn.Module):
    """CAB: x + x · g, g one number per channel from the sum of its mean and its maximum.

    `norm` "batch" normalises these single numbers over the batch, as published; "group" over the
    channels of each sample.
    """

    def __init__(self, c: int, norm: str) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(c) if norm == "batch" else nn.GroupNorm(1, c) for _ in range(2)]
        self.gate = nn.Sequential(
            conv(c, c), norms[0], nn.GELU(), conv(c, c), norms[1], nn.Sigmoid()
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.training and len(x_BCYX) == 1 and isinstance(self.gate[1], nn.BatchNorm2d):
            raise ModelError(
                "asc_seg normalises one number per channel over the batch and cannot train on a "
                "batch of 1; "
                "train on 2 or more samples per process, or set model.options.gate_norm=group"
            )
        return (
            self.gate(x_BCYX.amax((2, 3), keepdim=True) + x_BCYX.mean((2, 3), keepdim=True))
            * x_BCYX
            + x_BCYX
        )


class DecoderBlock(nn.Module):
    """CNSD: ReLU(x + CAB(SAB(DFB(MSFA(x))))). (B, C, Y, X) -> the same shape, Y and X even."""

    def __init__(self, c: int, gate_norm: str) -> None:
        super().__init__()
        self.msfa, self.dfb, self.sab, self.cab = (
            MultiScale(c),
            Denoise(c),
            SpatialGate(c),
            ChannelGate(c, gate_norm),
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return F.relu(self.cab(self.sab(self.dfb(self.msfa(x_BCYX)))) + x_BCYX)
