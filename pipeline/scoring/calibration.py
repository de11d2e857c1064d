"""Whether probabilities mean what they say."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
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
    if probabilities_KZYX.device.type != "cpu":
        return _on_device(probabilities_KZYX[background:], label_ZYX, task)
    counted = None
    if task.ignore_label is not None:
        counted = label_ZYX != task.ignore_label
    by_name = {}
    for index, (name, group) in enumerate(zip(task.names, task.members, strict=True)):
        p, truth = probabilities_KZYX[index + background].numpy(), masks(label_ZYX, group)
        if counted is not None:
            p, truth = p[counted], truth[counted]
        by_name[name] = binary_calibration(p.ravel(), truth.ravel())
    return by_name


def _on_device(
    probabilities_KZYX: Tensor, label_ZYX: np.ndarray, task: Task
) -> dict[str, dict[str, float | None]]:
    """The same where the probabilities are, so that a few sums leave the device, not volumes."""
    label = torch.from_numpy(np.ascontiguousarray(label_ZYX)).to(probabilities_KZYX.device)
    counted, by_name = task.valid(label), {}
    for p, name, group in zip(probabilities_KZYX, task.names, task.members, strict=True):
        truth = functools.reduce(torch.logical_or, [label == value for value in group])
        rows = []
        for q, y, c in zip(*_slabs(p, truth, counted), strict=True):
            c = torch.ones_like(y) if c is None else c
            q, y = torch.where(c, q, 0).double(), y & c
            place = (q * BINS).long().clamp(max=BINS - 1)
            # masks, not `bincount`: its sums on a GPU depend on the order in which threads arrive
            bins = [place == number for number in range(BINS)]
            rows.append(
                torch.stack(
                    [
                        (q - y.double()).square().sum(),
                        c.sum().double(),
                        *(torch.where(within, q, 0).sum() for within in bins),
                        *((within & y).sum().double() for within in bins),
                    ]
                )
            )
        squares, count, *sums = torch.stack(rows).sum(0).tolist()
        gaps = np.abs(np.subtract(sums[:BINS], sums[BINS:])).sum()
        by_name[name] = {
            "brier": squares / count if count else None,
            "ece": float(gaps) / count if count else None,
        }
    return by_name


def _slabs(p: Tensor, truth: Tensor, counted: Tensor | None) -> tuple[Any, ...]:
    """Slices of each that hold some 16 million voxels: in double they take a while's memory."""
    thick = max(1, 2**24 // max(1, p[0].numel()))
    parts = p.split(thick), truth.split(thick)
    return *parts, [None] * len(parts[0]) if counted is None else counted.split(thick)


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
