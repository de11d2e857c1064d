"""From a fingerprint to a plan: target spacing, patch, normalisation. Pure functions.

Source: specification `datasets_3d`, section 6 (the nnU-Net v2 planner).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError, check_one_of
from segfleet.preprocess.planning.fingerprint import Fingerprint
from segfleet.preprocess.stores.manifest import Dataset, Plan, load_manifest
from segfleet.preprocess.transforms.case_transforms import (
    ANISOTROPIC,
    OF_COLOURS,
    along,
    anisotropic_axis,
    stored_grid,
)
from segfleet.preprocess.transforms.resample import INTERPOLATIONS, MASKS

MIN_EDGE = 4  # voxels at the bottom of the network
FEATURES = 32  # of the first stage
MAX_FEATURES = {2: 512, 3: 320}
START_EDGE = {2: 2048, 3: 256}  # of the patch before it is clipped to the median case
FEATURE_MAPS = {2: 8.5e7, 3: 5.6e8}  # of a sample, where a batch of the next line fills the memory
REFERENCE_BATCH = {2: 12, 3: 2}
REFERENCE_MEMORY = 8.0  # GB
SMALLEST_BATCH = 2
COVERED = 0.05  # share of the data set's voxels that a batch may hold
COLOURS = ("r", "g", "b", "red", "green", "blue", "rgb_to_0_1")
NORMALISATIONS = ("zscore", "rescale_to_0_1", *OF_COLOURS, "none")  # a user may ask for
LARGEST_EDGE = 8192  # anybody asks for
HALF_EXACT = 2048  # float16 holds integers up to here


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What the user decides instead of the planner. Numbers are in array order: (z, y, x) in 3D,
    (y, x) in 2D."""

    size: tuple[int, ...] | None = None  # pixels every image is resized to; 2D only
    patch: tuple[int, ...] | None = None  # voxels of the stored grid, slice axis first
    spacing: tuple[float, ...] | None = None  # mm, in the order of the raw grid's axes
    slices: bool = False  # a 3D data set for 2D networks: nothing is resampled across slices
    interpolation: str | None = None  # of images that are resampled; see `resample_image`
    masks: str | None = None  # how labels are resampled; see `resample_label`
    normalisation: str | None = None  # of every channel; see `normalise`
    like: str | None = None  # a store whose plan is taken as it is, as of a test set

    def check(self, dataset: Dataset) -> None:
        """Raises InputError that names the option, what was found and what is legal."""
        if self.like:
            self._check_like(dataset)
        axes = "z y x" if dataset.dims == 3 else "y x"
        if self.size is not None and dataset.dims == 3:
            raise InputError(
                f"size: found {_text(self.size)}, but {dataset.name} is 3D. Use --spacing, and "
                "--patch for what is trained on."
            )
        if self.size is not None and self.spacing is not None:
            raise InputError(
                "size, spacing: found both, expected one: a fixed size leaves no choice of spacing."
            )
        if self.slices and dataset.dims == 2:
            raise InputError(f"slices: {dataset.name} is 2D: its images are slices already.")
        if self.slices and self.patch and self.patch[0] != 1:
            raise InputError(
                f"patch: found {_text(self.patch)}, expected one slice (1 y x) with --slices"
            )
        for name, value, low, high in (
            ("size", self.size, MIN_EDGE, LARGEST_EDGE),
            ("patch", self.patch, MIN_EDGE if dataset.dims == 2 else 1, LARGEST_EDGE),
            ("spacing", self.spacing, 0.01, 100),
        ):
            if value is not None and (
                len(value) != dataset.dims or not all(low <= v <= high for v in value)
            ):
                expected = (
                    f"{dataset.dims} numbers ({axes}) from {low} to {high}, as {dataset.name} is "
                    f"{dataset.dims}D"
                )
                raise InputError(f"{name}: found {_text(value)}, expected {expected}")

        for name, value, legal in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("masks", self.masks, MASKS),
            ("normalisation", self.normalisation, NORMALISATIONS),
        ):
            if value is not None:
                check_one_of(name, value, legal)
        if self.normalisation in OF_COLOURS:
            if dataset.dims != 2:
                raise InputError(
                    f"normalisation: found '{self.normalisation}', which is for pictures, but "
                    f"{dataset.name} is 3D; expected one of: zscore, rescale_to_0_1, none"
                )
            if self.normalisation == "imagenet" and len(dataset.channels) != 3:
                raise InputError(
                    "normalisation: found 'imagenet', which has numbers for red, green and blue, "
                    f"but {dataset.name} has {len(dataset.channels)} channel(s)"
                )

    def _check_like(self, dataset: Dataset) -> None:
        if other := [f.name for f in fields(self) if f.name != "like" and getattr(self, f.name)]:
            raise InputError(
                f"like: found --{other[0]} beside it, but the plan of {self.like} is taken as it is"
            )
        pattern = load_manifest(Path(self.like)).dataset
        own, there = ((d.dims, len(d.channels)) for d in (dataset, pattern))
        if own != there:
            raise InputError(
                f"like: {self.like} is {there[0]}D with {there[1]} channel(s), but {dataset.name} "
                f"is {own[0]}D with {own[1]}"
            )

    def padded(self, name: str, filler: float) -> tuple | None:
        """An option as (z, y, x)."""
        value = getattr(self, name)
        return None if value is None else (*(filler,) * (3 - len(value)), *value)


