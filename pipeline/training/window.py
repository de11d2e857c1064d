"""What the loop measures between two reports: waiting for data, losses, norms, skipped steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from segfleet.core.errors import InputError
from segfleet.pipeline.events import EventLog
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.training.progress import Progress
from segfleet.pipeline.training.stream import Stream

PATIENCE = 20  # non-finite steps in a row before a run gives up


class Diverged(InputError):
    """The loss stayed non-finite, or the network's output for a whole case is. The last checkpoint
    is from before."""


class Hunger:
    """Says once when the network waits for the loader a fifth of a minute or more."""

    def __init__(self, workers: int, warn: Callable[[str], None]):
        self.workers, self.warn = workers, warn
        self.waited = self.seconds = 0.0
        self.said = False

    def note(self, waited: float, seconds: float) -> None:
        self.waited, self.seconds = self.waited + waited, self.seconds + seconds
        if self.seconds < 60:
            return
        if self.waited > 0.2 * self.seconds and not self.said:
            self.said = True
            self.warn(
                f"training waits for data {self.waited / self.seconds:.0%} of the time, with "
                f"data.workers={self.workers}. More cores per rank (submit --cpus) and more "
                "loader processes help, a store on the node's own disk (--stage-to), or less "
                "augmentation; the result stays the same with the first two"
            )
        self.waited = self.seconds = 0.0


class Window:
    """Losses since the last report, still on the device."""

    def __init__(self, stream: Stream, batch: int, hunger: Hunger):
        self.stream, self.batch, self.hunger = stream, batch, hunger
        self._clear()

    def _clear(self) -> None:
        self.losses, self.norms, self.cases = [], [], []
        self.start, self.stream.waited = time.perf_counter(), 0.0

    def add(self, loss: Tensor, norm: Tensor, epoch: int, lr: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.cases.append(self.stream.cases)
        self.stream.cases, self.epoch, self.lr = (), epoch, lr

    def report(self, progress: Progress, ranks: Ranks, log: EventLog | None) -> None:
        """Fetch, log, count the skipped steps. Raises Diverged after too many in a row, on all
        ranks together."""
        if not self.losses:
            return
        norms = torch.stack(self.norms).tolist()
        losses = (ranks.sum(torch.stack(self.losses)) / ranks.size).tolist()
        seconds = time.perf_counter() - self.start
        if log:
            self.hunger.note(self.stream.waited, seconds)
        bad: list[str] = []
        for norm, cases in zip(norms, self.cases, strict=True):
            if norm - norm == 0:  # finite
                progress.skipped_in_a_row = 0
                continue
            progress.skipped, progress.skipped_in_a_row = (
                progress.skipped + 1,
                progress.skipped_in_a_row + 1,
            )
            bad += [case for share in ranks.gather(cases) for case in share]
        good = [loss for loss, norm in zip(losses, norms, strict=True) if norm - norm == 0]
        if log:
            if good:
                log.write(
                    "step",
                    step=progress.step,
                    epoch=self.epoch,
                    loss=sum(good) / len(good),
                    lr=self.lr,
                    gradient=max(norm for norm in norms if norm - norm == 0),
                    samples_per_second=round(len(losses) * self.batch / seconds, 3),
                    waiting=round(self.stream.waited / seconds, 4),
                )
            if bad:
                log.write(
                    "non_finite",
                    step=progress.step,
                    epoch=self.epoch,
                    cases=sorted(set(bad)),
                    skipped=progress.skipped,
                )
        self._clear()
        if progress.skipped_in_a_row >= PATIENCE:
            raise Diverged(
                f"training: the loss was not finite for {progress.skipped_in_a_row} steps in a "
                f"row, the last at step {progress.step}, "
                f"cases {', '.join(sorted(set(bad))[:8])}. Lower stages.lr or set "
                "engine.precision=fp32; the last checkpoint is older."
            )
