"""E2MISeg: a 3D hierarchical encoder of hybrid blocks, skips refined by group aggregation, three
supervised heads.

Source: E2MISeg (Jiang et al., Expert Systems with Applications 296, 2026), from the specification's
reconstruction of the released code. The weights depend on the patch size: position embeddings and
projections are as long as the token grid.
"""

from __future__ import annotations

from functools import partial
from math import gcd

import torch
from torch import Tensor, nn

from segfleet.models.e2mi_seg.attention import PairedAttention
from segfleet.models.e2mi_seg.blocks import GroupAggregation, HybridBlock, ResidualBlock
from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip

# where queries and keys come from
REVISIONS = {"2025-01": "conv", "2024-08": "tokens"}


class DecoderStep(nn.Module):
    """Transposed convolution of the deep map, plus the refined skip, then the blocks."""

    def __init__(self, a: int, b: int, factor: tuple[int, ...], blocks: nn.Module) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(a, b, factor, stride=factor, bias=False)
        self.blocks = blocks

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(self.up(deep) + skip)


class E2MISeg(nn.Module):
    """x (B, C, *patch) -> logits (B, K, *patch); in train mode with deep supervision three: at the
    patch, patch/stem and patch/(2·stem).

    patch: (Z, Y, X), multiples of 8 · (stem_depth, 4, 4). stem_depth: 1, 2 or 4. widths, depths:
    the four encoder stages;
    decoder_depth: blocks per decoder stage. base: channels at full size. projected: token
    projections of the four stages, the decoder takes the first three's. local_norm, local_residual,
    residual_blocks, projection, merge, attention_dropout: where the released variants differ.
    revision: "2025-01" takes queries and keys from the convolutional branch; "2024-08" takes them
    from the tokens and adds `local_weight` times the branch, which then has no residual of its own,
    before the last convolution (the released bytecode of BraTS has 1.1). legacy_qkvv keeps the
    released, half unused value projection (needed for the published counts), legacy_scramble its
    layout of the spatial attention. early_skip adds a hybrid block's input before its last
    convolution, as the one file of MCL's last revision does that the repository still has.
    clamp_dilation keeps dilated taps inside small grids; norm "instance" replaces the batch norm of
    the hybrid blocks. Raises ModelError for a wrong option or input.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        patch: tuple[int, ...] = (64, 128, 128),
        stem_depth: int = 2,
        widths: tuple[int, ...] = (32, 64, 128, 256),
        depths: tuple[int, ...] = (3, 3, 3, 3),
        decoder_depth: int = 3,
        base: int = 16,
        heads: int = 4,
        projected: tuple[int, ...] = (64, 64, 64, 32),
        norm: str = "batch",
        local_norm: bool = False,
        local_residual: bool = False,
        residual_blocks: int = 1,
        projection: str = "shared",
        merge: str = "concat",
        dropout: float = 0.1,
        attention_dropout: float = 0.15,
        revision: str = "2025-01",
        local_weight: float = 1.0,
        legacy_qkvv: bool = True,
        legacy_scramble: bool = False,
        early_skip: bool = False,
        clamp_dilation: bool = False,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if stem_depth not in (1, 2, 4):
            raise ModelError(f"e2mi_seg: stem_depth is {stem_depth}, expected 1, 2 or 4")
        if revision not in REVISIONS:
            raise ModelError(
                f"e2mi_seg: revision is '{revision}', expected one of: {', '.join(REVISIONS)}"
            )
        if not len(widths) == len(depths) == len(projected) == 4:
            raise ModelError(
                f"e2mi_seg: widths, depths and projected need four numbers each, found {widths}, "
                f"{depths}, {projected}"
            )
        if any(b % a for a, b in zip(widths, widths[1:], strict=False)):
            raise ModelError(
                f"e2mi_seg: each width must be a multiple of the one before, found {list(widths)}"
            )
        stem = (stem_depth, 4, 4)
        self.in_channels, self.patch, self.divisor = (
            in_channels,
            tuple(patch),
            tuple(8 * s for s in stem),
        )
        if len(patch) != 3 or any(
            size % d or size == 0 for size, d in zip(patch, self.divisor, strict=True)
        ):
            raise ModelError(
                f"e2mi_seg: patch must be three multiples of {self.divisor}, found {tuple(patch)}"
            )
        grids = [
            tuple(size // (s << level) for size, s in zip(patch, stem, strict=True))
            for level in range(4)
        ]

        attention = {
            "projection": projection,
            "merge": merge,
            "dropout": attention_dropout,
            "qk_source": REVISIONS[revision],
        }
        attention |= {"legacy_qkvv": legacy_qkvv, "legacy_scramble": legacy_scramble}
        switches = {
            "norm": norm,
            "local_norm": local_norm,
            "local_residual": local_residual and revision == "2025-01",
            "local_weight": local_weight,
            "residual_blocks": residual_blocks,
        }
        switches |= {"dropout": dropout, "attention": attention, "early_skip": early_skip}

        def blocks(level: int, depth: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    HybridBlock(widths[level], grids[level], projected[level], heads, **switches)
                    for _ in range(depth)
                )
            )

        def aggregation(
            a: int, b: int, factor: tuple[int, ...], grid: tuple[int, ...]
        ) -> GroupAggregation:
            return GroupAggregation(a, b, num_classes, factor, grid if clamp_dilation else None)

        w1, w2, w3, w4 = widths
        two = (2, 2, 2)
        self.full = ResidualBlock(in_channels, base)
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, w1, stem, stride=stem, bias=False),
            nn.GroupNorm(gcd(in_channels, w1), w1),
        )
        self.enc1 = blocks(0, depths[0])
        self.down2 = nn.Sequential(nn.Conv3d(w1, w2, 2, stride=2, bias=False), nn.GroupNorm(w1, w2))
        self.enc2 = blocks(1, depths[1])
        self.down3 = nn.Sequential(nn.Conv3d(w2, w3, 2, stride=2, bias=False), nn.GroupNorm(w2, w3))
        self.enc3 = blocks(2, depths[2])
        self.down4 = nn.Sequential(nn.Conv3d(w3, w4, 2, stride=2, bias=False), nn.GroupNorm(w3, w4))
        self.enc4 = blocks(3, depths[3])
        self.mfga0 = aggregation(w4, w3, two, grids[2])
        self.dec3 = DecoderStep(w4, w3, two, blocks(2, decoder_depth))
        self.mfga1 = aggregation(w3, w2, two, grids[1])
        self.dec2 = DecoderStep(w3, w2, two, blocks(1, decoder_depth))
        self.mfga2 = aggregation(w2, w1, two, grids[0])
        self.dec1 = DecoderStep(w2, w1, two, blocks(0, decoder_depth))
        self.mfga3 = aggregation(w1, base, stem, self.patch)
        self.dec0 = DecoderStep(w1, base, stem, ResidualBlock(base, base))
        self.head0 = nn.Conv3d(base, num_classes, 1)
        self.head1 = nn.Conv3d(w1, num_classes, 1) if deep_supervision else None
        self.head2 = nn.Conv3d(w2, num_classes, 1) if deep_supervision else None
        for stage in (self.enc1, self.enc2, self.enc3, self.enc4):
            stage.apply(_initialise_encoder)

    def forward(self, x_BCZYX: Tensor) -> Tensor | list[Tensor]:
        check_input(
            x_BCZYX, name="e2mi_seg", dims=3, in_channels=self.in_channels, divisor=self.divisor
        )
        if not torch.compiler.is_compiling() and tuple(x_BCZYX.shape[2:]) != self.patch:
            size = tuple(x_BCZYX.shape[2:])
            raise ModelError(
                f"e2mi_seg was built for patches of {self.patch}, found {size}; its weights fit "
                "no other (option `patch`)"
            )
        x0 = self.full(x_BCZYX)
        x1 = self.enc1(self.stem(x_BCZYX))
        x2 = self.enc2(self.down2(x1))
        x3 = self.enc3(self.down3(x2))
        x4 = self.enc4(self.down4(x3))
        d3 = self.dec3(x4, self.mfga0(x4, skip(self, x3)))
        d2 = self.dec2(d3, self.mfga1(d3, skip(self, x2)))
        d1 = self.dec1(d2, self.mfga2(d2, skip(self, x1)))
        d0 = self.dec0(d1, self.mfga3(d1, skip(self, x0)))
        if self.training and self.head1 is not None:
            return [self.head0(d0), self.head1(d1), self.head2(d2)]
        return self.head0(d0)


def _initialise_encoder(module: nn.Module) -> None:
    """As released: the encoder's linear layers start from a narrow normal, all else (the decoder's
    linear layers, every convolution) from the framework's draw."""
    if isinstance(module, PairedAttention):
        module.start_narrow()


