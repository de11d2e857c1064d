"""Stopping in order: a signal only sets a flag; the ranks agree on it at the next step boundary."""

from __future__ import annotations

import signal
import time
from pathlib import Path


class Interrupted(RuntimeError):
    """Training stopped because it was asked to. Everything is saved; the same command goes on."""

    exit_code = 75


class StopRequest:
    """Set by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, by the file `watch`, or by the clock at `deadline` (of time.monotonic()).

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.watch: Path | None = None
        self.deadline: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def asked(self) -> bool:
        if self.reason is None and self.watch is not None and self.watch.exists():
            self.reason = f"the file {self.watch}"
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        return self.reason is not None
