"""The skeleton that nnU-Net's two U-Nets share: a planned encoder, a mirrored decoder, a head per
resolution.

Isensee et al. 2021 (nnU-Net) and 2024 (residual encoder presets). Convolutions have a bias,
instance normalisation is affine with eps 1e-5, the non-linearity is LeakyReLU 0.01, weights start
from He's normal distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import reduce
from torch import Tensor, nn

from segfleet.models.nnunet.topology import Topology
from segfleet.models.norm import InstanceNorm2d, InstanceNorm3d
from segfleet.models.registry import ModelError, check_input
from segfleet.models.skips import skip

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: InstanceNorm2d, 3: InstanceNorm3d}
SLOPE = 0.01


class AvgPool3d(nn.AvgPool3d):
    """Mean over blocks that do not overlap. PyTorch's own has no deterministic form on CUDA, though
    blocks that do not overlap need none."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return self.by_blocks(x)
        return super().forward(x)

    def by_blocks(self, x: Tensor) -> Tensor:
        depth, rows, columns = self.kernel_size
        blocks = "b c (z depth) (y rows) (x columns) -> b c z y x"
        return reduce(x, blocks, "mean", depth=depth, rows=rows, columns=columns)


POOL = {2: nn.AvgPool2d, 3: AvgPool3d}


def conv_norm(
    a: int, b: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool = True
) -> nn.Sequential:
    """Convolution ("same" padding) and affine instance normalisation."""
    dims = len(kernel)
    conv = CONV[dims](
        a, b, tuple(kernel), tuple(stride), padding=tuple(k // 2 for k in kernel), bias=bias
    )
    return nn.Sequential(conv, NORM[dims](b, affine=True))


def conv_norm_act(
    a: int, b: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool = True
) -> nn.Sequential:
    return conv_norm(a, b, kernel, stride, bias=bias).append(nn.LeakyReLU(SLOPE, inplace=True))


def conv_stack(
    count: int, a: int, b: int, kernel: Sequence[int], stride: Sequence[int]
) -> nn.Sequential:
    """`count` convolutions a -> b; the first one carries the stride."""
    ones = (1,) * len(kernel)
    return nn.Sequential(
        conv_norm_act(a, b, kernel, stride),
        *(conv_norm_act(b, b, kernel, ones) for _ in range(count - 1)),
    )


class DecoderStage(nn.Module):
    """Transposed convolution with kernel = stride, then convolutions over [upsampled, skip]."""

    def __init__(
        self, a: int, b: int, stride: Sequence[int], kernel: Sequence[int], convs: int
    ) -> None:
        super().__init__()
        self.up = TRANSPOSED[len(stride)](a, b, tuple(stride), tuple(stride))
        self.convs = conv_stack(convs, 2 * b, b, kernel, (1,) * len(kernel))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([self.up(deep), skip], 1))


class PlannedUNet(nn.Module):
    """(B, in_channels, [Z,] Y, X) -> logits of the same size; in train mode with deep supervision a
    list, finest first, one per resolution but the deepest.

    Sizes must be multiples of `self.divisor`. Without deep supervision only the finest head exists,
    so that every parameter is used. encoder_stage(stage, a, b, kernel, stride) builds one stage of
    the encoder. `with_stem` puts a plain convolution before the first.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        topology: Topology,
        encoder_stage: Callable[[int, int, int, tuple[int, ...], tuple[int, ...]], nn.Module],
        *,
        name: str,
        with_stem: bool,
        conv_per_decoder: int | Sequence[int],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.name, self.in_channels, self.topology, self.deep_supervision = (
            name,
            in_channels,
            topology,
            deep_supervision,
        )
        self.divisor = topology.divisor
        features, kernels, strides = topology.features, topology.kernels, topology.strides
        stages = len(features)
        convs = per_stage(conv_per_decoder, stages - 1, "conv_per_decoder")

        a = in_channels
        if with_stem:
            self.stem = conv_norm_act(a, features[0], kernels[0], (1,) * topology.dims)
            a = features[0]
        self.encoder = nn.ModuleList()
        for stage, b in enumerate(features):
            self.encoder.append(encoder_stage(stage, a, b, kernels[stage], strides[stage]))
            a = b
        deepest_first = range(stages - 2, -1, -1)
        self.decoder = nn.ModuleList(
            DecoderStage(
                features[stage + 1], features[stage], strides[stage + 1], kernels[stage], convs[i]
            )
            for i, stage in enumerate(deepest_first)
        )
        heads = deepest_first if deep_supervision else [0]
        self.heads = nn.ModuleList(
            CONV[topology.dims](features[stage], num_classes, 1) for stage in heads
        )
        self.apply(_he_init)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(
            x,
            name=self.name,
            dims=self.topology.dims,
            in_channels=self.in_channels,
            divisor=self.divisor,
        )
        if tuple(x.shape[2:]) == self.divisor:
            raise ModelError(
                f"{self.name} cannot normalise a deepest map of one voxel; the input must be "
                f"larger than {self.divisor}"
            )
        if hasattr(self, "stem"):
            x = self.stem(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        outputs = []
        for level, stage in enumerate(self.decoder):
            x = stage(x, skip(self, skips.pop()))
            if self.deep_supervision and self.training:
                outputs.append(self.heads[level](x))
        return outputs[::-1] if outputs else self.heads[-1](x)


def per_stage(value: int | Sequence[int], stages: int, name: str) -> tuple[int, ...]:
    """One number for all stages, or one each. Raises ModelError otherwise."""
    values = (value,) * stages if isinstance(value, int) else tuple(value)
    if len(values) != stages or min(values) < 1:
        raise ModelError(
            f"model.options.{name}: expected {stages} positive numbers (or one for all), found "
            f"{value}"
        )
    return values


def planned_stage_of(parameter: str) -> str:
    """`encoder.2.0.conv1.weight` belongs to stage `encoder.2`, `stem.0.weight` to `stem`."""
    first, second, *_ = parameter.split(".")
    return first if first == "stem" else f"{first}.{second}"


def stage_names(**stages: Sequence[int]) -> dict[str, int]:
    """{"encoder.0": n0, "encoder.1": n1, ...} from encoder=[n0, n1, ...], and so on."""
    return {
        f"{part}.{i}": count for part, counts in stages.items() for i, count in enumerate(counts)
    }


def _he_init(module: nn.Module) -> None:
    if isinstance(module, (*CONV.values(), *TRANSPOSED.values())):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
