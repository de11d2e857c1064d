"""Stopping in order: a signal only sets a flag; the ranks agree on it at the next step boundary."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from segfleet.core.errors import ExitCode

# in the environment of a command that exits when asked to, while the jobs it waits for stay
LEAVE = "SEGFLEET_LEAVE"


class Interrupted(RuntimeError):
    """Training stopped because it was asked to. Everything is saved; the same command resumes."""

    exit_code = ExitCode.INTERRUPTED


class Paused(Interrupted):
    """A stop at a step that was agreed on before: the stage waits until it is resumed."""


def _interrupt() -> None:
    raise KeyboardInterrupt


class StopRequest:
    """Set by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, a file named `stop` in the run folder, or a
    deadline. A second SIGINT stops at once.

    `deadline` is a time of day (seconds since 1970) by which all must be saved; the request comes
    `margin` seconds before it, or three times the longest pause between two looks if that is more:
    such a pause holds a step, a save and a validation.
    """

    def __init__(self, watch: Path | None = None):
        self.reason: str | None = None
        self.watch = watch
        self.later: Path | None = None  # there once a later start has taken this one's place
        self.deadline: float | None = None
        self.margin = 60.0
        self.at_once: Callable[[], None] = _interrupt  # what a second SIGINT does
        self._start = self._looked = time.time()
        self._longest = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        if number == signal.SIGINT and self.reason:
            signal.signal(number, signal.SIG_IGN)  # a third one would cut off what says so
            self.at_once()
        self.reason = signal.Signals(number).name

    def asked(self) -> bool:
        if self.reason is None and self.watch is not None and self.watch.exists():
            self.reason = f"the file {self.watch.name}"
        if self.reason is None and self.later is not None and self.later.exists():
            self.reason = "a later start of the same job"
        if self.reason is None and self.deadline is not None and self._too_late(self.deadline):
            self.reason = "the time limit"
        return self.reason is not None

    def obeyed(self) -> str | None:
        """After an agreed stop, by one rank alone: the file that asked for it, if one did. It is
        removed: it has done its work."""
        self.asked()  # another rank may have seen it first
        if self.watch is None or not (self.reason or "").startswith("the file"):
            return None
        self.watch.unlink(missing_ok=True)
        return str(self.watch)

    def _too_late(self, deadline: float) -> bool:
        now = time.time()
        self._longest, self._looked = max(self._longest, now - self._looked), now
        # Never more than a third of the time there is, or a slow start would leave none for work.
        lead = min(max(self.margin, 3 * self._longest), (deadline - self._start) / 3)
        return now > deadline - lead
