"""NLIE-UNet: a U-Net with cyclic deformable blocks, and a bridge that rewrites every skip from its
neighbouring levels.

Source: "Dynamic Neighborhood-Enhanced UNet with Interwoven Fusion"; topology and counts from the
repository's specification of the released network. Sizes T, S, B, L differ in the widths only.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfleet.models.deform import DeformConv2d
from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip


def depthwise(channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)


def double_conv(a: int, b: int) -> nn.Sequential:
    """(Conv 3 -> BN -> ReLU) twice."""
    steps: list[nn.Module] = []
    for channels in (a, b):
        steps += [nn.Conv2d(channels, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


class CyclicDeformable(nn.Module):
    """Chain of deformable convolutions over `groups` channel groups: each group adds the last one's
    output; the last group passes."""

    def __init__(self, channels: int, groups: int, offset_bias: str) -> None:
        super().__init__()
        if groups < 2 or channels % groups:
            raise ModelError(
                f"nlie_unet: scales must be at least 2 and divide the width, found {groups} for "
                f"width {channels}"
            )
        self.groups, width = groups, channels // groups
        self.kernels = nn.ModuleList(
            DeformConv2d(width, width, offset_bias=offset_bias) for _ in range(groups - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = x.chunk(self.groups, 1)
        outputs = [self.kernels[0](parts[0])]
        for kernel, part in zip(self.kernels[1:], parts[1:], strict=True):
            outputs.append(kernel(outputs[-1] + part))
        return torch.cat((*outputs, last.to(outputs[0].dtype)), 1)


class ChannelGate(nn.Module):
    """Efficient channel attention (Wang et al. 2020) with the fixed kernel 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()  # (B, 1, C)
        return x * gate.squeeze(1)[..., None, None]


