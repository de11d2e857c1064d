"""U-NetLite: the 2D U-Net in seven weights, from the standard one (31 M parameters) to an
ultra-light grouped one (0.24 M).

Source: specification `unet_lite` (tapjason/U-NetLite). The variants differ only in the block that
fills the common skeleton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip


def standard_block(a: int, mid: int, b: int) -> nn.Sequential:
    """(Conv 3 - BN - ReLU) x 2, a -> mid -> b channels."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((a, mid), (mid, b)):
        layers += [
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def light_block(a: int, mid: int, b: int, groups: int = 1) -> nn.Sequential:
    """(depthwise 3 - pointwise - BN - ReLU) x 2; the pointwise convolutions in `groups` groups,
    without channel shuffle."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((a, mid), (mid, b)):
        layers += [
            nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
            nn.Conv2d(c_in, c_out, 1, groups=groups, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Weights each of c channels by a sigmoid of all channel means; 2 c^2 / reduction
    parameters."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        if channels % reduction:
            raise ModelError(
                f"model.options: squeeze-excitation divides the width by {reduction}, found "
                f"{channels}; give a multiple"
            )
        self.gate = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return x_BCYX * self.gate(x_BCYX.mean((2, 3)))[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weights each pixel by a sigmoid of a 7 x 7 convolution over the channel mean and the channel
    maximum; 98 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        pooled = torch.cat([x_BCYX.mean(1, keepdim=True), x_BCYX.amax(1, keepdim=True)], 1)
        return x_BCYX * torch.sigmoid(self.conv(pooled))


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a variant fills a stage of the skeleton."""

    light: bool = False
    groups: int = 1  # of the pointwise convolutions, the first block excepted
    reduction: int = 0  # squeeze-excitation after the block when > 0
    spatial: bool = False  # spatial attention after each encoder stage but the deepest

    def __call__(
        self, a: int, b: int, *, mid: int | None = None, first: bool = False, attend: bool = False
    ) -> nn.Sequential:
        if self.light:
            groups = 1 if first else self.groups
            if any(channels % groups for channels in (a, mid or b, b)):
                raise ModelError(
                    f"model.options.width: {a} -> {b} channels do not split in {groups} groups; "
                    f"give a multiple of {groups}"
                )
            block = light_block(a, mid or b, b, groups)
        else:
            block = standard_block(a, mid or b, b)
        if self.reduction:
            block.append(SqueezeExcitation(b, self.reduction))
        if self.spatial and attend:
            block.append(SpatialAttention())
        return block


class Up(nn.Module):
    """Doubles the deep map, zero-pads it to the skip's size (left and top get the smaller half),
    joins [skip, up], one block."""

    def __init__(self, a: int, b: int, blocks: Blocks, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.block = blocks(a, b, mid=a // 2)
        else:
            self.up = nn.ConvTranspose2d(a, a // 2, 2, stride=2)
            self.block = blocks(a, b)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        deep = self.up(deep)
        dy, dx = skip.shape[2] - deep.shape[2], skip.shape[3] - deep.shape[3]
        if dy or dx:
            deep = F.pad(deep, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))
        return self.block(torch.cat([skip, deep], 1))


class UNetLite(nn.Module):
    """(B, in_channels, Y, X) -> logits (B, num_classes, Y, X); any Y, X >= 16. Raises ModelError
    for another shape."""

    def __init__(
        self, in_channels: int, num_classes: int, *, blocks: Blocks, width: int, bilinear: bool
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ModelError(
                f"model.options.width: found {width}, expected an even number of channels of at "
                "least 2"
            )
        self.in_channels = in_channels
        w, half = width, 2 if bilinear else 1
        self.inc = blocks(in_channels, w, first=True, attend=True)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), blocks(w, 2 * w, attend=True))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), blocks(2 * w, 4 * w, attend=True))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), blocks(4 * w, 8 * w, attend=True))
        self.down4 = nn.Sequential(nn.MaxPool2d(2), blocks(8 * w, 16 * w // half))
        self.up1 = Up(16 * w, 8 * w // half, blocks, bilinear)
        self.up2 = Up(8 * w, 4 * w // half, blocks, bilinear)
        self.up3 = Up(4 * w, 2 * w // half, blocks, bilinear)
        self.up4 = Up(2 * w, w, blocks, bilinear)
        self.outc = nn.Conv2d(w, num_classes, 1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        check_input(x_BCYX, name="unet_lite", dims=2, in_channels=self.in_channels)
        if min(x_BCYX.shape[2:]) < 16:
            raise ModelError(
                "unet_lite halves its input four times and needs Y and X of at least 16, found "
                f"shape {tuple(x_BCYX.shape)}"
            )
        x1 = self.inc(x_BCYX)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(self.down4(x4), skip(self, x4))
        x = self.up2(x, skip(self, x3))
        x = self.up3(x, skip(self, x2))
        return self.outc(self.up4(x, skip(self, x1)))


def _variant(
    name: str,
    about: str,
    parameters: int,
    per_stage: tuple[int, ...],
    blocks: Blocks,
    *,
    width: int = 64,
    small: int = 16,
) -> Callable[..., nn.Module]:
    default = width

    def build(
        in_channels: int, num_classes: int, *, width: int = default, bilinear: bool = False
    ) -> nn.Module:
        return UNetLite(in_channels, num_classes, blocks=blocks, width=width, bilinear=bilinear)

    build.__doc__ = (
        f"{about}. `width`: channels of the first stage; `bilinear`: upsample by interpolation, "
        "half the deepest width."
    )
    stages = ("inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4", "outc")
    return register(
        name=f"unet_lite_{name}",
        dims=(2,),
        in_channels=3,
        num_classes=1,
        paper_input=(256, 256),
        parameters=parameters,
        stages=dict(zip(stages, per_stage, strict=True)),
        reduced={"width": small},
        encoder=("inc", "down"),
        source="U-NetLite (tapjason/U-NetLite, 2025), specification unet_lite",
        about=about,
    )(build)


unet_lite_standard = _variant(
    "standard",
    "The standard U-Net with batch normalisation",
    31_037_633,
    (38_848, 221_696, 885_760, 3_540_992, 14_159_872, 9_177_600, 2_295_040, 574_080, 143_680, 65),
    Blocks(),
    small=8,
)
unet_lite_depthwise = _variant(
    "depthwise",
    "U-Net with depthwise-separable blocks",
    5_988_252,
    (5_147, 26_816, 102_784, 402_176, 1_590_784, 2_899_968, 729_088, 184_320, 47_104, 65),
    Blocks(light=True),
    small=8,
)
unet_lite_se = _variant(
    "se",
    "U-Net with squeeze-excitation after every block",
    31_255_745,
    (39_360, 223_744, 893_952, 3_573_760, 14_290_944, 9_210_368, 2_303_232, 576_128, 144_192, 65),
    Blocks(reduction=16),
)
unet_lite_se_depthwise = _variant(
    "se_depthwise",
    "U-Net with depthwise-separable blocks and squeeze-excitation, reduction 16",
    6_206_364,
    (5_659, 28_864, 110_976, 434_944, 1_721_856, 2_932_736, 737_280, 186_368, 47_616, 65),
    Blocks(light=True, reduction=16),
)
unet_lite_se_depthwise_r32 = _variant(
    "se_depthwise_r32",
    "U-Net with depthwise-separable blocks and squeeze-excitation, reduction 32",
    6_097_308,
    (5_403, 27_840, 106_880, 418_560, 1_656_320, 2_916_352, 733_184, 185_344, 47_360, 65),
    Blocks(light=True, reduction=32),
    small=32,
)
unet_lite_spatial = _variant(
    "spatial",
    "U-Net with depthwise-separable blocks, squeeze-excitation and spatial attention in the "
    "encoder",
    6_206_756,
    (5_757, 28_962, 111_074, 435_042, 1_721_856, 2_932_736, 737_280, 186_368, 47_616, 65),
    Blocks(light=True, reduction=16, spatial=True),
)
unet_lite_ultralight = _variant(
    "ultralight",
    "U-Net of width 16 with grouped depthwise-separable blocks",
    239_676,
    (539, 944, 2_656, 8_384, 29_056, 147_456, 37_888, 9_984, 2_752, 17),
    Blocks(light=True, groups=4),
    width=16,
    small=8,
)
