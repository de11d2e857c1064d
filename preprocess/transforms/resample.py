"""Resampling as one sparse matrix per axis: cubic splines are separable, and the matrices are made
once per pair of lengths.

It goes slab by slab, so that beside the old and the new array there is little else in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage, sparse

PADDING = 12  # voxels of edge before a spline is fitted; its influence beyond is below 1e-6
NEGLIGIBLE = 1e-6
SLAB = 2**24  # voxels made at a time
VOTES = 2**16  # voxels whose labels are compared at a time
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
    `skimage.transform.resize(order=3, mode="edge", clip=True, anti_aliasing=False)` gives the same,
    to some 1e-6 of the range.
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
    return _voted(label_ZYX, tuple(int(n) for n in new_shape), anisotropic_axis)


def _voted(
    label_ZYX: np.ndarray, new_shape: tuple[int, int, int], nearest_axis: int | None
) -> np.ndarray:
    """By cells: where all corners of the old cell that a new voxel lies in have one label, that is
    its label; only in the others the maps of the labels are compared."""
    lines: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for axis in _shrinking_first(label_ZYX.shape, new_shape):
        old, new = label_ZYX.shape[axis], new_shape[axis]
        if axis == nearest_axis or old == 1:
            label_ZYX = np.take(label_ZYX, nearest(old, new), axis=axis)
        else:
            lines[axis] = between(old, new)
    if not lines:
        return label_ZYX
    out = np.empty(new_shape, label_ZYX.dtype)
    thick = max(1, SLAB // (new_shape[1] * new_shape[2]))
    for start in range(0, new_shape[0], thick):
        slab, own = slice(start, min(start + thick, new_shape[0])), dict(lines)
        source = slab
        if 0 in lines:
            low, near, far = (part[slab] for part in lines[0])
            source = slice(int(low[0]), int(low[-1]) + 2)
            own[0] = (low - source.start, near, far)
        _vote_slab(np.ascontiguousarray(label_ZYX[source]), own, out[slab])
    return out


def _vote_slab(
    part_ZYX: np.ndarray,
    lines: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]],
    out: np.ndarray,
) -> None:
    mixed, chosen = _mixed(part_ZYX, lines), part_ZYX
    for axis, (low, _, _) in lines.items():
        mixed, chosen = np.take(mixed, low, axis=axis), np.take(chosen, low, axis=axis)
    out[...] = chosen
    strides = [part_ZYX.shape[1] * part_ZYX.shape[2], part_ZYX.shape[2], 1]
    corners = np.zeros((2,) * len(lines), np.intp)  # how far each lies behind the lowest
    for place, axis in enumerate(lines):
        step = [1] * len(lines)
        step[place] = 2
        corners = corners + np.array([0, strides[axis]]).reshape(step)
    voxels, flat = np.flatnonzero(mixed), part_ZYX.reshape(-1)
    for first in range(0, len(voxels), VOTES):
        some = voxels[first : first + VOTES]
        at = np.unravel_index(some, mixed.shape)
        lowest, weights = np.zeros(len(some), np.intp), []
        for axis, index in enumerate(at):
            low, near, far = lines.get(axis, (None, None, None))
            lowest += (index if low is None else low[index]) * strides[axis]
        for axis, (_, near, far) in lines.items():
            weights.append((near[at[axis]], far[at[axis]]))
        out.reshape(-1)[some] = _winner(flat[corners[..., None] + lowest], weights)


def _winner(corners: np.ndarray, weights: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Of labels (2, ..., 2, n) at the corners of n cells the one whose 0/1 map is largest in
    between."""
    candidates = np.sort(corners.reshape(-1, corners.shape[-1]), axis=0)
    chosen = best = None
    for label in candidates:
        shown = (corners == label).astype(np.float32)
        for near, far in weights:
            shown = near * shown[0] + far * shown[1]
        if best is None:
            chosen, best = label.copy(), shown
            continue
        larger = shown > best + np.float32(NEGLIGIBLE)
        chosen[larger] = label[larger]
        np.maximum(best, shown, out=best)
    return chosen