def make_plan(
    dataset: Dataset,
    fingerprint: Fingerprint,
    memory_gb: float = REFERENCE_MEMORY,
    overrides: Overrides | None = None,
) -> Plan:
    """The plan for a data set on a device with `memory_gb` GB. Raises
    InputError for impossible overrides."""
    wish = overrides or Overrides()
    wish.check(dataset)
    if wish.like:
        return load_manifest(Path(wish.like)).plan
    kinds = normalisation(dataset)
    if wish.normalisation:
        kinds = (wish.normalisation,) * len(kinds)
    size = wish.padded("size", 1)
    spacing = target_spacing(fingerprint.spacings, fingerprint.shapes)
    spacing = wish.padded("spacing", spacing[0]) or spacing
    axes = coarsest_first(spacing) if dataset.dims == 3 else (0, 1, 2)
    spacing = along(spacing, axes)
    if wish.slices:
        spacing = (0.0, *spacing[1:])
    draft = Plan(
        target_spacing=spacing, patch=(1, 1, 1), normalisation=kinds, size=size, transpose=axes
    )
    shapes = [along(shape, axes) for shape in fingerprint.shapes]
    grids = [
        stored_grid(shape, along(own, axes), draft)[0]
        for shape, own in zip(shapes, fingerprint.spacings, strict=True)
    ]
    median = tuple(float(n) for n in np.median(grids, axis=0))
    untouched = all(kind == "rgb_to_0_1" for kind in kinds) and set(fingerprint.dtypes) == {"uint8"}
    untouched &= size is not None or grids == shapes
    largest = max(
        (abs(channel.get(end, 0.0)) for channel in fingerprint.intensity for end in ("min", "max")),
        default=0.0,
    )
    dtype = (
        "uint8"
        if untouched
        else "float32"
        if ("none" in kinds and largest > HALF_EXACT) or "minmax255" in kinds
        else "float16"
    )
    dims = 2 if wish.slices else dataset.dims
    chosen = wish.padded("patch", 1) or size
    (patch, batch), (patch_2d, batch_2d) = (
        plan_network(
            median,
            spacing,
            dims_of,
            outputs(dataset),
            memory_gb,
            voxels=math.prod(median) * len(grids),
            patch=chosen if dims_of == dims else None,
        )
        for dims_of in (dims, 2)
    )
    return Plan(
        target_spacing=spacing,
        transpose=axes,
        patch=patch,
        batch=batch,
        patch_2d=patch_2d,
        batch_2d=batch_2d,
        normalisation=kinds,
        intensity=fingerprint.intensity,
        nonzero_mask=fingerprint.kept < 0.75 and "zscore" in kinds,
        anisotropic_axis=anisotropic_axis(spacing) if dims == 3 else None,
        median_shape=tuple(int(n) for n in median),
        dtype=dtype,
        scale=1 / 255 if untouched else 1.0,
        size=size,
        interpolation=wish.interpolation or "cubic",
        masks=wish.masks or "linear",
    )


def coarsest_first(spacing: Sequence[float]) -> tuple[int, int, int]:
    """The raw grid's axes in the order they are stored: the coarsest, along which slices are
    stacked, then the others as they are."""
    first = int(np.argmax(spacing))
    return (first, *(axis for axis in range(3) if axis != first))


def normalisation(dataset: Dataset) -> tuple[str, ...]:
    """How each channel is normalised, from its name; colours only in 2D."""
    kinds = []
    for name in (channel.strip().lower() for channel in dataset.channels):
        if name == "ct":
            kinds.append("ct")
        elif name in ("nonorm", "none"):
            kinds.append("none")
        elif name == "rescale_to_0_1":
            kinds.append(name)
        elif name in COLOURS and (dataset.dims == 2 or name == "rgb_to_0_1"):
            kinds.append("rgb_to_0_1")
        else:
            kinds.append("zscore")
    return tuple(kinds)


def outputs(dataset: Dataset) -> int:
    """Outputs a network for this data set is planned with: nnU-Net counts background and what is
    ignored."""
    targets = len(dataset.regions) + 1 if dataset.regions else len(dataset.labels)
    return targets + (dataset.ignore_label is not None)


