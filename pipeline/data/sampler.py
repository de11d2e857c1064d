"""Which patch is sample i of epoch e: a pure function of (seed, stage, epoch, i), whatever the
number of ranks or loader processes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segfleet.core.errors import InputError
from segfleet.pipeline.data import randomness
from segfleet.preprocess.stores.case_table import with_foreground
from segfleet.preprocess.stores.manifest import CaseEntry

EVERY, FOREGROUND = 0, 1  # streams of cases


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One patch: its case and its first voxel (z, y, x) on the stored grid; negative where the case
    is smaller than the patch."""

    case: CaseEntry
    start: tuple[int, int, int]
    stage: int
    epoch: int
    index: int


@dataclass(frozen=True, kw_only=True)
class PatchSampler:
    """Draws patches of `patch` voxels (z, y, x) from `cases`.

    Every case is visited once before any is visited again. In every batch the last round(batch *
    foreground) samples are centred on a foreground voxel of a label drawn evenly among those the
    case has; they walk through the cases that have foreground.
    """

    cases: Sequence[CaseEntry]
    patch: tuple[int, int, int]
    batch: int
    foreground: float
    seed: int

    def __post_init__(self) -> None:
        if not self.cases:
            raise InputError("data: the chosen fold has no training case")

    @functools.cached_property
    def _with_foreground(self) -> Sequence[CaseEntry]:
        return with_foreground(self.cases)

    def __getstate__(self) -> dict:
        """Without the index, which each loader process makes for itself."""
        return {name: value for name, value in vars(self).items() if name[0] != "_"}

    def draw(self, stage: int, epoch: int, index: int, steps: int) -> Draw:
        """Sample `index` (0 <= index < steps * batch) of an epoch of `steps` steps."""
        step, slot = divmod(index, self.batch)
        centred = round(self.batch * self.foreground)
        pools = (self.cases, self._with_foreground)
        centres = len(pools[FOREGROUND]) > 0
        stream = FOREGROUND if slot >= self.batch - centred and centres else EVERY
        width = centred if stream == FOREGROUND else self.batch - (centred if centres else 0)
        place = (epoch * steps + step) * width + (
            slot - (self.batch - centred) if stream == FOREGROUND else slot
        )
        pool = pools[stream]
        cycle, position = divmod(place, len(pool))
        order = randomness.permutation(self.seed, stage, stream, cycle, len(pool))
        case = pool[int(order[position])]
        rng = randomness.generator(self.seed, randomness.PATCH, stage, epoch, index)
        start = self._centred(case, rng) if stream == FOREGROUND else self._anywhere(case, rng)
        return Draw(case=case, start=start, stage=stage, epoch=epoch, index=index)

    def _anywhere(self, case: CaseEntry, rng: np.random.Generator) -> tuple[int, int, int]:
        return tuple(
            int(rng.integers(0, s - p + 1)) if s > p else -((p - s) // 2)
            for s, p in zip(case.shape, self.patch, strict=True)
        )

    def _centred(self, case: CaseEntry, rng: np.random.Generator) -> tuple[int, int, int]:
        sampled = (case.foreground[label] for label in sorted(case.foreground))
        voxels = [voxels for voxels in sampled if len(voxels)]
        chosen = voxels[rng.integers(len(voxels))]
        centre = np.unravel_index(int(chosen[rng.integers(len(chosen))]), case.shape)
        axes = zip(centre, case.shape, self.patch, strict=True)
        return tuple(
            min(max(int(c) - p // 2, 0), s - p) if s > p else -((p - s) // 2) for c, s, p in axes
        )