# fmt: off
STAGES = ("full", "stem", "enc1", "down2", "enc2", "down3", "enc3", "down4", "enc4",
          "mfga0", "dec3", "mfga1", "dec2", "mfga2", "dec1", "mfga3", "dec0", "head0", "head1",
          "head2")
COUNTS = {
    "acdc": (7_360, 576, 12_809_208, 16_512, 3_923_544, 65_792, 8_620_824, 262_656, 33_288_024,
             305_772, 8_882_968, 79_404, 3_989_080, 21_516, 12_825_592, 10_492, 22_016, 68, 132,
             260),
    "brats": (8_704, 8_256, 9_788_184, 16_512, 2_975_256, 65_792, 5_901_336, 262_656, 22_474_776,
              305_772, 6_163_480, 79_404, 3_040_792, 21_516, 9_804_568, 35_068, 46_592, 68, 132,
              260),
    "mcl": (7_360, 1_088, 9_791_544, 16_512, 2_987_928, 65_792, 5_951_064, 262_656, 22_672_248,
            304_246, 6_213_208, 78_518, 3_053_464, 20_950, 9_807_928, 18_278, 30_208, 34, 66, 130),
}
SMALL = {"widths": (8, 16, 16, 32), "depths": (1, 1, 1, 1), "decoder_depth": 1, "base": 8,
         "heads": 2, "projected": (8, 8, 8, 4)}
