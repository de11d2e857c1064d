"""One raw case to one stored case, the same for training and prediction: crop, normalise, resample;
and the way back.

Source: specification `datasets_3d`, section 6.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import ndimage

from segfleet.core.errors import InputError
from segfleet.core.machine import memory_budget
from segfleet.preprocess.case import Case
from segfleet.preprocess.files.faults import ALWAYS_FITS, text_of
from segfleet.preprocess.stores.manifest import Plan
from segfleet.preprocess.transforms.resample import (
    resample_image,
    resample_label,
    resample_probabilities,
)
from segfleet.preprocess.transforms.voxels import counts, draw

__all__ = [
    "along",
    "nonzero_box",
    "nonzero_mask",
    "normalise",
    "paste",
    "preprocess_case",
    "raw_resample_axis",
    "resample_axis",
    "resample_image",
    "resample_label",
    "resample_probabilities",
    "stored_grid",
]

# (start, stop) per axis, voxels of the raw grid
Crop = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
ANISOTROPIC = 3.0  # spacings further apart than this factor: one axis is resampled apart
OF_COLOURS = ("rgb_to_0_1", "imagenet", "minmax", "minmax255")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of red, green, blue
SAMPLES = 256  # foreground voxels per label and case that training may centre patches on


def preprocess_case(
    case: Case, plan: Plan, *, ignore_label: int | None = None
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Bring a raw case onto the grid and the scale of `plan`.

    Returns:
        image (C, Z, Y, X) of plan.dtype; integers are to be multiplied by plan.scale.
        label (Z, Y, X) uint8, or None if the case has none.
        facts: the fields of CaseEntry that follow from the case: shape, spacing, crop, raw_shape,
        raw_spacing, affine, voxels, foreground, has_truth; the truth itself is the case's raw
        label.

    Raises InputError if the image does not have the channels of the plan.
    """
    raw = case.image_CZYX
    if len(raw) != len(plan.normalisation):
        raise InputError(
            f"case '{case.id}': channels: found {len(raw)}, expected {len(plan.normalisation)}"
        )
    crop = tuple((0, n) for n in raw.shape[1:]) if plan.size else crop_box(raw, plan.normalisation)
    box = tuple(slice(start, stop) for start, stop in crop)
    image = raw[:, *box].transpose(0, *(1 + axis for axis in plan.transpose))
    own = along(case.geometry.spacing, plan.transpose)
    shape, spacing = stored_grid(image.shape[1:], own, plan)
    axis = resample_axis(own, plan)
    if np.dtype(plan.dtype).kind == "u":
        image = (
            _to_uint8(image)
            if shape == image.shape[1:]
            else np.rint(
                255 * resample_image(normalise(image, plan), shape, axis, plan.interpolation)
            )
        )
    else:
        image = resample_image(normalise(image, plan), shape, axis, plan.interpolation)
    image = _cast(image, plan.dtype)
    label = (
        None
        if case.label_ZYX is None
        else resample_label(
            case.label_ZYX[box].astype(np.uint8, copy=False).transpose(plan.transpose),
            shape,
            axis,
            plan.masks,
        )
    )
    description: dict[str, Any] = {
        "shape": shape,
        "spacing": spacing,
        "crop": crop,
        "raw_shape": tuple(raw.shape[1:]),
        "raw_spacing": case.geometry.spacing,
        "affine": case.geometry.affine,
    }
    if label is not None:
        turned = plan.transpose != (0, 1, 2)
        description["has_truth"] = turned or changes_grid(raw.shape[1:], crop, shape)
        description["voxels"], description["foreground"] = foreground(label, case.id, ignore_label)
    return image, None if label is None else np.ascontiguousarray(label), description


def crop_box(image_CZYX: np.ndarray, normalisation: Sequence[str]) -> Crop:
    """The box that is kept: all of a colour image, in which 0 is a colour; else the non-zero
    voxels."""
    if set(normalisation) & set(OF_COLOURS):
        return tuple((0, n) for n in image_CZYX.shape[1:])
    return nonzero_box(image_CZYX)


def nonzero_box(image_CZYX: np.ndarray) -> Crop:
    """The smallest box around voxels that are not 0 in all channels; an empty image is kept
    whole."""
    occupied = image_CZYX[0] != 0
    for channel in image_CZYX[1:]:
        occupied |= channel != 0
    box = []
    for axis in range(3):
        line = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(line):
            return tuple((0, n) for n in occupied.shape)
        box.append((int(line[0]), int(line[-1]) + 1))
    return tuple(box)


