"""How deep a planned U-Net is: which axes are halved when, which kernels are flat, how many
features each stage has.

Source: the nnU-Net v2 planner, specification `datasets_3d`, section 6. Pure functions, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from segfleet.models.registry import ModelError

MAX_FEATURES = {2: 512, 3: 320}
DEFAULT_PATCH = {2: (512, 512), 3: (128, 128, 128)}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The stages of an encoder, finest first; the decoder mirrors it. Axes in array order ([Z,] Y,
    X)."""

    # of each stage's first convolution; the first stage keeps the size
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]

    def __post_init__(self) -> None:
        if len({len(self.strides), len(self.kernels), len(self.features)}) > 1:
            raise ModelError(
                "model.options: strides, kernels and features must have one entry per stage, found "
                f"{len(self.strides)}, {len(self.kernels)} and {len(self.features)} entries"
            )
        if len(self.features) < 2:
            raise ModelError(
                f"model.options: a U-Net needs at least 2 stages, found {len(self.features)}"
            )
        if any(k % 2 == 0 for kernel in self.kernels for k in kernel):
            raise ModelError(f"model.options.kernels: expected odd sizes, found {self.kernels}")
        if min(self.features) < 1 or min(s for stride in self.strides for s in stride) < 1:
            raise ModelError(
                f"model.options: features and strides must be positive, found {self.features} and "
                f"{self.strides}"
            )

    @property
    def dims(self) -> int:
        return len(self.strides[0])

    @property
    def divisor(self) -> tuple[int, ...]:
        """The input's size along each axis must be a multiple of this."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))

    def padded(self, patch: Sequence[int]) -> tuple[int, ...]:
        """The smallest legal size that holds `patch`."""
        return tuple(d * math.ceil(size / d) for size, d in zip(patch, self.divisor, strict=True))


def doubling_features(stages: int, dims: int, *, first: int = 32) -> tuple[int, ...]:
    """32, 64, 128, ... capped at 320 (3D) or 512 (2D)."""
    return tuple(min(first * 2**stage, MAX_FEATURES[dims]) for stage in range(stages))


def topology_from_plan(
    patch: Sequence[int], spacing: Sequence[float], *, first_features: int = 32, min_size: int = 4
) -> Topology:
    """Halve and widen a patch as nnU-Net does.

    patch: voxels per axis, the coarsest axis first by custom. spacing: mm per voxel, same axes.
    Every axis is halved that keeps at least `min_size` voxels and whose spacing is less than twice
    the finest among those; a lone axis only down to 1.5 `min_size`. A kernel is 1 along an axis
    until that axis' spacing is less than twice the finest of all, then 3 for good; the deepest
    stage always has kernel 3.
    """
    if len(patch) != len(spacing) or len(patch) not in (2, 3):
        raise ModelError(
            "model.options: patch and spacing must both have 2 or 3 numbers, found "
            f"{tuple(patch)} and {tuple(spacing)}"
        )
    if min(patch) < 1 or min(spacing) <= 0:
        raise ModelError(
            f"model.options: patch and spacing must be positive, found {tuple(patch)} and "
            f"{tuple(spacing)}"
        )
    dims, size, mm = len(patch), list(patch), [float(s) for s in spacing]
    kernel, kernels, strides = [1] * dims, [], [(1,) * dims]
    while axes := _axes_to_halve(size, mm, min_size):
        kernel = [3 if k == 3 or mm[axis] < 2 * min(mm) else 1 for axis, k in enumerate(kernel)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(dims)))
        for axis in axes:
            size[axis], mm[axis] = math.ceil(size[axis] / 2), 2 * mm[axis]
    if not kernels:
        raise ModelError(
            f"model.options.patch: {tuple(patch)} is too small to be halved; at least one axis "
            f"needs {2 * min_size} voxels"
        )
    kernels.append((3,) * dims)
    features = doubling_features(len(strides), dims, first=first_features)
    return Topology(strides=tuple(strides), kernels=tuple(kernels), features=features)


def _axes_to_halve(size: Sequence[int], mm: Sequence[float], min_size: int) -> list[int]:
    large = [axis for axis, voxels in enumerate(size) if voxels >= 2 * min_size]
    finest = min((mm[axis] for axis in large), default=math.inf)
    axes = [axis for axis in large if mm[axis] < 2 * finest]
    return [] if len(axes) == 1 and size[axes[0]] < 3 * min_size else axes


def topology_from_options(
    *,
    dims: int,
    patch: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    features: Sequence[int] | None = None,
    strides: Sequence[int | Sequence[int]] | None = None,
    kernels: Sequence[int | Sequence[int]] | None = None,
) -> Topology:
    """The topology that a recipe's `model.options` ask for: given strides as they are, otherwise
    planned from patch and spacing.

    Fewer `features` than planned stages end the network earlier. Raises ModelError when the options
    contradict each other, or when a `patch` was given that is not a multiple of the strides'
    product (then naming the next larger legal patch).
    """
    patch_given, patch = patch is not None, tuple(patch or DEFAULT_PATCH[dims])
    spacing = tuple(spacing or (1.0,) * dims)
    if len(patch) != dims:
        raise ModelError(
            f"model.options.patch: a {dims}D network needs {dims} numbers, found {patch}"
        )
    if strides is None:
        planned = topology_from_plan(patch, spacing)
        count = len(planned.strides if features is None else features)
        if count > len(planned.strides):
            raise ModelError(
                f"model.options.features: found {count} stages, but a patch of {patch} at spacing "
                f"{spacing} allows "
                f"{len(planned.strides)}; give fewer features, a larger patch, or the strides"
            )
        planned = replace(
            planned,
            strides=planned.strides[:count],
            kernels=planned.kernels[:count],
            features=planned.features[:count],
        )
    else:
        every = tuple(_per_axis(s, dims, "strides") for s in strides)
        planned = Topology(
            strides=every,
            kernels=((3,) * dims,) * len(every),
            features=doubling_features(len(every), dims),
        )
    if features is not None:
        planned = replace(planned, features=tuple(int(f) for f in features))
    if kernels is not None:
        planned = replace(planned, kernels=tuple(_per_axis(k, dims, "kernels") for k in kernels))
    if patch_given and planned.padded(patch) != patch:
        raise ModelError(
            f"model.options.patch: found {patch}, but this network halves it to pieces and needs "
            f"multiples of {planned.divisor}; "
            f"the next larger patch is {planned.padded(patch)}"
        )
    return planned


def _per_axis(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ModelError(
            f"model.options.{name}: a {dims}D network needs {dims} numbers per stage, found "
            f"{values}"
        )
    return values
