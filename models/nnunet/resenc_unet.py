"""nnU-Net's residual-encoder U-Net, planned from patch and spacing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from segfleet.models.nnunet.planned_unet import (
    POOL,
    SLOPE,
    PlannedUNet,
    conv_norm,
    conv_norm_act,
    per_stage,
    planned_stage_of,
    stage_names,
)
from segfleet.models.nnunet.topology import DEFAULT_PATCH, topology_from_options
from segfleet.models.registry import register

DEFAULT_BLOCKS = (1, 3, 4)  # then 6 in every deeper stage: the published presets


class ResidualBlock(nn.Module):
    """ResNet-D block: two convolutions beside a shortcut of average pooling (where strided) and a 1
    x 1 convolution (where widened).

    The last normalisation starts at zero, so a fresh block is its shortcut.
    """

    def __init__(
        self, a: int, b: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.conv1 = conv_norm_act(a, b, kernel, stride, bias=bias)
        self.conv2 = conv_norm(b, b, kernel, ones, bias=bias)
        self.shortcut = nn.Sequential()
        if max(stride) > 1:
            self.shortcut.append(POOL[len(kernel)](tuple(stride), tuple(stride)))
        if a != b:
            self.shortcut.extend(conv_norm(a, b, ones, ones, bias=False))
        nn.init.zeros_(self.conv2[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.shortcut(x), SLOPE)


def residual_stage(
    blocks: int, a: int, b: int, kernel: Sequence[int], stride: Sequence[int]
) -> nn.Sequential:
    ones = (1,) * len(kernel)
    return nn.Sequential(
        ResidualBlock(a, b, kernel, stride),
        *(ResidualBlock(b, b, kernel, ones) for _ in range(blocks - 1)),
    )


def _register(dims: int, parameters: int, stages: dict[str, int]) -> Callable[..., nn.Module]:
    name = f"resenc_unet_{dims}d"

    def build(
        in_channels: int,
        num_classes: int,
        *,
        patch: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        features: Sequence[int] | None = None,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernels: Sequence[int | Sequence[int]] | None = None,
        blocks_per_stage: int | Sequence[int] | None = None,
        conv_per_decoder: int | Sequence[int] = 1,
        deep_supervision: bool = True,
    ) -> nn.Module:
        """See `topology_from_options` for the first five options; residual blocks per stage default
        to 1, 3, 4, 6, 6, ..."""
        topology = topology_from_options(
            dims=dims,
            patch=patch,
            spacing=spacing,
            features=features,
            strides=strides,
            kernels=kernels,
        )
        depth = len(topology.features)
        default = (*DEFAULT_BLOCKS, *(6,) * depth)[:depth]
        blocks = per_stage(
            default if blocks_per_stage is None else blocks_per_stage, depth, "blocks_per_stage"
        )
        return PlannedUNet(
            in_channels,
            num_classes,
            topology,
            lambda stage, a, b, kernel, stride: residual_stage(blocks[stage], a, b, kernel, stride),
            name=name,
            with_stem=True,
            conv_per_decoder=conv_per_decoder,
            deep_supervision=deep_supervision,
        )

    return register(
        name=name,
        dims=(dims,),
        in_channels=1,
        num_classes=2,
        paper_input=DEFAULT_PATCH[dims],
        parameters=parameters,
        divisor=topology_from_options(dims=dims).divisor,
        deep_supervision=True,
        stages=stages,
        stage_of=planned_stage_of,
        reduced={"features": [8, 16, 32], "blocks_per_stage": [1, 1, 2]},
        reduced_input=(32, 32) if dims == 2 else (16, 16, 16),
        source="Isensee et al., nnU-Net Revisited, MICCAI 2024; specification datasets_3d, "
        "section 6",
        about=f"nnU-Net's residual-encoder U-Net, {dims}D, planned from patch and spacing",
    )(build)


resenc_unet_2d = _register(
    2,
    140_017_038,
    {"stem": 384}
    | stage_names(
        encoder=[
            18_624,
            206_080,
            1_117_440,
            6_825_472,
            27_282_432,
            28_329_984,
            28_329_984,
            28_329_984,
        ],
        decoder=[5_769_216, 5_769_216, 5_769_216, 1_704_960, 426_496, 106_752, 26_752],
        heads=[1_026, 1_026, 1_026, 514, 258, 130, 66],
    ),
)
resenc_unet_3d = _register(
    3,
    102_349_770,
    {"stem": 960}
    | stage_names(
        encoder=[55_488, 611_584, 3_329_280, 20_391_424, 32_718_720, 33_189_120],
        decoder=[6_350_080, 4_195_328, 1_147_392, 286_976, 71_808],
        heads=[642, 514, 258, 130, 66],
    ),
)
