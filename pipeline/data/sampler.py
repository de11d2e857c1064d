"""Which patch is sample i of epoch e: a pure function of (seed, stage, epoch, i), whatever the
number of ranks or loader processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from segfleet.core.errors import InputError
from segfleet.pipeline.data import randomness
from segfleet.preprocess.stores.case_table import with_foreground
from segfleet.preprocess.stores.manifest import CaseEntry

EVERY, FOREGROUND = 0, 1  # streams of cases
MIX = 2  # streams of stores begin here


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One patch: its case and its first voxel (z, y, x) on the stored grid; negative where the case
    is smaller than the patch."""

    case: CaseEntry
    start: tuple[int, int, int]
    stage: int
    epoch: int
    index: int
    store: int = 0  # which of several it lies in


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
        stream, place = self._place(epoch, index, steps)
        return self._drawn(stream, place, stage, epoch, index)

    def _place(self, epoch: int, index: int, steps: int) -> tuple[int, int]:
        """The stream that a sample belongs to, and the how manieth of it in the stage it is."""
        step, slot = divmod(index, self.batch)
        centred = round(self.batch * self.foreground)
        some = self._has_foreground
        stream = FOREGROUND if slot >= self.batch - centred and some else EVERY
        width = centred if stream == FOREGROUND else self.batch - (centred if some else 0)
        place = (epoch * steps + step) * width + (
            slot - (self.batch - centred) if stream == FOREGROUND else slot
        )
        return stream, place

    @property
    def _has_foreground(self) -> bool:
        return len(self._with_foreground) > 0

    def _drawn(self, stream: int, place: int, stage: int, epoch: int, index: int) -> Draw:
        pool = (self.cases, self._with_foreground)[stream]
        cycle, position = divmod(place, len(pool))
        order = randomness.permutation(self.seed, stage, stream, cycle, len(pool))
        case = pool[int(order[position])]
        rng = randomness.generator(self.seed, randomness.PATCH, stage, epoch, index)
        start = self._centred(case, rng) if stream == FOREGROUND else self._anywhere(case, rng)
        return Draw(case=case, start=start, stage=stage, epoch=epoch, index=index)

    def _anywhere(self, case: CaseEntry, rng: np.random.Generator) -> tuple[int, int, int]:
        z, y, x = (
            int(rng.integers(0, s - p + 1)) if s > p else -((p - s) // 2)
            for s, p in zip(case.shape, self.patch, strict=True)
        )
        return z, y, x

    def _centred(self, case: CaseEntry, rng: np.random.Generator) -> tuple[int, int, int]:
        sampled = (case.foreground[label] for label in sorted(case.foreground))
        voxels = [voxels for voxels in sampled if len(voxels)]
        chosen = voxels[rng.integers(len(voxels))]
        centre = np.unravel_index(int(chosen[rng.integers(len(chosen))]), case.shape)
        axes = zip(centre, case.shape, self.patch, strict=True)
        z, y, x = (
            min(max(int(c) - p // 2, 0), s - p) if s > p else -((p - s) // 2) for c, s, p in axes
        )
        return z, y, x


@dataclass(frozen=True, kw_only=True)
class MixedSampler:
    """Draws from several stores, each with a sampler of its own: in every stretch of as many
    samples as the weights (less their common divisor) add up to, each has exactly its weight.

    So sample i is a pure function of (seed, stage, epoch, i), as it is for one store, and the cases
    of each store are visited as if it were alone. Samples centred on foreground come from stores
    that have some, by their weights.
    """

    parts: tuple[PatchSampler, ...]
    weights: tuple[int, ...]

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.parts[0].patch

    @property
    def seed(self) -> int:
        return self.parts[0].seed

    @functools.cached_property
    def _mixes(self) -> tuple[tuple[int, ...], ...]:
        """For either stream the samples of every store in a cycle."""
        mixes = []
        for stream in (EVERY, FOREGROUND):
            weights = [
                weight if stream == EVERY or part._has_foreground else 0
                for part, weight in zip(self.parts, self.weights, strict=True)
            ]
            mixes.append(tuple(weight // max(1, math.gcd(*weights)) for weight in weights))
        return tuple(mixes)

    def __getstate__(self) -> dict:
        """Without what each loader process makes for itself."""
        return {name: value for name, value in vars(self).items() if name[0] != "_"}

    def draw(self, stage: int, epoch: int, index: int, steps: int) -> Draw:
        """Sample `index` (0 <= index < steps * batch) of an epoch of `steps` steps."""
        leader = next((part for part in self.parts if part._has_foreground), self.parts[0])
        stream, place = leader._place(epoch, index, steps)
        counts = self._mixes[stream]
        cycle, position = divmod(place, sum(counts))
        stores, ranks = _mixed(self.seed, stage, MIX + stream, cycle, counts)
        store = int(stores[position])
        within = cycle * counts[store] + int(ranks[position])
        drawn = self.parts[store]._drawn(stream, within, stage, epoch, index)
        return replace(drawn, store=store)


@functools.lru_cache(maxsize=32)
def _mixed(
    seed: int, stage: int, stream: int, cycle: int, counts: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The stores of a cycle in order, and the how manieth of its store in the cycle each is."""
    stores = np.repeat(np.arange(len(counts)), counts)
    stores = stores[randomness.permutation(seed, stage, stream, cycle, len(stores))]
    ranks = np.empty(len(stores), np.int64)
    for store, count in enumerate(counts):
        ranks[stores == store] = np.arange(count)
    return stores, ranks
