"""Distances between the surfaces of two masks, in the two conventions that papers use.

Voxels: the surface is the outline's voxels, each weighs the same (medpy, MONAI). Surface elements:
the surface is what marching cubes draws between voxels, each element weighs its area in mm²
(DeepMind's `surface-distance`, whose tables of areas are used). Axes of size 1 are no direction:
a 2D mask has an outline, whose elements have a length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

NOTHING: dict[str, float | None] = dict.fromkeys(
    ("hd95", "hd95_max", "hd95_area", "assd", "masd", "nsd")
)


def surface_scores(
    a: np.ndarray, b: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float | None]:
    """All of `NOTHING` between two bool masks (Z, Y, X) of one shape, see METRICS; distances in mm
    as `spacing` and `tolerance`. Of two empty masks everything is None; of one, too, but for the
    `nsd` of 0."""
    if not a.any() or not b.any():
        return NOTHING | {"nsd": 0.0 if a.any() or b.any() else None}
    box = bounding_box(a | b)
    real = [axis for axis, size in enumerate(a.shape) if size > 1]
    flat = tuple(axis for axis, size in enumerate(a.shape) if size == 1)
    if not real:
        return dict.fromkeys(NOTHING, 0.0) | {"nsd": 1.0}
    a, b = (mask[box].squeeze(flat) for mask in (a, b))
    steps = np.asarray(spacing, dtype=float)[real]
    there, back = distances_between(outline(a), outline(b), steps)
    both = np.concatenate([there, back])
    scores: dict[str, float | None] = {
        "hd95": float(np.percentile(both, 95)),
        "hd95_max": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float(both.mean()),
        "masd": float((there.mean() + back.mean()) / 2),
    }
    if len(real) == 1:  # a line of voxels has end points without an area
        return scores | {"hd95_area": None, "nsd": None}
    codes_a, codes_b = surface_elements(a), surface_elements(b)
    full = 2 ** (2**a.ndim) - 1
    border_a, border_b = ((codes != 0) & (codes != full) for codes in (codes_a, codes_b))
    there, back = distances_between(border_a, border_b, steps)
    areas = element_areas(tuple(steps))
    of_a, of_b = areas[codes_a[border_a]], areas[codes_b[border_b]]
    within = of_a[there <= tolerance].sum() + of_b[back <= tolerance].sum()
    return scores | {
        "hd95_area": max(_weighted_95th(there, of_a), _weighted_95th(back, of_b)),
        "nsd": float(within / (of_a.sum() + of_b.sum())),
    }


def outline(mask: np.ndarray) -> np.ndarray:
    """The voxels that an erosion with the face neighbours takes away; beyond the array is
    background."""
    return mask & ~ndimage.binary_erosion(mask)


def surface_elements(mask: np.ndarray) -> np.ndarray:
    """uint8 of one more per axis: which of the 2 x 2 (x 2) voxels around each corner of voxels are
    in the mask, the first of them as the highest bit. 0 and all bits: no surface there."""
    codes = np.zeros([size + 1 for size in mask.shape], dtype=np.uint8)
    corners = list(np.ndindex(*(2,) * mask.ndim))
    for bit, corner in enumerate(reversed(corners)):
        place = tuple(slice(1 - i, 1 - i + n) for i, n in zip(corner, mask.shape, strict=True))
        codes[place] |= mask.astype(np.uint8) << bit
    return codes


@functools.lru_cache(maxsize=64)
def element_areas(spacing: tuple[float, ...]) -> np.ndarray:
    """(16,) lengths in mm or (256,) areas in mm² of the surface element of each code."""
    from surface_distance import lookup_tables

    if len(spacing) == 2:
        return np.asarray(lookup_tables.create_table_neighbour_code_to_contour_length(spacing))
    return np.asarray(lookup_tables.create_table_neighbour_code_to_surface_area(spacing))


def _weighted_95th(distances: np.ndarray, weights: np.ndarray) -> float:
    """The distance below which elements of 95 % of the area lie: the first that reaches it."""
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(weights[order])
    place = np.searchsorted(reached / reached[-1], 0.95)
    return float(distances[order][min(place, len(order) - 1)])


def distances_between(
    a: np.ndarray, b: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from every True of a to the nearest of b, and from b to a, in the arrays'
    order. Two exact ways, chosen by cost: a tree of points, a distance map."""
    if 16 * (np.count_nonzero(a) + np.count_nonzero(b)) > a.size:
        to_a, to_b = (ndimage.distance_transform_edt(~mask, sampling=spacing) for mask in (a, b))
        return to_b[a], to_a[b]
    return _nearest(a, b, spacing), _nearest(b, a, spacing)


def _nearest(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    shared = b[a]  # where both surfaces run together there is nothing to look for
    distances = np.zeros(len(shared))
    if not shared.all():
        points = np.argwhere(b) * spacing
        tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
        distances[~shared] = tree.query((np.argwhere(a)[~shared]) * spacing)[0]
    return distances


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all True voxels. The mask is not empty."""
    box = []
    for axis in range(mask.ndim):
        line = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(line[0]), int(line[-1]) + 1))
    return tuple(box)
