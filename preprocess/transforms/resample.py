"""Resampling as one sparse matrix per axis: cubic splines are separable, and the matrices are made
once per pair of lengths.

It goes slab by slab, so that beside the old and the new array there is little else in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage, sparse

PADDING = 12  # voxels of edge before a spline is fitted; its influence beyond is below 1e-6
NEGLIGIBLE = 1e-6
SLAB = 2**24  # voxels made at a time
# slices of a slab: those around it that its edges need as well are resampled in plane more than
# once
THINNEST = 64


INTERPOLATIONS = ("cubic", "bilinear", "area")  # of images
MASKS = ("linear", "nearest", "nearest-exact")  # of labels


def resample_image(
    image_CZYX: np.ndarray,
    new_shape: Sequence[int],
    anisotropic_axis: int | None = None,
    interpolation: str = "cubic",
) -> np.ndarray:
    """Cubic splines along all axes but the anisotropic one, which takes the nearest slice.

    `interpolation` "bilinear": between the two nearest samples, without a filter when shrinking
    (OpenCV's INTER_LINEAR, PyTorch's bilinear). "area": the mean over the area that a new voxel
    covers along axes that shrink (OpenCV's INTER_AREA), bilinear along those that grow.

    Returns (C, *new_shape) float32, or the very array where the shape does not change. Voxel
    centres are aligned as cells of the same box. No value leaves the range of its channel:
    `skimage.transform.resize(order=3, mode="edge", clip=True, anti_aliasing=False)` gives the same.
    """
    order: int | str = {"cubic": 3, "bilinear": 1, "area": "area"}[interpolation]
    out = _resample(image_CZYX, new_shape, anisotropic_axis, order)
    if order == 3 and out is not image_CZYX:
        for channel, into in zip(image_CZYX, out, strict=True):
            np.clip(into, channel.min(), channel.max(), out=into)
    return out


def resample_probabilities(
    prob_KZYX: np.ndarray, new_shape: Sequence[int], anisotropic_axis: int | None = None
) -> np.ndarray:
    """As `resample_image`, but linear: nothing leaves [0, 1] and sums over K stay."""
    return _resample(prob_KZYX, new_shape, anisotropic_axis, 1)


def resample_label(
    label_ZYX: np.ndarray,
    new_shape: Sequence[int],
    anisotropic_axis: int | None = None,
    masks: str = "linear",
) -> np.ndarray:
    """(*new_shape) of the same dtype: the 0/1 map of every label is resampled linearly, the largest
    wins, of equals the smaller label. `masks` "nearest": voxel i is voxel floor(i old / new), as
    OpenCV and PyTorch call it; "nearest-exact": the voxel in which the new one has its centre, as
    Pillow takes it."""
    if tuple(new_shape) == label_ZYX.shape:
        return label_ZYX
    if masks != "linear":
        for axis, (old, new) in enumerate(zip(label_ZYX.shape, new_shape, strict=True)):
            if old != new:
                exact = masks == "nearest-exact" or axis == anisotropic_axis
                lines = nearest(old, new) if exact else np.arange(new) * old // new
                label_ZYX = np.take(label_ZYX, lines, axis=axis)
        return label_ZYX
    out = np.empty(tuple(new_shape), label_ZYX.dtype)
    for here, there, steps in _slabs(label_ZYX.shape, new_shape, anisotropic_axis, 1):
        part = label_ZYX[there]
        values = np.unique(part)
        out[here] = values[0]
        best = None
        for value in values if len(values) > 1 else ():
            map_ZYX = _apply(steps, (part == value)[None])[0]
            if best is None:
                best = map_ZYX
                continue
            out[here][map_ZYX > best + NEGLIGIBLE] = value
            np.maximum(best, map_ZYX, out=best)
    return out


def _resample(
    array: np.ndarray, new_shape: Sequence[int], nearest_axis: int | None, order: int | str
) -> np.ndarray:
    assert array.ndim == 4 and len(new_shape) == 3, (
        f"expected (C, Z, Y, X) and three lengths, found {array.shape} and {new_shape}"
    )
    if tuple(new_shape) == array.shape[1:]:
        return array
    out = np.empty((len(array), *new_shape), np.float32)
    for here, there, steps in _slabs(array.shape[1:], new_shape, nearest_axis, order):
        for channel, into in zip(array, out, strict=True):
            into[here] = _apply(steps, channel[None, there])[0]
    return out


# axis; the lines to take, or the matrix that makes new lines of the old
Step = tuple[int, np.ndarray | sparse.csr_array]


def _slabs(
    shape: Sequence[int], new_shape: Sequence[int], nearest_axis: int | None, order: int | str
) -> Iterator[tuple[slice, slice, list[Step]]]:
    """(slices of the new grid, slices of the old grid they depend on, what leads from these to
    those)."""
    steps: list[Step] = []
    # shrink first: less to do for the rest
    for axis in sorted(range(3), key=lambda a: new_shape[a] / shape[a]):
        old, new = shape[axis], int(new_shape[axis])
        if old != new:
            whole = axis == nearest_axis or old == 1
            steps.append((axis, nearest(old, new) if whole else operator(old, new, order)))
    widest = max(shape[1] * shape[2], new_shape[1] * new_shape[2])
    thick = max(THINNEST if any(axis == 0 for axis, _ in steps) else 1, SLAB // widest)
    for start in range(0, new_shape[0], thick):
        here = slice(start, min(start + thick, new_shape[0]))
        there, own = here, []
        for axis, how in steps:
            if axis == 0:
                lines = how[here]
                used = lines if isinstance(lines, np.ndarray) else lines.indices
                there = slice(int(used.min()), int(used.max()) + 1)
                how = lines - there.start if isinstance(lines, np.ndarray) else lines[:, there]
            own.append((axis, how))
        yield here, there, own


def _apply(steps: Sequence[Step], part_CZYX: np.ndarray) -> np.ndarray:
    out = part_CZYX
    for axis, how in steps:
        if isinstance(how, np.ndarray):
            out = np.take(out, how, axis=1 + axis)
            continue
        lines = np.moveaxis(out, 1 + axis, 0).astype(np.float32)
        rest = lines.shape[1:]
        out = np.moveaxis((how @ lines.reshape(len(lines), -1)).reshape(-1, *rest), 0, 1 + axis)
    return out.astype(np.float32, copy=False)


def nearest(old: int, new: int) -> np.ndarray:
    """For each of `new` cells the old one its centre lies in."""
    return np.minimum(np.floor((np.arange(new) + 0.5) * (old / new)).astype(np.intp), old - 1)


@lru_cache(maxsize=256)
def operator(old: int, new: int, order: int | str) -> sparse.csr_array:
    """The (new, old) matrix that interpolates a line of `old` samples at `new` cell centres; rows
    sum to 1. `order` is 1, 3 or "area"."""
    if order == "area" and new < old:
        return _area(old, new)
    if order == "area":
        order = 1
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    if order == 1:
        at = np.clip(at, 0, old - 1)
        low = np.minimum(np.floor(at).astype(np.intp), max(old - 2, 0))
        columns = np.stack([low, np.minimum(low + 1, old - 1)])
        weights = np.stack([1 - (at - low), at - low])
        rows = np.broadcast_to(np.arange(new), columns.shape)
        return sparse.csr_array(
            (weights.ravel().astype(np.float32), (rows.ravel(), columns.ravel())), shape=(new, old)
        )
    return _cubic(old, at)


def _area(old: int, new: int) -> sparse.csr_array:
    """Each new cell's mean over the old cells it covers, a partly covered one by its share."""
    edges = np.arange(new + 1) * (old / new)
    rows, columns, weights = [], [], []
    for row, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        first, last = int(np.floor(low + 1e-9)), min(int(np.ceil(high - 1e-9)), old)
        cells = np.arange(first, last)
        rows.append(np.full(len(cells), row))
        columns.append(cells)
        weights.append(np.minimum(high, cells + 1) - np.maximum(low, cells))
    values = np.concatenate(weights) * (new / old)
    places = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_array((values.astype(np.float32), places), shape=(new, old))


def _cubic(old: int, at: np.ndarray) -> sparse.csr_array:
    """Four B-spline taps on coefficients, which depend on all samples, though on far ones by less
    than can be seen."""
    padded = np.pad(np.eye(old), ((PADDING, PADDING), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(padded, order=3, axis=0, mode="mirror")
    at = np.clip(at, -1.0, old) + PADDING
    low = np.floor(at).astype(np.intp)
    t = at - low
    taps = np.stack(
        [
            (1 - t) ** 3 / 6,
            2 / 3 - t**2 + t**3 / 2,
            2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2,
            t**3 / 6,
        ]
    )
    dense = np.zeros((len(at), old))
    for k, tap in enumerate(taps):
        dense += tap[:, None] * coefficients[np.clip(low - 1 + k, 0, len(padded) - 1)]
    dense[np.abs(dense) < NEGLIGIBLE] = 0
    return sparse.csr_array((dense / dense.sum(1, keepdims=True)).astype(np.float32))
