"""Whether probabilities mean what they say."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from segfleet.pipeline.scoring.metrics import masks
from segfleet.pipeline.task import Task

BINS = 15


def calibration(
    probabilities_KZYX: Tensor, label_ZYX: np.ndarray, task: Task
) -> dict[str, dict[str, float | None]]:
    """{"brier", "ece"} per structure from averaged probabilities and the label on the same grid;
    see METRICS. None where there is no probability (averaged logits) or nothing to count."""
    if task.averages != "probabilities":
        return {name: {"brier": None, "ece": None} for name in task.names}
    background = len(task.values) - len(task.names)  # a softmax has a channel of it
    counted = None
    if task.ignore_label is not None:
        counted = label_ZYX != task.ignore_label
    found = {}
    for index, (name, group) in enumerate(zip(task.names, task.members, strict=True)):
        p, truth = probabilities_KZYX[index + background].numpy(), masks(label_ZYX, group)
        if counted is not None:
            p, truth = p[counted], truth[counted]
        found[name] = binary_calibration(p.ravel(), truth.ravel())
    return found


def binary_calibration(p: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Brier score and expected calibration error of (N,) float32 probabilities and bool truth. The
    lowest bin, nearly all of a volume, is what the others leave over: one pass over the rest."""
    if not len(p):
        return {"brier": None, "ece": None}
    inside = p[truth]
    squares = sum(float(np.square(part, dtype=np.float64).sum()) for part in _pieces(p))
    brier = (squares - 2 * float(inside.sum(dtype=np.float64)) + len(inside)) / len(p)
    high = p >= 1 / BINS
    q, y = p[high].astype(np.float64), truth[high]
    place = np.minimum((q * BINS).astype(np.int64), BINS - 1)
    sums = np.bincount(place, q, minlength=BINS)
    hits = np.bincount(place, y, minlength=BINS)
    sums[0] += float(p.sum(dtype=np.float64)) - sums.sum()
    hits[0] += len(inside) - hits.sum()
    return {"brier": brier, "ece": float(np.abs(sums - hits).sum()) / len(p)}


def _pieces(p: np.ndarray) -> list[np.ndarray]:
    return [p[start : start + 2**20] for start in range(0, len(p), 2**20)]