def nonzero_mask(image_CZYX: np.ndarray) -> np.ndarray:
    """(Z, Y, X) bool: voxels not 0 in all channels, and the holes they enclose (background that no
    path joins to the border)."""
    empty = ~(image_CZYX != 0).any(axis=0)
    parts, count = ndimage.label(empty)
    if not count:
        return ~empty
    outside = np.zeros(count + 1, bool)
    for axis in range(3):
        if parts.shape[axis] > 1:  # the only slice of a 2D image is no border
            for side in (0, -1):
                outside[np.unique(parts.take(side, axis=axis))] = True
    outside[0] = False
    return ~outside[parts]


def normalise(image_CZYX: np.ndarray, plan: Plan, mask_ZYX: np.ndarray | None = None) -> np.ndarray:
    """Float32 intensities as the plan says, channel by channel.

    zscore: mean 0, standard deviation 1 of the case, inside the mask if the plan wants one (found
    here if not given; 0 stays outside).
    ct: clipped to the foreground's 0.5 and 99.5 percentiles, then its mean and standard deviation
    over the data set.
    rgb_to_0_1: divided by the largest value of the integer type. imagenet: then less ImageNet's
    mean, over its deviation, of red, green and blue. rescale_to_0_1: the case's range, channel by
    channel; minmax: that of all channels together; minmax255: the same to 0 to 255.
    none: as it is.
    """
    if mask_ZYX is None and plan.nonzero_mask and "zscore" in plan.normalisation:
        mask_ZYX = nonzero_mask(image_CZYX)
    out = np.empty(image_CZYX.shape, np.float32)
    for c, (channel, kind) in enumerate(zip(image_CZYX, plan.normalisation, strict=True)):
        mask = mask_ZYX if plan.nonzero_mask and kind == "zscore" else None
        statistics: Mapping[str, float] = plan.intensity[c] if kind == "ct" else {}
        if kind.startswith("minmax"):
            statistics = {"min": float(image_CZYX.min()), "max": float(image_CZYX.max())}
        elif kind == "imagenet":
            statistics = {"mean": IMAGENET[0][c], "std": IMAGENET[1][c]}
        scale = _scale(channel, kind, statistics, mask)
        for z in range(len(channel)):  # slice by slice, for it needs memory of its own
            out[c, z] = scale(channel[z])
            if mask is not None:
                out[c, z][~mask[z]] = 0
    return out


def _scale(
    channel: np.ndarray, kind: str, statistics: Mapping[str, float], mask: np.ndarray | None
) -> Callable[[np.ndarray], np.ndarray]:
    """What `normalise` does to every voxel of a channel."""
    if kind == "zscore":
        inside = channel if mask is None else channel[mask]
        mean, std = (
            (inside.mean(dtype=np.float64), inside.std(dtype=np.float64))
            if inside.size
            else (0.0, 1.0)
        )

        def zscore(part: np.ndarray) -> np.ndarray:
            part = part.astype(np.float32)
            part -= mean
            part /= max(std, 1e-8)
            return part

        return zscore
    if kind == "ct":
        low, high, mean, std = (
            statistics["percentile_00_5"],
            statistics["percentile_99_5"],
            statistics["mean"],
            max(statistics["std"], 1e-8),
        )
        return lambda part: (np.clip(part.astype(np.float32), low, high) - mean) / std
    if kind in ("rgb_to_0_1", "imagenet"):
        white = np.float32(np.iinfo(channel.dtype).max if channel.dtype.kind in "ui" else 255)
        if kind == "rgb_to_0_1":
            return lambda part: part / white
        return lambda part: (
            (part / white - np.float32(statistics["mean"])) / np.float32(statistics["std"])
        )
    if kind.startswith("minmax"):
        low, span = statistics["min"], max(statistics["max"] - statistics["min"], 1e-8)
        top = 255 if kind == "minmax255" else 1
        return lambda part: ((part - np.float32(low)) * np.float32(top / span)).astype(np.float32)
    if kind == "rescale_to_0_1":
        low, high = float(channel.min()), float(channel.max())
        return lambda part: (part - low) / max(high - low, 1e-8)
    if kind == "none":
        return lambda part: part
    raise InputError(
        f"plan: normalisation: found '{kind}', expected zscore, ct, rgb_to_0_1, imagenet, "
        "rescale_to_0_1, minmax, minmax255 or none"
    )


