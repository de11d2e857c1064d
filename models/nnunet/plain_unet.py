"""nnU-Net's default network: a U-Net of plain convolutions, planned from patch and spacing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from segfleet.models.nnunet.planned_unet import (
    PlannedUNet,
    conv_stack,
    per_stage,
    planned_stage_of,
    stage_names,
)
from segfleet.models.nnunet.topology import DEFAULT_PATCH, topology_from_options
from segfleet.models.registry import register


def _register(dims: int, parameters: int, stages: dict[str, int]) -> Callable[..., nn.Module]:
    name = f"plain_unet_{dims}d"

    def build(
        in_channels: int,
        num_classes: int,
        *,
        patch: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        features: Sequence[int] | None = None,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernels: Sequence[int | Sequence[int]] | None = None,
        conv_per_stage: int | Sequence[int] = 2,
        conv_per_decoder: int | Sequence[int] = 2,
        deep_supervision: bool = True,
    ) -> nn.Module:
        """See `topology_from_options` for the first five options; convolutions per stage as one
        number or one each."""
        topology = topology_from_options(
            dims=dims,
            patch=patch,
            spacing=spacing,
            features=features,
            strides=strides,
            kernels=kernels,
        )
        count = per_stage(conv_per_stage, len(topology.features), "conv_per_stage")
        return PlannedUNet(
            in_channels,
            num_classes,
            topology,
            lambda stage, a, b, kernel, stride: conv_stack(count[stage], a, b, kernel, stride),
            name=name,
            with_stem=False,
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
        reduced={"features": [8, 16, 32]},
        reduced_input=(32, 32) if dims == 2 else (16, 16, 16),
        source="Isensee et al., nnU-Net, Nature Methods 2021; specification datasets_3d, section 6",
        about=f"nnU-Net's U-Net of plain convolutions, {dims}D, planned from patch and spacing",
    )(build)


plain_unet_2d = _register(
    2,
    46_324_558,
    stage_names(
        encoder=[9_696, 55_680, 221_952, 886_272, 3_542_016, 4_721_664, 4_721_664, 4_721_664],
        decoder=[8_130_048, 8_130_048, 8_130_048, 2_295_552, 574_336, 143_808, 36_064],
        heads=[1_026, 1_026, 1_026, 514, 258, 130, 66],
    ),
)
plain_unet_3d = _register(
    3,
    31_195_594,
    stage_names(
        encoder=[28_704, 166_272, 664_320, 2_655_744, 4_978_560, 5_531_520],
        decoder=[9_115_840, 5_965_568, 1_590_144, 397_760, 99_552],
        heads=[642, 514, 258, 130, 66],
    ),
)
