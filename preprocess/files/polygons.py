"""Outlines to pixels: a pixel is inside if its centre is (even-odd rule)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FARTHEST = 1e9  # pixels


@dataclass(frozen=True, kw_only=True)
class Area:
    """Some pixels of a picture: those of `inside` (Y, X bool) in the box of `rows` and `columns`.
    What a picture of many small things takes is what these take."""

    rows: slice
    columns: slice
    inside: np.ndarray

    @property
    def size(self) -> int:
        return int(np.count_nonzero(self.inside))

    def paint(self, picture_YX: np.ndarray, value: int) -> None:
        picture_YX[self.rows, self.columns][self.inside] = value


def filled(outlines: Sequence[np.ndarray], shape: tuple[int, int]) -> Area:
    """The area of closed outlines [(x, y), ...] in pixels of a picture (Y, X); the corner of the
    first pixel is (0, 0). Outlines inside others are holes. Raises ValueError for points that are
    no pairs of numbers, or out of this world."""
    lines = [np.asarray(outline, float).reshape(-1, 2) for outline in outlines]
    points = np.concatenate([np.empty((0, 2)), *lines])
    if not np.abs(points).max(initial=0) < FARTHEST:
        raise ValueError("points that are on no picture")
    if not len(points):
        return Area(rows=slice(0, 0), columns=slice(0, 0), inside=np.zeros((0, 0), bool))
    limits = np.array(shape[::-1])
    (left, top), (right, bottom) = (
        np.clip(np.floor(points.min(axis=0)), 0, limits).astype(int),
        np.clip(np.ceil(points.max(axis=0)) + 1, 0, limits).astype(int),
    )
    # [y, k]: outlines cross row y between the centres of pixels k - 1 and k of the box
    crossings = np.zeros((bottom - top, right - left + 1), np.int32)
    for line in lines:
        for (ax, ay), (bx, by) in zip(line, np.roll(line, -1, axis=0), strict=True):
            low, high = np.clip(np.ceil(np.sort((ay, by)) - 0.5), top, bottom).astype(int)
            if low < high:
                rows = np.arange(low, high)
                at = np.ceil(ax + (rows + 0.5 - ay) * (bx - ax) / (by - ay) - 0.5)
                np.add.at(crossings, (rows - top, np.clip(at, left, right).astype(int) - left), 1)
    beyond = np.cumsum(crossings[:, :0:-1], axis=1, dtype=np.int32)[:, ::-1]
    return Area(rows=slice(top, bottom), columns=slice(left, right), inside=beyond % 2 == 1)
