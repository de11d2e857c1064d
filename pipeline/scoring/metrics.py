"""What a segmentation is worth: overlap and distance per case and structure. Conventions: specs of
the 3D and 2D data sets.

One case gives a `Scores` dict per structure; numbers that are not defined are None ("missing"),
never 0 and never dropped silently.
`summary.py` turns the scores of a set into means, intervals and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from segfleet.pipeline.task import Task

Scores = dict[str, Any]

METRICS: dict[str, str] = {
    "dice": "2 TP / (2 TP + FP + FN) over the voxels of one whole case on its raw grid; missing "
    "when truth and prediction are both empty, "
    "0 when only one is.",
    "iou": "TP / (TP + FP + FN) over the voxels of one whole case; missing when truth and "
    "prediction are both empty, 0 when only one is.",
    "sensitivity": "TP / (TP + FN) over the voxels of one whole case; missing when the truth is "
    "empty.",
    "precision": "TP / (TP + FP) over the voxels of one whole case; missing when the prediction "
    "is empty.",
    "specificity": "TN / (TN + FP) over the voxels of one whole case; missing when the structure "
    "fills the case.",
    "accuracy": "(TP + TN) / all voxels of one whole case (pixel accuracy): mostly background.",
    "mean_iou": "Mean of the IoU of the structure and of all that is not the structure, over the "
    "voxels of one whole case (mean IoU with background); an empty union counts 1.",
    "hd95": "95th percentile in mm of the distances from each surface voxel to the other surface, "
    "both directions pooled (medpy's "
    "convention); missing when truth or prediction is empty.",
    "hd95_max": "The larger of the two directed 95th percentiles in mm (MONAI's convention), "
    "usually more than hd95; missing when truth or "
    "prediction is empty.",
    "volume_error": "(predicted volume - true volume) / true volume of one case; positive: too "
    "large; missing when the truth is empty.",
    "volume_error_ml": "Predicted volume minus true volume of one case in millilitres (spacing "
    "unknown to the files: 1 mm).",
}


def masks(
    label: np.ndarray, members: Sequence[int], ignored: np.ndarray | None = None
) -> np.ndarray:
    """Where `label` holds one of the values `members`: bool of the same shape, False where
    `ignored`."""
    table = np.zeros(256, dtype=bool)
    table[list(members)] = True
    found = table[label]
    return found if ignored is None else found & ~ignored


def score_case(
    prediction_ZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    *,
    spacing: Sequence[float],
    task: Task,
    distances: bool = True,
) -> dict:
    """Scores of one case per structure of the task: {"liver": {"dice": 0.93, ...}}. Both arrays are
    uint8 label maps of one shape,
    `spacing` is in mm (z, y, x). Voxels whose truth is the ignore label count for nothing.
    `distances=False` leaves hd95 out (None)."""
    assert prediction_ZYX.shape == truth_ZYX.shape, (prediction_ZYX.shape, truth_ZYX.shape)
    assert prediction_ZYX.dtype == truth_ZYX.dtype == np.uint8, (
        prediction_ZYX.dtype,
        truth_ZYX.dtype,
    )
    ignored = truth_ZYX == task.ignore_label if task.ignore_label is not None else None
    counted = truth_ZYX.size - (int(np.count_nonzero(ignored)) if ignored is not None else 0)
    return {
        name: score_structure(
            masks(prediction_ZYX, group, ignored),
            masks(truth_ZYX, group, ignored),
            spacing=spacing,
            distances=distances,
            counted=counted,
        )
        for name, group in zip(task.names, task.members, strict=True)
    }


def score_structure(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    spacing: Sequence[float],
    distances: bool = True,
    counted: int | None = None,
) -> Scores:
    """Scores of one structure from two bool masks (Z, Y, X); see METRICS. Counts of voxels come
    along for the pooled variants. `counted`: voxels that count at all; None: all of them."""
    per_slice = tuple(
        mask.sum(axis=(1, 2), dtype=np.int64) for mask in (prediction & truth, prediction, truth)
    )
    tp, predicted, true = (int(counts.sum()) for counts in per_slice)
    fp, fn = predicted - tp, true - tp
    tn = (truth.size if counted is None else counted) - tp - fp - fn
    slice_dice, slices = _slice_dice(*per_slice)
    pooled, larger = surface_percentiles(prediction, truth, spacing) if distances else (None, None)
    return {
        **overlap(tp, fp, fn, tn),
        "hd95": pooled,
        "hd95_max": larger,
        "volume_error": ratio(predicted - true, true),
        "volume_error_ml": (predicted - true) * float(np.prod(spacing)) / 1000.0,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "truth_voxels": true,
        "predicted_voxels": predicted,
        "slice_dice_sum": slice_dice,
        "slices": slices,
    }


def overlap(tp: int, fp: int, fn: int, tn: int) -> Scores:
    """All that follows from one confusion matrix; see METRICS."""
    iou, rest = ratio(tp, tp + fp + fn), ratio(tn, tn + fp + fn)
    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "iou": iou,
        "sensitivity": ratio(tp, tp + fn),
        "precision": ratio(tp, tp + fp),
        "specificity": ratio(tn, tn + fp),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "mean_iou": ((1.0 if iou is None else iou) + (1.0 if rest is None else rest)) / 2,
    }


def confusion(
    prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray, task: Task
) -> dict[str, tuple[int, int, int, int]]:
    """(TP, FP, FN, TN) per structure of two uint8 label maps of one shape; ignored voxels count
    nowhere."""
    ignored = truth_ZYX == task.ignore_label if task.ignore_label is not None else None
    counted = truth_ZYX.size - (int(np.count_nonzero(ignored)) if ignored is not None else 0)
    found = {}
    for name, group in zip(task.names, task.members, strict=True):
        predicted, true = (masks(x, group, ignored) for x in (prediction_ZYX, truth_ZYX))
        tp = int(np.count_nonzero(predicted & true))
        fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
        found[name] = (tp, fp, fn, counted - tp - fp - fn)
    return found


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None (missing) when the whole is nothing."""
    return part / whole if whole else None


