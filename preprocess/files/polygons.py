"""Outlines to pixels: a pixel is inside if its centre is (even-odd rule)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def filled(outlines: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Bool (Y, X) of closed outlines [(x, y), ...] in pixels; the corner of the first pixel is
    (0, 0). Outlines inside others are holes."""
    height, width = shape
    # [y, k]: outlines cross row y between the centres of pixels k - 1 and k
    crossings = np.zeros((height, width + 1), np.int32)
    for outline in outlines:
        points = np.asarray(outline, float).reshape(-1, 2)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
            low, high = sorted((ay, by))
            rows = np.arange(max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5))))
            if len(rows):
                at = ax + (rows + 0.5 - ay) * (bx - ax) / (by - ay)
                np.add.at(crossings, (rows, np.clip(np.ceil(at - 0.5), 0, width).astype(int)), 1)
    beyond = np.cumsum(crossings[:, ::-1], axis=1)[:, ::-1]
    return beyond[:, 1:] % 2 == 1
