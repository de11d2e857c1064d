"""MedNeXt: a 3D U-Net of ConvNeXt blocks, also where it halves and doubles, in four sizes and two
kernels.

Source: MedNeXt (Roy et al., MICCAI 2023, arXiv 2303.09975). A block is a depthwise convolution, a
group normalisation with one group per channel, an expansion by R, GELU and a compression, around a
residual. The counts agree with the paper's table to its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip

STAGES = 9  # four encoder stages, the bottleneck, four decoder stages
DIVISOR = 16


class Block(nn.Module):
    """(B, C, Z, Y, X) -> the same shape; `expansion` is the paper's R."""

    def __init__(self, a: int, b: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = self._depthwise(a, kernel)
        self.norm = nn.GroupNorm(a, a)
        self.expand = nn.Conv3d(a, expansion * a, 1)
        self.compress = nn.Conv3d(expansion * a, b, 1)

    @staticmethod
    def _depthwise(c: int, kernel: int) -> nn.Module:
        return nn.Conv3d(c, c, kernel, padding=kernel // 2, groups=c)

    def mixed(self, x: Tensor) -> Tensor:
        return self.compress(F.gelu(self.expand(self.norm(self.depthwise(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x)


class DownBlock(Block):
    """(B, C, ...) -> (B, 2C, half of ...): a block whose depthwise convolution strides, beside a
    strided 1 x 1 x 1 convolution."""

    def __init__(self, c: int, expansion: int, kernel: int) -> None:
        super().__init__(c, 2 * c, expansion, kernel)
        self.shortcut = nn.Conv3d(c, 2 * c, 1, stride=2)

    @staticmethod
    def _depthwise(c: int, kernel: int) -> nn.Module:
        return nn.Conv3d(c, c, kernel, stride=2, padding=kernel // 2, groups=c)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) + self.shortcut(x)


class UpBlock(Block):
    """(B, C, ...) -> (B, C/2, twice ...): the transposed twin; a plane of zeros goes before each
    axis to make the size even."""

    def __init__(self, c: int, expansion: int, kernel: int) -> None:
        super().__init__(c, c // 2, expansion, kernel)
        self.shortcut = nn.ConvTranspose3d(c, c // 2, 1, stride=2)

    @staticmethod
    def _depthwise(c: int, kernel: int) -> nn.Module:
        return nn.ConvTranspose3d(c, c, kernel, stride=2, padding=kernel // 2, groups=c)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.mixed(x) + self.shortcut(x), (1, 0) * 3)


class MedNeXt(nn.Module):
    """x (B, C, Z, Y, X), sizes multiples of 16 -> logits (B, K, Z, Y, X); in train mode with deep
    supervision five, at the full size and its halves, finest first.

    expansions, blocks: R and number of blocks of the nine stages, encoder first. kernel: 3 or 5.
    width: channels at full size. Raises ModelError for wrong options or input.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        expansions: Sequence[int],
        blocks: Sequence[int],
        kernel: int = 3,
        width: int = 32,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if len(expansions) != STAGES or len(blocks) != STAGES or min(*expansions, *blocks) < 1:
            raise ModelError(
                f"mednext: expansions and blocks need {STAGES} positive numbers each, found "
                f"{list(expansions)} and {list(blocks)}"
            )
        if kernel not in (3, 5, 7):
            raise ModelError(f"mednext: kernel is {kernel}, expected 3, 5 or 7")
        self.in_channels, self.deep_supervision = in_channels, deep_supervision

        def stage(place: int) -> nn.Sequential:
            c = width * 2 ** min(place, STAGES - 1 - place)
            return nn.Sequential(
                *(Block(c, c, expansions[place], kernel) for _ in range(blocks[place]))
            )

        self.stem = nn.Conv3d(in_channels, width, 1)
        self.encoder = nn.ModuleList(stage(place) for place in range(4))
        self.down = nn.ModuleList(
            DownBlock(width * 2**place, expansions[place + 1], kernel) for place in range(4)
        )
        self.bottleneck = stage(4)
        self.up = nn.ModuleList(
            UpBlock(width * 2 ** (4 - place), expansions[5 + place], kernel) for place in range(4)
        )
        self.decoder = nn.ModuleList(stage(5 + place) for place in range(4))
        heads = 5 if deep_supervision else 1
        self.heads = nn.ModuleList(nn.Conv3d(width * 2**k, num_classes, 1) for k in range(heads))

    def forward(self, x_BCZYX: Tensor) -> Tensor | list[Tensor]:
        check_input(x_BCZYX, name="mednext", dims=3, in_channels=self.in_channels, divisor=DIVISOR)
        if tuple(x_BCZYX.shape[2:]) == (DIVISOR,) * 3:
            raise ModelError(
                "mednext cannot normalise a deepest map of one voxel; the input must be larger "
                f"than {(DIVISOR,) * 3}"
            )
        x, skips = self.stem(x_BCZYX), []
        for encode, down in zip(self.encoder, self.down, strict=True):
            x = encode(x)
            skips.append(x)
            x = down(x)
        maps = [self.bottleneck(x)]
        for decode, up in zip(self.decoder, self.up, strict=True):
            maps.append(decode(up(maps[-1]) + skip(self, skips.pop())))
        if self.training and self.deep_supervision:
            return [head(m) for head, m in zip(self.heads, reversed(maps), strict=True)]
        return self.heads[0](maps[-1])


@torch.no_grad()
def enlarge_kernels(small: nn.Module, large: nn.Module) -> None:
    """UpKern: a network of larger kernels starts from one of smaller ones; depthwise kernels are
    interpolated trilinearly, all else is copied. Raises ModelError for networks of other shapes."""
    source, target = small.state_dict(), large.state_dict()
    if source.keys() != target.keys():
        raise ModelError("mednext: kernels can be enlarged between networks of one size only")
    for name, value in target.items():
        given = source[name]
        if given.shape[:2] != value.shape[:2]:
            raise ModelError(
                f"mednext: {name} is {tuple(given.shape)} there and {tuple(value.shape)} here"
            )
        if given.shape != value.shape:
            size = value.shape[2:]
            given = F.interpolate(given, size, mode="trilinear", align_corners=False)
        value.copy_(given)


MEDIUM = (2, 3, 4, 4, 4, 4, 4, 3, 2)
SIZES = {
    "s": ((2,) * 9, (2,) * 9),
    "b": (MEDIUM, (2,) * 9),
    "m": (MEDIUM, (3, 4, 4, 4, 4, 4, 4, 4, 3)),
    "l": ((3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3)),
}
STAGE_NAMES = (
    "stem",
    *(f"{part}.{i}" for part in ("encoder", "down") for i in range(4)),
    "bottleneck",
    *(f"{part}.{i}" for part in ("up", "decoder") for i in range(4)),
    *(f"heads.{i}" for i in range(5)),
)
# fmt: off
COUNTS = {  # one input channel, two classes, the heads of deep supervision included
    ("s", 3): (64, 10_304, 36_992, 139_520, 541_184, 9_344, 35_072, 135_680, 533_504, 2_130_944,
               934_400, 237_824, 61_568, 16_448, 541_184, 139_520, 36_992, 10_304, 66, 130, 258,
               514, 1_026),
    ("b", 3): (64, 10_304, 53_504, 271_104, 1_066_496, 12_448, 59_776, 234_240, 927_232, 4_230_144,
               1_721_856, 434_944, 86_272, 16_448, 1_066_496, 271_104, 53_504, 10_304, 66, 130, 258,
               514, 1_026),
    ("m", 3): (64, 15_456, 107_008, 542_208, 2_132_992, 12_448, 59_776, 234_240, 927_232, 8_460_288,
               1_721_856, 434_944, 86_272, 16_448, 2_132_992, 542_208, 107_008, 15_456, 66, 130,
               258, 514, 1_026),
    ("l", 3): (64, 21_696, 140_032, 2_137_088, 8_468_480, 15_552, 109_184, 431_360, 1_714_688,
               33_714_176, 3_296_768, 829_184, 110_976, 22_656, 8_468_480, 2_137_088, 140_032,
               21_696, 66, 130, 258, 514, 1_026),
    ("s", 5): (64, 16_576, 49_536, 164_608, 591_360, 12_480, 41_344, 148_224, 558_592, 2_231_296,
               984_576, 262_912, 74_112, 22_720, 591_360, 164_608, 49_536, 16_576, 66, 130, 258,
               514, 1_026),
    ("b", 5): (64, 16_576, 66_048, 296_192, 1_116_672, 15_584, 66_048, 246_784, 952_320, 4_330_496,
               1_772_032, 460_032, 98_816, 22_720, 1_116_672, 296_192, 66_048, 16_576, 66, 130, 258,
               514, 1_026),
    ("m", 5): (64, 24_864, 132_096, 592_384, 2_233_344, 15_584, 66_048, 246_784, 952_320, 8_660_992,
               1_772_032, 460_032, 98_816, 22_720, 2_233_344, 592_384, 132_096, 24_864, 66, 130,
               258, 514, 1_026),
    ("l", 5): (64, 31_104, 165_120, 2_237_440, 8_669_184, 18_688, 115_456, 443_904, 1_739_776,
               34_115_584, 3_346_944, 854_272, 123_520, 28_928, 8_669_184, 2_237_440, 165_120,
               31_104, 66, 130, 258, 514, 1_026),
}
# fmt: on


def stage_of(parameter: str) -> str:
    """`encoder.2.0.norm.weight` belongs to `encoder.2`, `stem.weight` to `stem`."""
    first, second, *_ = parameter.split(".")
    return f"{first}.{second}" if first in ("encoder", "down", "up", "decoder", "heads") else first


for (_size, _kernel), _counts in COUNTS.items():
    _expansions, _blocks = SIZES[_size]
    register(
        name=f"mednext_{_size}{_kernel}",
        dims=(3,),
        in_channels=1,
        num_classes=2,
        paper_input=(128, 128, 128),
        parameters=sum(_counts),
        divisor=DIVISOR,
        deep_supervision=True,
        stages=dict(zip(STAGE_NAMES, _counts, strict=True)),
        stage_of=stage_of,
        reduced={"width": 4, "blocks": (1,) * STAGES},
        reduced_input=(32, 32, 32),
        source="MedNeXt (Roy et al., MICCAI 2023, arXiv 2303.09975)",
        about=f"3D U-Net of ConvNeXt blocks; size {_size.upper()}, kernel {_kernel}",
    )(partial(MedNeXt, expansions=_expansions, blocks=_blocks, kernel=_kernel))
