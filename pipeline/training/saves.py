"""The checkpoints of a stage while it is trained: when the next one is due, which are kept."""

from __future__ import annotations

import time

from segfleet.pipeline import checkpoint
from segfleet.pipeline.engines.base import Engine
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.run import StageFolder
from segfleet.pipeline.training.progress import Progress

KEEP = 2  # newest checkpoints kept besides the best ones


class Saves:
    """`step` is that of the last checkpoint, -1 before there is one. Rank 0 writes and has the
    clock."""

    def __init__(self, folder: StageFolder, recipe: Recipe, ranks: Ranks, step: int):
        self.folder, self.recipe, self.ranks, self.step = folder, recipe, ranks, step
        self.saver, self.since = checkpoint.Saver(folder.checkpoints), time.monotonic()

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for a new one."""
        late = time.monotonic() - self.since >= 60 * self.recipe.save_minutes
        return self.ranks.rank == 0 and late

    def save(self, engine: Engine, progress: Progress) -> None:
        """Begin to write, once a step. Every rank takes part in gathering the tensors."""
        if progress.step <= self.step:
            return
        tensors = engine.tensors()
        if self.ranks.rank == 0:
            self.saver.save(progress.step, tensors, progress.state(self.recipe, self.folder.index))
        self.step, self.since = progress.step, time.monotonic()

    def publish(self, progress: Progress, wait: bool = False) -> None:
        """A save that is written, or after a `wait` the one under way."""
        if self.saver.wait() if wait else self.saver.poll():
            self.prune(progress, KEEP)

    def prune(self, progress: Progress, keep: int) -> None:
        best = {checkpoint.folder_name(step) for step in progress.best_steps}
        checkpoint.prune(self.folder.checkpoints, keep, best)