class CyclicBlock(nn.Module):
    """CDCB: `u = 1x1(x)`, `w = u + 3x3(u + chain(u))`, output `gate(w)`."""

    def __init__(self, a: int, b: int, groups: int, offset_bias: str) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU())
        self.chain = CyclicDeformable(b, groups, offset_bias)
        self.conv = nn.Sequential(nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        self.gate = ChannelGate()

    def forward(self, x: Tensor) -> Tensor:
        u = self.point(x)
        return self.gate(u + self.conv(u + self.chain(u)))


class SpatialPath(nn.Module):
    """Depthwise 3, then the sum of depthwise 3, 5, 7, 9 (and of the identity, for the base branch),
    then 1x1."""

    def __init__(self, channels: int, *, identity: bool) -> None:
        super().__init__()
        self.identity = identity
        self.first = depthwise(channels, 3)
        self.scales = nn.ModuleList(depthwise(channels, kernel) for kernel in (3, 5, 7, 9))
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.first(z)
        total = sum((scale(z) for scale in self.scales[1:]), self.scales[0](z))
        return self.mix(z + total if self.identity else total)


class InterwovenFusion(nn.Module):
    """HIFM: refine the base `x` with one or two neighbours of the same shape: `relu(x · gate) + x +
    mean of the spatial paths`."""

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.channel = nn.ModuleList(nn.Linear(channels, channels) for _ in range(neighbours + 1))
        self.spatial = nn.ModuleList(
            SpatialPath(channels, identity=i == 0) for i in range(neighbours + 1)
        )

    def forward(self, x: Tensor, *neighbours: Tensor) -> Tensor:
        inputs = (x, *neighbours)
        means = [linear(z.mean((2, 3))) for linear, z in zip(self.channel, inputs, strict=True)]
        gate = (sum(means[1:], means[0]) / len(inputs)).sigmoid()[..., None, None]
        paths = [path(z) for path, z in zip(self.spatial, inputs, strict=True)]
        return F.relu(x * gate) + x + sum(paths[1:], paths[0]) / len(inputs)


class Resample(nn.Module):
    """Halve (conv 3, stride 2) or double (transposed conv 2) the size, then add a depthwise 11 of
    the normalised result."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.resize = (
            nn.Conv2d(a, b, 3, stride=2, padding=1)
            if b > a
            else nn.ConvTranspose2d(a, b, 2, stride=2)
        )
        self.norm = nn.BatchNorm2d(b)
        self.wide = depthwise(b, 11)

    def forward(self, x: Tensor) -> Tensor:
        t = self.resize(x)
        return t + self.wide(F.relu(self.norm(t)))


class Bridge(nn.Module):
    """NEB: bring the five levels to the third, fuse each with its neighbours there, and send them
    back."""

    def __init__(self, widths: tuple[int, ...], level1_base: str) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = widths
        self.level1_base = level1_base
        self.gather = nn.ModuleList(
            (
                nn.Sequential(Resample(c1, c2), Resample(c2, c3)),
                Resample(c2, c3),
                nn.Identity(),
                Resample(c4, c3),
                nn.Sequential(Resample(c5, c4), Resample(c4, c3)),
            )
        )
        self.fuse = nn.ModuleList(
            InterwovenFusion(c3, neighbours) for neighbours in (1, 2, 2, 2, 1)
        )
        self.send = nn.ModuleList(
            (
                nn.Sequential(Resample(c3, c2), Resample(c2, c1)),
                Resample(c3, c2),
                nn.Identity(),
                Resample(c3, c4),
                nn.Sequential(Resample(c3, c4), Resample(c4, c5)),
            )
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        a1, a2, a3, a4, a5 = (gather(e) for gather, e in zip(self.gather, levels, strict=True))
        first = (a2, a1) if self.level1_base == "level2" else (a1, a2)
        groups = (first, (a2, a1, a3), (a3, a2, a4), (a4, a3, a5), (a5, a4))  # the base comes first
        return [
            send(fuse(*group))
            for send, fuse, group in zip(self.send, self.fuse, groups, strict=True)
        ]


class DecoderStep(nn.Module):
    """Double the size of `deep`, fuse it into the skip (same width), then a block."""

    def __init__(self, a: int, b: int, block: nn.Module) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(a, b, 2, stride=2)
        self.fuse = InterwovenFusion(b, 1)
        self.block = block

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.fuse(skip, self.up(deep)))


class NlieUNet(nn.Module):
    """x (B, C, Y, X), Y and X multiples of 16 -> logits (B, K, Y, X).

    widths: channels of the five levels, strictly increasing. scales: channel groups of the cyclic
    blocks at levels 3, 4, 5.
    offset_bias: "random" (as released) or "zero" (every deformable block starts as an ordinary
    convolution).
    level1_base: the map that the first fusion refines, "level2" (as released) or "own".
    Raises ModelError for a wrong option or input.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
        scales: tuple[int, ...] = (2, 4, 8),
        offset_bias: str = "random",
        level1_base: str = "level2",
    ) -> None:
        super().__init__()
        if len(widths) != 5 or list(widths) != sorted(set(widths)):
            raise ModelError(
                f"nlie_unet: widths must be five increasing numbers, found {list(widths)}"
            )
        if len(scales) != 3:
            raise ModelError(f"nlie_unet: scales must be three numbers, found {list(scales)}")
        if level1_base not in ("level2", "own"):
            raise ModelError(
                f"nlie_unet: level1_base is '{level1_base}', expected one of: level2, own"
            )
        c1, c2, c3, c4, c5 = widths
        s3, s4, s5 = scales
        self.in_channels = in_channels
        self.enc1 = double_conv(in_channels, c1)
        self.enc2 = double_conv(c1, c2)
        self.enc3 = CyclicBlock(c2, c3, s3, offset_bias)
        self.enc4 = CyclicBlock(c3, c4, s4, offset_bias)
        self.enc5 = CyclicBlock(c4, c5, s5, offset_bias)
        self.neb = Bridge(tuple(widths), level1_base)
        self.dec4 = DecoderStep(c5, c4, CyclicBlock(c4, c4, s4, offset_bias))
        self.dec3 = DecoderStep(c4, c3, CyclicBlock(c3, c3, s3, offset_bias))
        self.dec2 = DecoderStep(c3, c2, double_conv(c2, c2))
        self.dec1 = DecoderStep(c2, c1, double_conv(c1, c1))
        self.head = nn.Conv2d(c1, num_classes, 1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        check_input(x_BCYX, name="nlie_unet", dims=2, in_channels=self.in_channels, divisor=16)
        levels = [self.enc1(x_BCYX)]
        for encode in (self.enc2, self.enc3, self.enc4, self.enc5):
            levels.append(encode(F.max_pool2d(levels[-1], 2)))
        *skips, deep = self.neb(levels)
        decoder = (self.dec4, self.dec3, self.dec2, self.dec1)
        # not skips.pop(): torch 2.11 traces `*skips` as a tuple
        for decode, shallow in zip(decoder, reversed(skips), strict=True):
            deep = decode(deep, skip(self, shallow))
        return self.head(deep)


def stage_of(parameter: str) -> str:
    """The rows of the specification's table; a decoder level has three."""
    first, second = parameter.split(".")[:2]
    return f"{first}.{second}" if first.startswith("dec") else first


DECODER = tuple(f"dec{level}.{part}" for level in (4, 3, 2, 1) for part in ("up", "fuse", "block"))
STAGES = ("enc1", "enc2", "enc3", "enc4", "enc5", "neb", *DECODER, "head")
# fmt: off
SIZES = {
    "t": ((8, 16, 32, 64, 128), 789_262, (
        840, 3_552, 14_837, 54_041, 190_817, 339_224,
        32_832, 39_424, 56_089, 8_224, 15_616, 15_349, 2_064, 6_784, 4_704, 520, 3_136, 1_200, 9)),
    "s": ((16, 32, 64, 128, 256), 2_711_166, (
        2_832, 14_016, 53_717, 199_673, 725_057, 1_081_136,
        131_200, 111_616, 207_865, 32_832, 39_424, 55_765, 8_224, 15_616, 18_624, 2_064, 6_784,
        4_704, 17)),
    "b": ((32, 64, 128, 256, 512), 9_953_758, (
        10_272, 55_680, 203_669, 765_881, 2_824_193, 3_773_024,
        524_544, 354_304, 798_649, 131_200, 111_616, 211_861, 32_832, 39_424, 74_112, 8_224, 15_616,
        18_624, 33)),
    "l": ((64, 128, 256, 512, 1024), 38_034_078, (
        38_976, 221_952, 792_341, 2_998_073, 11_145_089, 13_989_056,
        2_097_664, 1_232_896, 3_129_145, 524_544, 354_304, 825_109, 131_200, 111_616, 295_680,
        32_832, 39_424, 74_112, 65)),
}
# fmt: on
for _size, (_widths, _total, _counts) in SIZES.items():
    register(
        name=f"nlie_unet_{_size}",
        dims=(2,),
        in_channels=3,
        num_classes=1,
        paper_input=(256, 256),
        parameters=_total,
        divisor=16,
        stages=dict(zip(STAGES, _counts, strict=True)),
        stage_of=stage_of,
        reduced={"widths": (12, 14, 16, 18, 20), "scales": (2, 3, 4)},
        source="NLIE-UNet (dynamic neighbourhood-enhanced U-Net with interwoven fusion), released "
        "network, MIT",
        about=f"deformable blocks and a bridge across all levels; size {_size.upper()}, widths "
        f"{'-'.join(map(str, _widths))}",
    )(partial(NlieUNet, widths=_widths))