def target_spacing(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]
) -> tuple[float, float, float]:
    """Median per axis (mm). A far coarser axis with few slices takes its 10th percentile, but not
    finer than the other axes."""
    target = np.median(spacings, axis=0)
    sizes = np.median(shapes, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    far = target[coarse] > ANISOTROPIC * target[others].max()
    if far and sizes[coarse] * ANISOTROPIC < sizes[others].min():
        low, finest = np.percentile([s[coarse] for s in spacings], 10), target[others].max()
        # a hair coarser than the others, so that it stays the slice axis
        target[coarse] = low if low >= finest else finest + 1e-5
    return tuple(float(round(t, 6)) for t in target)


def plan_network(
    median_shape: Sequence[float],
    spacing: Sequence[float],
    dims: int,
    classes: int,
    memory_gb: float = REFERENCE_MEMORY,
    *,
    voxels: float,
    patch: tuple[int, int, int] | None = None,
) -> tuple[tuple[int, int, int], int]:
    """Patch (z, y, x) in voxels and batch: as many patches as the memory holds, though not more
    than a twentieth of the data set's `voxels`, and two at least. A given patch is kept."""
    patch = patch or plan_patch(median_shape, spacing, dims, classes, memory_gb)
    need = feature_maps(patch[3 - dims :], spacing[3 - dims :], dims, classes)
    budget = FEATURE_MAPS[dims] * memory_gb / REFERENCE_MEMORY
    fits, most = budget / need * REFERENCE_BATCH[dims], COVERED * voxels / math.prod(patch)
    return patch, max(min(round(fits), round(most)), SMALLEST_BATCH)


def plan_patch(
    median_shape: Sequence[float],
    spacing: Sequence[float],
    dims: int,
    classes: int,
    memory_gb: float = REFERENCE_MEMORY,
) -> tuple[int, int, int]:
    """Patch (z, y, x) in voxels: isotropic in mm, inside the median case, divisible as often as it
    is pooled, two of them within the memory."""
    axes = [0, 1, 2] if dims == 3 else [1, 2]
    size = np.array([median_shape[a] for a in axes], float)
    step = np.array([spacing[a] for a in axes], float)
    fine = 1 / step
    edge = np.rint(fine * (START_EDGE[dims] ** dims / np.prod(fine)) ** (1 / dims))
    patch, pools = _divisible(np.minimum(np.maximum(edge, 1), size), step)
    budget = FEATURE_MAPS[dims] * memory_gb / REFERENCE_MEMORY
    while feature_maps(patch, step, dims, classes) / REFERENCE_BATCH[dims] * 2 > budget:
        # the axis longest against the median case; of equals the last
        axis = max(range(dims), key=lambda a: (patch[a] / size[a], a))
        smaller = patch.astype(float)
        smaller[axis] -= 2 ** pools[axis]
        # With less to halve the steps are finer: 224 may lie between 256 and 192.
        unit = 2 ** poolings(smaller, step)[axis]
        if patch[axis] - unit < 1:
            break
        smaller[axis] = patch[axis] - unit
        patch, pools = _divisible(smaller, step)
    return tuple([1] * (3 - dims) + [int(n) for n in patch])


def poolings(patch: Sequence[float], spacing: Sequence[float]) -> list[int]:
    """How often each axis is halved: while it has 8 voxels and its spacing is within a factor 2 of
    the finest such axis."""
    size, step, pools = np.array(patch, float), np.array(spacing, float), [0] * len(patch)
    while True:
        able = [a for a in range(len(size)) if size[a] >= 2 * MIN_EDGE]
        able = [a for a in able if step[a] < 2 * min(step[b] for b in able)]
        if not able or len(able) == 1 and size[able[0]] < 3 * MIN_EDGE:
            return pools
        for a in able:
            pools[a] += 1
            size[a], step[a] = math.ceil(size[a] / 2), 2 * step[a]


def _divisible(patch: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The patch padded until every pooling divides it, and the poolings."""
    pools = poolings(patch, spacing)
    return np.array(
        [math.ceil(n / 2**p) * 2**p for n, p in zip(patch, pools, strict=True)], int
    ), pools


def feature_maps(patch: Sequence[int], spacing: Sequence[float], dims: int, classes: int) -> float:
    """Values a U-Net on `patch` holds per sample: two convolutions per stage down and up, the way
    up's input, and the finest output, as nnU-Net counts them."""
    size, step, total, stage = np.array(patch, float), np.array(spacing, float), 0.0, 0
    pools = poolings(patch, spacing)
    while True:
        features = min(FEATURES * 2**stage, MAX_FEATURES[dims])
        bottom = stage == max(pools)
        total += size.prod() * (
            2 * features if bottom else 5 * features + (classes if stage == 0 else 0)
        )
        if bottom:
            return total
        able = [a for a in range(len(size)) if size[a] >= 2 * MIN_EDGE]
        for a in [a for a in able if step[a] < 2 * min(step[b] for b in able)]:
            size[a], step[a] = math.ceil(size[a] / 2), 2 * step[a]
        stage += 1


def _text(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
