"""Resampling as one sparse matrix per axis: cubic splines are separable, and the matrices are made once per pair of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage, sparse

PADDING = 12  # voxels of edge before a spline is fitted; its influence beyond is below 1e-6
NEGLIGIBLE = 1e-6


def resample_image(image_CZYX: np.ndarray, new_shape: Sequence[int], anisotropic_axis: int | None = None) -> np.ndarray:
    """Cubic splines along all axes but the anisotropic one, which takes the nearest slice.

    Returns (C, *new_shape) float32, or the very array where the shape does not change. Voxel centres are aligned as cells of the same
    box: `scipy.ndimage.zoom(order=3, mode="nearest", grid_mode=True)` gives the same.
    """
    return _resample(image_CZYX, new_shape, anisotropic_axis, 3)


def resample_probabilities(prob_KZYX: np.ndarray, new_shape: Sequence[int], anisotropic_axis: int | None = None) -> np.ndarray:
    """As `resample_image`, but linear: nothing leaves [0, 1] and sums over K stay."""
    return _resample(prob_KZYX, new_shape, anisotropic_axis, 1)


def resample_label(label_ZYX: np.ndarray, new_shape: Sequence[int], anisotropic_axis: int | None = None) -> np.ndarray:
    """(*new_shape) of the same dtype: the 0/1 map of every label is resampled linearly, the largest wins, of equals the smaller label."""
    if tuple(new_shape) == label_ZYX.shape:
        return label_ZYX
    values = np.unique(label_ZYX)
    out = np.full(tuple(new_shape), values[0], label_ZYX.dtype)
    if len(values) == 1:
        return out
    best = None
    for value in values:
        here = _resample((label_ZYX == value)[None], new_shape, anisotropic_axis, 1)[0]
        if best is None:
            best = here
            continue
        wins = here > best + NEGLIGIBLE
        out[wins] = value
        np.maximum(best, here, out=best)
    return out


def _resample(array: np.ndarray, new_shape: Sequence[int], nearest_axis: int | None, order: int) -> np.ndarray:
    assert array.ndim == 4 and len(new_shape) == 3, f"expected (C, Z, Y, X) and three lengths, found {array.shape} and {new_shape}"
    if tuple(new_shape) == array.shape[1:]:
        return array
    out = array
    for axis in sorted(range(3), key=lambda a: new_shape[a] / array.shape[1 + a]):  # shrink first: less to do for the rest
        old, new = array.shape[1 + axis], int(new_shape[axis])
        if old == new:
            continue
        if axis == nearest_axis or old == 1:
            out = np.take(out, nearest(old, new), axis=1 + axis)
            continue
        lines = np.moveaxis(out, 1 + axis, 0).astype(np.float32)
        rest = lines.shape[1:]
        lines = operator(old, new, order) @ lines.reshape(old, -1)
        out = np.moveaxis(lines.reshape(new, *rest), 0, 1 + axis)
    return np.ascontiguousarray(out, dtype=np.float32)


def nearest(old: int, new: int) -> np.ndarray:
    """For each of `new` cells the old one its centre lies in."""
    return np.minimum(np.floor((np.arange(new) + 0.5) * (old / new)).astype(np.intp), old - 1)


@lru_cache(maxsize=256)
def operator(old: int, new: int, order: int) -> sparse.csr_array:
    """The (new, old) matrix that interpolates a line of `old` samples at `new` cell centres; rows sum to 1. `order` is 1 or 3."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    if order == 1:
        at = np.clip(at, 0, old - 1)
        low = np.minimum(np.floor(at).astype(np.intp), max(old - 2, 0))
        columns = np.stack([low, np.minimum(low + 1, old - 1)])
        weights = np.stack([1 - (at - low), at - low])
        rows = np.broadcast_to(np.arange(new), columns.shape)
        return sparse.csr_array((weights.ravel().astype(np.float32), (rows.ravel(), columns.ravel())), shape=(new, old))
    return _cubic(old, at)


def _cubic(old: int, at: np.ndarray) -> sparse.csr_array:
    """Four B-spline taps on coefficients, which depend on all samples, though on far ones by less than can be seen."""
    padded = np.pad(np.eye(old), ((PADDING, PADDING), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(padded, order=3, axis=0, mode="mirror")
    at = np.clip(at, -1.0, old) + PADDING
    low = np.floor(at).astype(np.intp)
    t = at - low
    taps = np.stack([(1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2, t**3 / 6])
    dense = np.zeros((len(at), old))
    for k, tap in enumerate(taps):
        dense += tap[:, None] * coefficients[np.clip(low - 1 + k, 0, len(padded) - 1)]
    dense[np.abs(dense) < NEGLIGIBLE] = 0
    return sparse.csr_array((dense / dense.sum(1, keepdims=True)).astype(np.float32))
