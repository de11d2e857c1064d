"""REC-UNet: an attention U-Net whose blocks average two convolutions, the second under
cross-dimensional attention.

Source: REC-UNet (liver tumour segmentation) on Attention U-Net (Oktay et al. 2018) and triplet
attention (Misra et al. 2021); topology and counts from the repository's specification of the
released network.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip


def conv_bn_relu(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class PlaneGate(nn.Module):
    """Pool one axis of (B, C, Y, X) away by max and mean, and weigh the plane that is left: conv 7
    (2 -> 1), BN, sigmoid.

    The plane keeps the order of the axes, or is `turned`. The gate has size 1 along the pooled
    axis.
    """

    def __init__(self, axis: int, *, turned: bool = False) -> None:
        super().__init__()
        self.axis, self.turned = axis, turned
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        plane = torch.stack((x.amax(self.axis), x.mean(self.axis)), 1)
        gate = self.norm(self.conv(plane.mT if self.turned else plane)).sigmoid()
        return (gate.mT if self.turned else gate).squeeze(1).unsqueeze(self.axis)


class TripletAttention(nn.Module):
    """EM: `x · (A + B + S)/3` with gates over the planes channel × column, row × channel and row ×
    column."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList((PlaneGate(2), PlaneGate(3, turned=True), PlaneGate(1)))

    def forward(self, x: Tensor) -> Tensor:
        a, b, s = (gate(x) for gate in self.gates)
        return x * ((a + b + s) / 3)


class EnhancementBlock(nn.Module):
    """REM: `(x1 + EM(conv(x1)))/2` with `x1 = conv(x)`; without the residual, `EM(conv(x1))`."""

    def __init__(self, a: int, b: int, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.first, self.second = conv_bn_relu(a, b), conv_bn_relu(b, b)
        self.attention = TripletAttention()

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.first(x)
        x2 = self.attention(self.second(x1))
        return (x1 + x2) / 2 if self.residual else x2


class Calibration(nn.Module):
    """CM: gate the skip by an additive attention with the decoder map, then concatenate: gated skip
    first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.deep = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.skip = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.gate = nn.Sequential(
            nn.ReLU(), nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()
        )

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return torch.cat((skip * self.gate(self.deep(deep) + self.skip(skip)), deep), 1)


class DecoderStep(nn.Module):
    """Nearest-neighbour ×2 and a convolution, calibration of the skip, a block."""

    def __init__(self, a: int, b: int, *, residual: bool) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), *conv_bn_relu(a, b))
        self.calibrate = Calibration(b)
        self.block = EnhancementBlock(2 * b, b, residual=residual)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.calibrate(self.up(deep), skip))


class RecUNet(nn.Module):
    """x (B, C, Y, X), Y and X multiples of 16 -> logits (B, K, Y, X), made for two independent
    sigmoid channels.

    slices: "middle" (as released: of C neighbouring slices only the middle one is seen, so C must
    be odd) or "all".
    residual: average each block's two convolutions (the tumour network), or not (the "EM" variant,
    for the liver). Raises ModelError for a wrong option or input.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (64, 128, 256, 512, 1024),
        slices: str = "middle",
        residual: bool = True,
    ) -> None:
        super().__init__()
        if slices not in ("middle", "all"):
            raise ModelError(f"rec_unet: slices is '{slices}', expected one of: middle, all")
        if slices == "middle" and in_channels % 2 == 0:
            raise ModelError(
                f"rec_unet: {in_channels} input channels have no middle slice; use an odd number "
                "or slices: all"
            )
        if len(widths) != 5 or any(width % 2 for width in widths):
            raise ModelError(f"rec_unet: widths must be five even numbers, found {list(widths)}")
        w1, w2, w3, w4, w5 = widths
        self.in_channels, self.slices = in_channels, slices
        self.e1 = EnhancementBlock(1 if slices == "middle" else in_channels, w1, residual=residual)
        self.e2 = EnhancementBlock(w1, w2, residual=residual)
        self.e3 = EnhancementBlock(w2, w3, residual=residual)
        self.e4 = EnhancementBlock(w3, w4, residual=residual)
        self.e5 = EnhancementBlock(w4, w5, residual=residual)
        self.d5 = DecoderStep(w5, w4, residual=residual)
        self.d4 = DecoderStep(w4, w3, residual=residual)
        self.d3 = DecoderStep(w3, w2, residual=residual)
        self.d2 = DecoderStep(w2, w1, residual=residual)
        self.head = nn.Conv2d(w1, num_classes, 1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        check_input(x_BCYX, name="rec_unet", dims=2, in_channels=self.in_channels, divisor=16)
        middle = self.in_channels // 2
        levels = [self.e1(x_BCYX[:, middle : middle + 1] if self.slices == "middle" else x_BCYX)]
        for encode in (self.e2, self.e3, self.e4, self.e5):
            levels.append(encode(F.max_pool2d(levels[-1], 2)))
        deep = levels.pop()
        for decode in (self.d5, self.d4, self.d3, self.d2):
            deep = decode(deep, skip(self, levels.pop()))
        return self.head(deep)


def stage_of(parameter: str) -> str:
    """The rows of the specification's table; a decoder level has three."""
    first, second = parameter.split(".")[:2]
    return f"{first}.{second}" if first.startswith("d") else first


# fmt: off
STAGES = {
    "e1": 38_124, "e2": 222_252, "e3": 886_572, "e4": 3_542_316, "e5": 14_162_220,
    "d5.up": 4_720_128, "d5.calibrate": 263_939, "d5.block": 7_081_260,
    "d4.up": 1_180_416, "d4.calibrate": 66_435, "d4.block": 1_771_308,
    "d3.up": 295_296, "d3.calibrate": 16_835, "d3.block": 443_436,
    "d2.up": 73_920, "d2.calibrate": 4_323, "d2.block": 111_276,
    "head": 130,
}
# fmt: on
for _name, _residual, _about in (
    (
        "rec_unet",
        True,
        "attention U-Net with averaged residuals and triplet attention; sees the middle of three "
        "slices",
    ),
    ("rec_unet_em", False, "rec_unet without the residual, prescribed for the liver of LiTS"),
):
    register(
        name=_name,
        dims=(2,),
        in_channels=3,
        num_classes=2,
        paper_input=(448, 448),
        parameters=34_880_186,
        divisor=16,
        stages=STAGES,
        stage_of=stage_of,
        reduced={"widths": (16, 16, 16, 16, 16)},
        encoder=("e1.", "e2.", "e3.", "e4.", "e5."),
        source="REC-UNet (residual cross-dimensional attention for liver tumours), released "
        "network",
        about=_about,
    )(partial(RecUNet, residual=_residual))
