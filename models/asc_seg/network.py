"""ASC-Seg: adaptive structure encoding with parallel Mamba and deformable convolution, cross-scale
decoding; 0.22 M parameters, 2D.

Source: specification `asc_seg` (repository ILoveBSPC/ASC-Seg, 2025). The published parameter count,
0.2187 M, misses Mamba's and the deformable convolutions' weights. Its training sums the losses of
the four heads: deep supervision weights [1, 1, 1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from segfleet.models.asc_seg.decoder import Connector, DecoderBlock, enlarge
from segfleet.models.asc_seg.encoder import EncoderBlock, conv
from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip

WIDTHS = (8, 16, 24, 32)
DIVISOR = 16  # level 4 is at an eighth, and its decoder halves it once more


class AscSeg(nn.Module):
    """(B, in_channels, Y, X) -> logits (B, num_classes, Y, X); in training with deep supervision
    the four heads' logits, level 1 first, all at full size. Y and X multiples of 16. Raises
    ModelError for another shape, and for training on a batch of one sample.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        mixer: str,
        deep_supervision: bool,
        zero_offsets: bool,
        gate_norm: str,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or any(width <= 0 or width % 8 for width in widths):
            raise ModelError(
                f"model.options.widths: found {list(widths)}, expected four multiples of 8, as in "
                f"{list(WIDTHS)}"
            )
        if gate_norm not in ("batch", "group"):
            raise ModelError(
                f"model.options.gate_norm: found '{gate_norm}', expected one of: batch, group"
            )
        self.in_channels, self.deep_supervision = in_channels, deep_supervision
        inputs = (in_channels, *widths)
        for level, (a, c) in enumerate(zip(inputs, widths, strict=False), 1):
            self.add_module(
                f"encoder{level}", EncoderBlock(a, c, mixer=mixer, zero_offsets=zero_offsets)
            )
        for level in (4, 3, 2, 1):
            if level < 4:
                self.add_module(f"connect{level}", Connector(widths[level], widths[level - 1]))
            self.add_module(f"decoder{level}", DecoderBlock(widths[level - 1], gate_norm))
        for level in range(1, 5 if deep_supervision else 2):
            self.add_module(f"head{level}", conv(widths[level - 1], num_classes))

    def forward(self, x_BCYX: Tensor) -> Tensor | list[Tensor]:
        check_input(x_BCYX, name="asc_seg", dims=2, in_channels=self.in_channels, divisor=DIVISOR)
        e1 = self.encoder1(x_BCYX)
        e2 = self.encoder2(F.max_pool2d(e1, 2))
        e3 = self.encoder3(F.max_pool2d(e2, 2))
        e4 = self.encoder4(F.max_pool2d(e3, 2))
        d4 = self.decoder4(e4)
        d3 = self.decoder3(self.connect3(d4, skip(self, e3)))
        d2 = self.decoder2(self.connect2(d3, skip(self, e2)))
        d1 = self.decoder1(self.connect1(d2, skip(self, e1)))
        if not (self.training and self.deep_supervision):
            return self.head1(d1)
        heads = (self.head1(d1), self.head2(d2), self.head3(d3), self.head4(d4))
        return [enlarge(head, 2**level) for level, head in enumerate(heads)]


PER_LEVEL = {  # parameters, levels 1 to 4
    "encoder.ipcb": (1_888, 8_976, 24_792, 48_160),
    "encoder.pmb": (884, 2_200, 3_948, 6_128),
    "encoder.dcb": (1_598, 3_398, 5_454, 7_766),
    "decoder.msfa": (3_024, 11_040, 24_048, 42_048),
    "decoder.dfb": (1_120, 2_752, 4_896, 7_552),
    "decoder.sab": (299, 747, 1_451, 2_411),
    "decoder.cab": (176, 608, 1_296, 2_240),
    "connect": (152, 432, 840),
    "head": (9, 17, 25, 33),
}


def _stages(per_level: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """{"encoder.pmb": (884, ...)} -> {"encoder1.pmb": 884, ...}."""
    stages: dict[str, int] = {}
    for name, counts in per_level.items():
        room, dot, block = name.partition(".")
        stages |= {f"{room}{level}{dot}{block}": count for level, count in enumerate(counts, 1)}
    return stages


def _stage_of(parameter: str) -> str:
    """The block within an encoder or decoder; connectors and heads as a whole."""
    room, block = parameter.split(".")[:2]
    return f"{room}.{block}" if room.startswith(("encoder", "decoder")) else room


COMMON = {
    "dims": (2,),
    "in_channels": 3,
    "num_classes": 1,
    "paper_input": (256, 256),
    "divisor": DIVISOR,
    "deep_supervision": True,
    "stage_of": _stage_of,
    "reduced": {"widths": (8, 8, 8, 8)},
    "source": "ASC-Seg (ILoveBSPC/ASC-Seg, 2025), specification asc_seg",
}


@register(
    name="asc_seg",
    parameters=222_408,
    stages=_stages(PER_LEVEL),
    about="Light encoder of Mamba and deformable convolution at full resolution, cross-scale "
    "noise suppressing decoder",
    **COMMON,
)
def asc_seg(
    in_channels: int,
    num_classes: int,
    *,
    widths: Sequence[int] = WIDTHS,
    deep_supervision: bool = True,
    zero_offsets: bool = False,
    gate_norm: str = "batch",
) -> nn.Module:
    """`zero_offsets`: deformable convolutions start as plain ones; `gate_norm`: "group" allows
    training on single samples."""
    options = {
        "widths": widths,
        "deep_supervision": deep_supervision,
        "zero_offsets": zero_offsets,
        "gate_norm": gate_norm,
    }
    return AscSeg(in_channels, num_classes, mixer="mamba", **options)


@register(
    name="asc_seg_nomamba",
    parameters=222_128,
    stages=_stages(PER_LEVEL | {"encoder.pmb": (856, 2_144, 3_864, 6_016)}),
    about="ASC-Seg with a gated 7×7 depthwise convolution in the place of Mamba: 0.13 % fewer "
    "parameters, no scan",
    **COMMON,
)
def asc_seg_nomamba(
    in_channels: int,
    num_classes: int,
    *,
    widths: Sequence[int] = WIDTHS,
    deep_supervision: bool = True,
    zero_offsets: bool = False,
    gate_norm: str = "batch",
) -> nn.Module:
    """Options as of `asc_seg`."""
    options = {
        "widths": widths,
        "deep_supervision": deep_supervision,
        "zero_offsets": zero_offsets,
        "gate_norm": gate_norm,
    }
    return AscSeg(in_channels, num_classes, mixer="gated_conv", **options)
