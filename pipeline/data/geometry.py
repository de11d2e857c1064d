"""Where the voxels of a patch come from, and what is there: flips, quarter turns, rotation, scale
and elastic deformation in one pass over the box of the stored grid that is needed.

Positions are sums of lines, one per axis of the patch, so no grid is built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segfleet.pipeline.data import kernels
from segfleet.preprocess.stores.base import Box


@dataclass(frozen=True, kw_only=True)
class Spatial:
    """A drawn spatial transform. `matrix` (3, 3) maps offsets from the patch centre to offsets on
    the stored grid, in voxels."""

    flips: tuple[int, ...] = ()
    turns: int = 0  # quarter turns in plane
    matrix: np.ndarray | None = None  # None: identity
    shifts: np.ndarray | None = None  # (3, z, y, x) coarse displacements in voxels


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the voxels of a patch lie in the box that was read: voxel (z, y, x) at lines[a][0][z] +
    lines[a][1][y] + lines[a][2][x] + shifts[a][z, y, x] along axis a, summed in this order in
    float32."""

    lines: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    shifts: np.ndarray | None = None  # (3, z, y, x) float32

    @property
    def patch(self) -> tuple[int, ...]:
        return tuple(len(line) for line in self.lines[0])

    def positions(self) -> np.ndarray:
        """(3, z, y, x) float32."""
        stacked = np.stack([(z[:, None, None] + y[:, None]) + x for z, y, x in self.lines])
        return stacked if self.shifts is None else stacked + self.shifts


def source(
    spatial: Spatial, start: tuple[int, int, int], patch: tuple[int, int, int]
) -> tuple[Box, Grid | None]:
    """The box of the stored grid a patch needs, and where each of its voxels lies in that box.

    The grid is None for a plain copy. Flips are in it, unless there are quarter turns as well.
    """
    if spatial.matrix is None:
        return tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True)), None
    offsets = [np.arange(p) - (p - 1) / 2 for p in patch]
    lines = [[offsets[b] * spatial.matrix[a, b] for b in range(3)] for a in range(3)]
    shifts = None
    if spatial.shifts is not None:
        shifts = _enlarged(spatial.shifts, patch)
    box = []
    for a in range(3):
        lines[a][0] = lines[a][0] + (start[a] + (patch[a] - 1) / 2)
        if a == 0 and patch[0] == 1:  # stay in the slice
            low, stop = start[0], start[0] + 1
        else:
            ends = (0.0, 0.0) if shifts is None else (shifts[a].min(), shifts[a].max())
            low = int(np.floor(sum(line.min() for line in lines[a]) + ends[0]))
            stop = int(np.floor(sum(line.max() for line in lines[a]) + ends[1])) + 2
        lines[a][0] = lines[a][0] - low
        box.append(slice(low, stop))
    for axis in spatial.flips if not spatial.turns else ():
        for three in lines:
            three[axis] = three[axis][::-1]
        shifts = None if shifts is None else np.ascontiguousarray(np.flip(shifts, 1 + axis))
    grid = Grid(
        lines=tuple(tuple(line.astype(np.float32) for line in three) for three in lines),
        shifts=shifts,
    )
    return tuple(box), grid


def _enlarged(coarse: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """(3, *patch) float32: knots, the outer ones in the corners, joined linearly axis by axis."""
    for axis, size in enumerate(patch, start=1):
        knots = coarse.shape[axis]
        at = np.linspace(0, knots - 1, size) if size > 1 else np.zeros(1)
        low = np.minimum(at.astype(int), max(knots - 2, 0))
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        high = np.minimum(low + 1, knots - 1)
        coarse = coarse.take(low, axis) * (1 - part) + coarse.take(high, axis) * part
    return np.ascontiguousarray(coarse, np.float32)


def resample(
    image: np.ndarray, label: np.ndarray, grid: Grid, out: np.ndarray, out_label: np.ndarray
) -> None:
    """(C, z, y, x) float32 image and (z, y, x) uint8 label of a box, at `grid`, into `out` and
    `out_label`, C-contiguous: linear; of a label the one with the largest linear weight, of equals
    the smaller. Beyond the box: its border."""
    if (library := kernels.library()) is None:
        return _resample_numpy(image, label, grid, out, out_label)
    image, label = np.ascontiguousarray(image, np.float32), np.ascontiguousarray(label, np.uint8)
    lines = [np.ascontiguousarray(line) for three in grid.lines for line in three]
    library.segfleet_resample(
        image.ctypes.data,
        label.ctypes.data,
        len(image),
        kernels.sizes(*label.shape),
        kernels.sizes(*grid.patch),
        (ctypes.c_void_p * 9)(*(line.ctypes.data for line in lines)),
        None if grid.shifts is None else grid.shifts.ctypes.data,
        out.ctypes.data,
        out_label.ctypes.data,
    )


def _resample_numpy(
    image: np.ndarray, label: np.ndarray, grid: Grid, out: np.ndarray, out_label: np.ndarray
) -> None:
    """As the compiled pass, bit for bit."""
    cells, parts = [], []
    for at, size in zip(grid.positions(), label.shape, strict=True):
        at = np.clip(at, np.float32(0), np.float32(size - 1))
        cell = np.minimum(at.astype(np.int32), max(size - 2, 0))
        cells.append(cell)
        parts.append(at - cell.astype(np.float32))
    strides = (label.shape[1] * label.shape[2], label.shape[2], 1)
    step = [s if n > 1 else 0 for n, s in zip(label.shape, strides, strict=True)]
    first = (cells[0] * label.shape[1] + cells[1]) * label.shape[2] + cells[2]
    corners = [first + z + y + x for z in (0, step[0]) for y in (0, step[1]) for x in (0, step[2])]

    def mix(a: np.ndarray, b: np.ndarray, part: np.ndarray) -> np.ndarray:
        return a + part * (b - a)

    for into, channel in zip(out, np.ascontiguousarray(image, np.float32), strict=True):
        flat = channel.reshape(-1)
        values = [flat.take(corner) for corner in corners]
        rows = [mix(values[k], values[k + 1], parts[2]) for k in range(0, 8, 2)]
        low, high = mix(rows[0], rows[1], parts[1]), mix(rows[2], rows[3], parts[1])
        into[...] = mix(low, high, parts[0]) if step[0] else low
    out_label[...] = _vote(np.stack([label.reshape(-1).take(corner) for corner in corners]), parts)


def _vote(corners: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """(8, z, y, x) labels at the corners of each cell -> the label with the largest weight."""
    out = corners[0].copy()
    mixed = (corners != corners[0]).any(0)
    corners = corners[:, mixed]
    sides = [(np.float32(1) - part[mixed], part[mixed]) for part in parts]
    weights = [(z * y) * x for z in sides[0] for y in sides[1] for x in sides[2]]
    best = np.full(corners.shape[1], -1, np.float32)
    chosen = np.zeros(corners.shape[1], np.uint8)
    for own in corners:
        total = np.zeros(len(best), np.float32)
        for other, weight in zip(corners, weights, strict=True):
            total = total + np.where(other == own, weight, np.float32(0))
        better = (total > best) | ((total == best) & (own < chosen))
        best, chosen = np.where(better, total, best), np.where(better, own, chosen)
    out[mixed] = chosen
    return out


def mirror(spatial: Spatial, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quarter turns, then flips, on the trailing axes (z, y, x); views."""
    if spatial.turns:
        image, label = (np.rot90(a, spatial.turns, (-2, -1)) for a in (image, label))
    axes = [axis - 3 for axis in spatial.flips]
    return (np.flip(image, axes), np.flip(label, axes)) if axes else (image, label)
