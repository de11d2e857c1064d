"""Whether two grids are one, and a label laid from one grid onto another without resampling:
turned, exchanged and shifted by whole voxels, as the affines say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from segfleet.preprocess.case import Geometry

TOLERANCE = 1e-3  # mm for spacing and affine
WHOLE = 0.05  # of a voxel: what a turn or shift may miss whole voxels by, anywhere in the volume


def disagreement(grid: Geometry, other: Geometry) -> tuple[str, str, str] | None:
    """(field, found, expected) where the first grid differs from the second by more than the
    tolerance."""
    if grid.shape != other.shape:
        return "shape", _times(grid.shape), _times(other.shape)
    if not np.allclose(grid.spacing, other.spacing, rtol=0, atol=TOLERANCE):
        return "spacing", f"{_numbers(grid.spacing)} mm", f"{_numbers(other.spacing)} mm"
    if (
        grid.affine is not None
        and other.affine is not None
        and not np.allclose(grid.affine, other.affine, rtol=0, atol=TOLERANCE)
    ):
        own, there = np.asarray(grid.affine), np.asarray(other.affine)
        row, column = np.unravel_index(np.abs(own - there).argmax(), own.shape)
        return "affine", f"[{row},{column}] = {own[row, column]:.6g}", f"{there[row, column]:.6g}"
    return None


def laid(
    label_ZYX: np.ndarray, grid: Geometry, onto: Geometry, *, whole: bool = False
) -> np.ndarray | None:
    """The label on the grid `onto`, 0 where its own grid does not reach.

    None where that is not exact: where voxels do not fall onto voxels, or labelled ones would be
    cut off; with `whole` also where its own grid does not reach everywhere.
    """
    if grid.affine is None or onto.affine is None:
        return None
    step = np.linalg.solve(np.asarray(onto.affine), np.asarray(grid.affine))
    turn, shift = np.rint(step[:3, :3]), np.rint(step[:3, 3])
    corners = _corners(label_ZYX.shape)
    missed = np.abs((step[:3, :3] - turn) @ corners + (step[:3, 3] - shift)[:, None]).max()
    once = (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all()
    if not missed <= WHOLE or not once:
        return None
    source = [int(np.abs(turn[axis]).argmax()) for axis in range(3)]  # of each axis x, y, z
    forward = [turn[axis, source[axis]] > 0 for axis in range(3)]
    first = [
        int(shift[a]) if forward[a] else int(shift[a]) - (label_ZYX.shape[2 - source[a]] - 1)
        for a in range(3)
    ]
    moved = label_ZYX.T.transpose(source)[tuple(slice(None, None, 1 if f else -1) for f in forward)]
    out = np.zeros(onto.shape, label_ZYX.dtype).T
    inside = tuple(slice(max(0, -f), max(0, n - f)) for f, n in zip(first, out.shape, strict=True))
    overlap = moved[inside]
    there = tuple(
        slice(max(0, f), max(0, f) + n) for f, n in zip(first, overlap.shape, strict=True)
    )
    if whole and overlap.shape != out.shape:
        return None
    if np.count_nonzero(overlap) != np.count_nonzero(moved):
        return None
    out[there] = overlap
    return np.ascontiguousarray(out.T)


def settled(label_ZYX: np.ndarray, grid: Geometry, image: Geometry) -> tuple[np.ndarray, Geometry]:
    """A label that lies where its affine says, laid onto the image's grid if that is exact; others
    as they are."""
    if not grid.file.lies or disagreement(grid, image) is None:
        return label_ZYX, grid
    placed = laid(label_ZYX, grid, image, whole=grid.file.lies == "turned")
    return (label_ZYX, grid) if placed is None else (placed, replace(image, file=grid.file))


def within_rounding(grid: Geometry, other: Geometry) -> bool:
    """Whether two grids of one shape put every voxel at one place, but for a twentieth of a voxel:
    what headers in single precision and text leave."""
    if grid.shape != other.shape or grid.affine is None or other.affine is None:
        return False
    step = np.linalg.solve(np.asarray(other.affine), np.asarray(grid.affine)) - np.eye(4)
    corners = _corners(grid.shape)
    return bool(np.abs(step[:3, :3] @ corners + step[:3, 3:]).max() <= WHOLE)


def advice(label: np.ndarray, grid: Geometry, image: Geometry) -> str:
    """How to repair a label on another grid than its image."""
    if laid(label, grid, image) is not None or within_rounding(grid, image):
        return (
            "Both lie in one place, by their headers: `check --fix` lays the label onto the "
            "image's grid."
        )
    if grid.shape == image.shape:
        return (
            "Export both on one grid. If only the label's header is wrong and its voxels lie one "
            "by one on the image's: `check --fix --same-voxels`."
        )
    return "Export both on one grid."


def _corners(shape_ZYX: Sequence[int]) -> np.ndarray:
    return np.array(np.meshgrid(*[(0, n - 1) for n in shape_ZYX[::-1]])).reshape(3, -1)


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(s) for s in shape)


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{v:.4g}" for v in values)