VARIANTS = {
    "acdc": {"patch": (16, 160, 160), "stem_depth": 1, "local_norm": True, "local_residual": True,
             "residual_blocks": 2,
             "projection": "separate", "attention_dropout": 0.1},
    "brats": {"patch": (128, 128, 128), "stem_depth": 4, "projection": "shared_no_bias",
              "merge": "sum", "attention_dropout": 0.1},
    "mcl": {"patch": (64, 128, 128), "stem_depth": 2},
}
# fmt: on
for _name, _channels, _classes, _total, _about in (
    ("acdc", 1, 4, 85_131_796, "cardiac MR"),
    ("brats", 4, 4, 60_999_124, "brain tumours in four MR sequences"),
    ("mcl", 1, 2, 61_283_222, "lymphoma in PET"),
):
    _depth = VARIANTS[_name]["stem_depth"]
    register(
        name=f"e2mi_seg_{_name}",
        dims=(3,),
        in_channels=_channels,
        num_classes=_classes,
        paper_input=VARIANTS[_name]["patch"],
        parameters=_total,
        divisor=(8 * _depth, 32, 32),
        deep_supervision=True,
        fixed_patch=True,
        encoder=("full", "stem", "enc", "down"),
        head=("head", "mfga"),  # a group aggregation guesses every class's map
        stages=dict(zip(STAGES, COUNTS[_name], strict=True)),
        reduced=SMALL | {"patch": (8 * _depth, 32, 32)},
        source="E2MISeg (Jiang et al. 2026), reconstruction of the released code",
        about="hybrid convolution and paired attention, group-aggregated skips; variant for "
        f"{_about}",
    )(partial(E2MISeg, **VARIANTS[_name]))
