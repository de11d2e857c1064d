"""Counting and drawing voxels piece by piece: NumPy's own functions take eight bytes and more for
every voxel of a volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

PIECE = 2**22  # voxels looked at at a time


def pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first voxel, voxels) of the flat array, in order. An array that is not
    contiguous is copied."""
    flat = array.reshape(-1)
    for start in range(0, len(flat), PIECE):
        yield start, flat[start : start + PIECE]


def values(label: np.ndarray) -> set[int]:
    """Those that occur in an array of integers, whatever its type."""
    found: set[int] = set()
    for _, piece in pieces(label):
        found.update(
            (
                np.flatnonzero(np.bincount(piece)) if piece.dtype == np.uint8 else np.unique(piece)
            ).tolist()
        )
    return {int(value) for value in found}


def counts(label: np.ndarray) -> np.ndarray:
    """(256,) voxels of every value of a uint8 array."""
    found = np.zeros(256, np.int64)
    for _, piece in pieces(label):
        found += np.bincount(piece, minlength=256)
    return found


def draw(
    label: np.ndarray,
    wanted: Callable[[np.ndarray], np.ndarray],
    most: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Sorted flat indices of the voxels that `wanted` says yes to: all, or `most` of them, each at
    most once."""
    total = sum(int(np.count_nonzero(wanted(piece))) for _, piece in pieces(label))
    ranks = None if total <= most else np.sort(generator.choice(total, most, replace=False))
    drawn, before = [np.empty(0, np.int64)], 0
    for start, piece in pieces(label):
        indices = np.flatnonzero(wanted(piece))
        if ranks is not None:
            first, last = np.searchsorted(ranks, (before, before + len(indices)))
            before, indices = before + len(indices), indices[ranks[first:last] - before]
        drawn.append(indices + start)
    return np.concatenate(drawn)