def _slice_dice(tp: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> tuple[float, int]:
    """Sum of the slices' Dice (empty/empty = 1) and the number of slices."""
    whole = predicted + true
    dice = np.where(whole == 0, 1.0, 2 * tp / np.maximum(whole, 1))
    return float(dice.sum()), len(dice)


def surface_percentiles(
    a: np.ndarray, b: np.ndarray, spacing: Sequence[float]
) -> tuple[float | None, float | None]:
    """(hd95, hd95_max) in mm between two bool masks of one shape; (None, None) when one is empty.
    Axes of size 1 do not count as a direction, so a 2D mask has an outline, not a solid of
    outlines."""
    if not a.any() or not b.any():
        return None, None
    real = [axis for axis, size in enumerate(a.shape) if size > 1]
    flat = tuple(axis for axis, size in enumerate(a.shape) if size == 1)
    if not real:
        return 0.0, 0.0
    a, b, spacing = a.squeeze(flat), b.squeeze(flat), np.asarray(spacing, dtype=float)[real]
    box = bounding_box(a | b)
    there, back = surface_distances(a[box], b[box], spacing)
    return float(np.percentile(np.concatenate([there, back]), 95)), float(
        max(np.percentile(there, 95), np.percentile(back, 95))
    )


def surface_distances(
    a: np.ndarray, b: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from every surface voxel of a to the surface of b, and from b to a. Surface:
    the voxels that an erosion with the face neighbours takes away; beyond the array is background.
    Two exact ways, chosen by cost: a tree of points, a distance map."""
    outline_a, outline_b = (mask & ~ndimage.binary_erosion(mask) for mask in (a, b))
    if 16 * (np.count_nonzero(outline_a) + np.count_nonzero(outline_b)) > a.size:
        to_a, to_b = (
            ndimage.distance_transform_edt(~outline, sampling=spacing)
            for outline in (outline_a, outline_b)
        )
        return to_b[outline_a], to_a[outline_b]
    points_a, points_b = (np.argwhere(outline) * spacing for outline in (outline_a, outline_b))
    tree_a, tree_b = (
        cKDTree(points, balanced_tree=False, compact_nodes=False) for points in (points_a, points_b)
    )
    return tree_b.query(points_a)[0], tree_a.query(points_b)[0]


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all True voxels. The mask is not empty."""
    box = []
    for axis in range(mask.ndim):
        line = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(line[0]), int(line[-1]) + 1))
    return tuple(box)
