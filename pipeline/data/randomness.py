"""Randomness as a function of where we are, not of what happened before.

A counter-based generator (Philox, Salmon et al. 2011) is keyed by the seed and the purpose and
counted by (stage, epoch, index), so any sample can be drawn by any process in any order, and a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import functools

import numpy as np

CASES, PATCH, AUGMENT, INIT, DROPOUT, MASK = range(6)  # purposes: streams that never meet


def generator(
    seed: int, purpose: int, stage: int = 0, epoch: int = 0, index: int = 0
) -> np.random.Generator:
    """The generator of one place in the run."""
    return np.random.Generator(
        np.random.Philox(key=[seed, purpose], counter=[0, index, epoch, stage])
    )


@functools.lru_cache(maxsize=32)
def permutation(seed: int, stage: int, stream: int, cycle: int, size: int) -> np.ndarray:
    """Order in which `size` cases are visited in the given cycle of a stream."""
    return generator(seed, CASES, stage, cycle, stream).permutation(size)