def _mixed(label_ZYX: np.ndarray, axes: Iterable[int]) -> np.ndarray:
    """Which cells between neighbours along `axes` have corners of different labels."""
    mixed = np.zeros(label_ZYX.shape, bool)
    for axis in axes:
        # what differed within the two faces, or from one to the other
        head, tail = _halves(mixed, axis)
        low, high = _halves(label_ZYX, axis)
        rest = [slice(0, n) for n in head.shape]
        mixed = head | tail | (low != high)[tuple(rest)]
        label_ZYX = low
    return mixed


def _halves(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    cut = [slice(None)] * array.ndim
    cut[axis] = slice(0, -1)
    other = list(cut)
    other[axis] = slice(1, None)
    return array[tuple(cut)], array[tuple(other)]


def _resample(
    array: np.ndarray, new_shape: Sequence[int], nearest_axis: int | None, order: int | str
) -> np.ndarray:
    assert array.ndim == 4 and len(new_shape) == 3, (
        f"expected (C, Z, Y, X) and three lengths, found {array.shape} and {new_shape}"
    )
    if tuple(new_shape) == array.shape[1:]:
        return array
    out = np.empty((len(array), *new_shape), np.float32)
    for new, old, steps in _slabs(array.shape[1:], new_shape, nearest_axis, order):
        for channel, into in zip(array, out, strict=True):
            into[new] = _apply(steps, channel[None, old])[0]
    return out


# axis; the lines to take, or the matrix that makes new lines of the old
Step = tuple[int, np.ndarray | sparse.csr_array]


def _slabs(
    shape: Sequence[int], new_shape: Sequence[int], nearest_axis: int | None, order: int | str
) -> Iterator[tuple[slice, slice, list[Step]]]:
    """(slices of the new grid, slices of the old grid they depend on, what leads from these to
    those)."""
    steps: list[Step] = []
    for axis in _shrinking_first(shape, new_shape):
        old, new = shape[axis], int(new_shape[axis])
        whole = axis == nearest_axis or old == 1
        steps.append((axis, nearest(old, new) if whole else operator(old, new, order)))
    widest = max(shape[1] * shape[2], new_shape[1] * new_shape[2])
    thick = max(THINNEST if any(axis == 0 for axis, _ in steps) else 1, SLAB // widest)
    for start in range(0, new_shape[0], thick):
        new_slab = slice(start, min(start + thick, new_shape[0]))
        old_slab, own = new_slab, []
        for axis, how in steps:
            if axis == 0:
                lines = how[new_slab]
                used = lines if isinstance(lines, np.ndarray) else lines.indices
                old_slab = slice(int(used.min()), int(used.max()) + 1)
                how = (
                    lines - old_slab.start if isinstance(lines, np.ndarray) else lines[:, old_slab]
                )
            own.append((axis, how))
        yield new_slab, old_slab, own


def _shrinking_first(shape: Sequence[int], new_shape: Sequence[int]) -> list[int]:
    """Axes whose length changes; those that shrink first, for that leaves less to do."""
    changing = [axis for axis in range(3) if shape[axis] != new_shape[axis]]
    return sorted(changing, key=lambda axis: new_shape[axis] / shape[axis])


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


def between(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` cell centres the lower of the two of `old` samples around it, and the
    weights (float32) of both."""
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.minimum(np.floor(at).astype(np.intp), max(old - 2, 0))
    return low, (1 - (at - low)).astype(np.float32), (at - low).astype(np.float32)


@lru_cache(maxsize=256)
def operator(old: int, new: int, order: int | str) -> sparse.csr_array:
    """The (new, old) matrix that interpolates a line of `old` samples at `new` cell centres; rows
    sum to 1. `order` is 1, 3 or "area"."""
    if order == "area" and new < old:
        return _area(old, new)
    if order == "area":
        order = 1
    if order == 1:
        low, near, far = between(old, new)
        columns, weights = np.stack([low, np.minimum(low + 1, old - 1)]), np.stack([near, far])
        rows = np.broadcast_to(np.arange(new), columns.shape)
        return sparse.csr_array(
            (weights.ravel(), (rows.ravel(), columns.ravel())), shape=(new, old)
        )
    return _cubic(old, (np.arange(new) + 0.5) * (old / new) - 0.5)


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
