"""What a segmentation is worth: overlap and distance per case and structure. Conventions: specs of
the 3D and 2D data sets.

One case gives a `Scores` dict per structure; numbers that are not defined are None ("missing"),
never 0 and never dropped silently.
`summary.py` turns the scores of a set into means, intervals and counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from segfleet.pipeline.scoring.lesions import lesion_counts
from segfleet.pipeline.scoring.surfaces import NOTHING, surface_scores

if TYPE_CHECKING:  # it loads torch
    from segfleet.pipeline.task import Task

Scores = dict[str, Any]
TOLERANCE = 2.0  # mm, of the normalised surface Dice

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
    "hd95_area": "The larger of the two directed 95th percentiles in mm by area of the surface, "
    "which runs between the voxels (DeepMind's surface-distance); missing when truth or "
    "prediction is empty.",
    "assd": "Average symmetric surface distance in mm: mean over the surface voxels of both; "
    "missing when truth or prediction is empty.",
    "masd": "Mean of the two directed average surface distances in mm (what medpy calls assd); "
    "missing when truth or prediction is empty.",
    "nsd": "Normalised surface Dice: the share of both surfaces' area that lies within the "
    "tolerance of the other surface (DeepMind's surface-distance); missing when truth and "
    "prediction are both empty, 0 when only one is.",
    "lesion_f1": "2 TP / (2 TP + FP + FN) over the lesions of one case: components of voxels that "
    "touch by faces, edges or corners; a lesion of the truth that shares a voxel with the "
    "prediction is a TP, else a FN, one of the prediction that shares none with the truth a FP "
    "(ISLES convention); missing when there is none of them.",
    "lesion_recall": "TP / (TP + FN) over the lesions of one case, matched as for lesion_f1; "
    "missing when the truth has none.",
    "lesion_fp": "Lesions of the prediction that share no voxel with the truth: false positives "
    "per case.",
    "brier": "Mean over the voxels of one case of (probability - truth)², on the stored grid; "
    "missing where no probabilities are known.",
    "ece": "Expected calibration error of one case on the stored grid: |mean probability - share "
    "of truth| over 15 equal bins of the probability, weighted by their voxels (most are "
    "background); missing where no probabilities are known.",
    "truth_ml": "True volume of one case in millilitres.",
    "predicted_ml": "Predicted volume of one case in millilitres.",
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
    mask = table[label]
    return mask if ignored is None else mask & ~ignored


def score_case(
    prediction_ZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    *,
    spacing: Sequence[float],
    task: Task,
    distances: bool = True,
    tolerance: float | Mapping[str, float] = TOLERANCE,
) -> dict:
    """Scores of one case per structure of the task: {"liver": {"dice": 0.93, ...}}. Both arrays are
    uint8 label maps of one shape,
    `spacing` is in mm (z, y, x). Voxels whose truth is the ignore label count for nothing.
    `tolerance` of the nsd in mm, one for all structures or one for each that is named; others have
    TOLERANCE. `distances=False` leaves out (None) all that needs more than counting voxels."""
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
            tolerance=tolerance_of(name, tolerance),
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
    tolerance: float = TOLERANCE,
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
    ml = float(np.prod(spacing)) / 1000.0
    return {
        **overlap(tp, fp, fn, tn),
        **(surface_scores(prediction, truth, spacing, tolerance) if distances else NOTHING),
        **lesion_scores(prediction, truth, distances),
        "brier": None,  # of probabilities, which the caller may have
        "ece": None,
        "truth_ml": true * ml,
        "predicted_ml": predicted * ml,
        "volume_error": ratio(predicted - true, true),
        "volume_error_ml": (predicted - true) * ml,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "truth_voxels": true,
        "predicted_voxels": predicted,
        "slice_dice_sum": slice_dice,
        "slices": slices,
    }


def lesion_scores(prediction: np.ndarray, truth: np.ndarray, counted: bool) -> Scores:
    """What follows from the lesions found, missed and invented; see METRICS."""
    if not counted:
        return dict.fromkeys(("lesion_f1", "lesion_recall", "lesion_fp", "lesions"))
    found, missed, invented = lesion_counts(prediction, truth)
    return {
        "lesion_f1": ratio(2 * found, 2 * found + missed + invented),
        "lesion_recall": ratio(found, found + missed),
        "lesion_fp": invented,
        "lesions": [found, missed, invented],
    }


def tolerance_of(name: str, tolerance: float | Mapping[str, float]) -> float:
    """The tolerance of a structure in mm."""
    return tolerance.get(name, TOLERANCE) if isinstance(tolerance, Mapping) else tolerance


def overlap(tp: int, fp: int, fn: int, tn: int) -> Scores:
    """All that follows from one confusion matrix; see METRICS."""
    iou, background_iou = ratio(tp, tp + fp + fn), ratio(tn, tn + fp + fn)
    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "iou": iou,
        "sensitivity": ratio(tp, tp + fn),
        "precision": ratio(tp, tp + fp),
        "specificity": ratio(tn, tn + fp),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "mean_iou": (
            (1.0 if iou is None else iou) + (1.0 if background_iou is None else background_iou)
        )
        / 2,
    }


def confusion(
    prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray, task: Task
) -> dict[str, tuple[int, int, int, int]]:
    """(TP, FP, FN, TN) per structure of two uint8 label maps of one shape; ignored voxels count
    nowhere."""
    ignored = truth_ZYX == task.ignore_label if task.ignore_label is not None else None
    counted = truth_ZYX.size - (int(np.count_nonzero(ignored)) if ignored is not None else 0)
    counts = {}
    for name, group in zip(task.names, task.members, strict=True):
        predicted, true = (masks(x, group, ignored) for x in (prediction_ZYX, truth_ZYX))
        tp = int(np.count_nonzero(predicted & true))
        fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
        counts[name] = (tp, fp, fn, counted - tp - fp - fn)
    return counts


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None (missing) when the whole is nothing."""
    return part / whole if whole else None


def _slice_dice(tp: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> tuple[float, int]:
    """Sum of the slices' Dice (empty/empty = 1) and the number of slices."""
    whole = predicted + true
    dice = np.where(whole == 0, 1.0, 2 * tp / np.maximum(whole, 1))
    return float(dice.sum()), len(dice)