def stored_grid(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], plan: Plan
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape and spacing after resampling a box of `shape` voxels to the plan's size, or else to the
    target spacing; a single slice stays one, as it is, and so does an axis whose target is 0."""
    if plan.size:
        return plan.size, tuple(
            old * n / new for n, old, new in zip(shape, spacing, plan.size, strict=True)
        )
    new_shape, new_spacing = [], []
    for n, old, target in zip(shape, spacing, plan.target_spacing, strict=True):
        new = n if n == 1 or not target else max(1, round(n * old / target))
        new_shape.append(new)
        new_spacing.append(old if new == n else target)
    return tuple(new_shape), tuple(new_spacing)


def check_room(
    case: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], plan: Plan
) -> None:
    """Raises InputError where resampling a box of `shape` voxels would not fit into this machine's
    memory: mostly a spacing that is not true."""
    grid, _ = stored_grid(shape, spacing, plan)
    if np.dtype(plan.dtype).kind == "u" and tuple(grid) == tuple(shape):
        return  # bytes are stored as they were read, for which there was room
    size = 4 * len(plan.normalisation) * math.prod(grid)
    if size <= ALWAYS_FITS or 2 * size <= (budget := memory_budget()):
        return
    sizes, target = ("x".join(f"{s:g}" for s in three) for three in (spacing, plan.target_spacing))
    raise InputError(
        f"case '{case}': spacing: found {sizes} mm, which at the plan's {target} mm makes "
        f"{'x'.join(map(str, grid))} voxels ({text_of(size)}), expected at most "
        f"{text_of(budget // 2)} on this machine. Correct the header's spacing, choose a coarser "
        "--spacing, or give the job more memory."
    )


def changes_grid(raw_shape: Sequence[int], crop: Crop, shape: Sequence[int]) -> bool:
    """Whether the stored grid is not the raw one, so that the truth is stored as well. A crop that
    is enlarged may have the old shape."""
    return tuple(shape) != tuple(raw_shape) or crop != tuple((0, n) for n in raw_shape)


def along(values: Sequence, axes: Sequence[int]) -> tuple:
    """One value per axis, in another order of axes."""
    return tuple(values[axis] for axis in axes)


def resample_axis(spacing: tuple[float, float, float], plan: Plan) -> int | None:
    """The axis to resample apart: the coarsest of an anisotropic grid, else that of the plan; none
    where two axes are as coarse. In the order of stored axes."""
    far = max(spacing) > ANISOTROPIC * min(spacing)
    return anisotropic_axis(spacing) if far else plan.anisotropic_axis


def raw_resample_axis(raw_spacing: tuple[float, float, float], plan: Plan) -> int | None:
    """As `resample_axis`, in the order of the raw grid's axes."""
    axis = resample_axis(along(raw_spacing, plan.transpose), plan)
    return None if axis is None else plan.transpose[axis]


def anisotropic_axis(spacing: Sequence[float]) -> int | None:
    """The coarsest axis of a grid that is far from isotropic; None where two are equally coarse."""
    far = max(spacing) > ANISOTROPIC * min(spacing)
    lone = sum(step == max(spacing) for step in spacing) == 1
    return int(np.argmax(spacing)) if far and lone else None


def foreground(
    label_ZYX: np.ndarray, case_id: str, ignore_label: int | None
) -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
    """Voxels per label value, and up to 256 flat indices per foreground label, drawn by a generator
    that the case's id seeds."""
    voxels = counts(label_ZYX)
    generator = np.random.default_rng(
        int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8], "little")
    )
    drawn = {}
    for value in np.flatnonzero(voxels):
        if value and value != ignore_label:
            places = draw(label_ZYX, partial(np.equal, value), SAMPLES, generator)
            drawn[int(value)] = tuple(places.tolist())
    return {int(v): int(voxels[v]) for v in np.flatnonzero(voxels)}, drawn


def paste(label_cropped: np.ndarray, crop: Crop, raw_shape: Sequence[int]) -> np.ndarray:
    """The label of the kept box back in the raw grid, background around it."""
    out = np.zeros(tuple(raw_shape), label_cropped.dtype)
    out[tuple(slice(start, stop) for start, stop in crop)] = label_cropped
    return out


def _to_uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    largest = np.iinfo(image.dtype).max if image.dtype.kind in "ui" else 255
    return np.rint(image.astype(np.float32) * (255 / largest))


def _cast(image: np.ndarray, dtype: str) -> np.ndarray:
    """Contiguous and of the stored type; what lies beyond its range is set to the border."""
    kind = np.dtype(dtype)
    if image.dtype == kind:
        return np.ascontiguousarray(image)
    limits = np.iinfo(kind) if kind.kind in "ui" else np.finfo(kind)
    out = np.empty(image.shape, kind)
    for c, z in np.ndindex(image.shape[:2]):
        out[c, z] = np.clip(image[c, z], limits.min, limits.max)
    return out
