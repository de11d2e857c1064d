"""What happened in a stage: JSON lines in `events.jsonl`, the same numbers for TensorBoard in
`tensorboard/`. Written by rank 0 alone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from segfleet.core.files import write_atomically
from segfleet.core.progress import EVENTS, parse_event


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of a stage folder in order. A line cut off by a kill is left out."""
    path = Path(folder) / EVENTS
    if not path.exists():
        return
    with open(path, "rb") as file:
        yield from (event for line in file if (event := parse_event(line)) is not None)


class Lines:
    """Events as lines for a log file: the first step of a stage and at most one in ten seconds
    afterwards, every other event."""

    EVERY = 10.0

    def __init__(self, write: Callable[[str], Any]):
        self.write, self.stage, self.steps, self.last = write, "", None, float("-inf")

    def __call__(self, event: dict[str, Any]) -> None:
        kind, step = event["event"], event.get("step")
        if kind in ("stage_start", "resumed"):
            self.stage, self.steps = f"stage {event['stage'] + 1}", event.get("steps", self.steps)
            begin = f"resumed after step {event['from_step']}" if kind == "resumed" else "begins"
            self._line(f"{self.stage} {begin}, {event['ranks']} rank(s)")
            self.last = float("-inf")
        elif kind == "step" and time.monotonic() - self.last >= self.EVERY:
            self.last = time.monotonic()
            of = f"/{self.steps}" if self.steps else ""
            self._line(
                f"{self.stage}, epoch {event['epoch'] + 1}, step {step}{of}: loss "
                f"{event['loss']:.4f}, lr {event['lr']:.3g}, {event['samples_per_second']:g} "
                "samples/s"
            )
        elif kind == "validation":
            dice = event["dice"]
            self._line(
                f"{self.stage}, step {step}: validation, Dice "
                + ("not defined" if dice is None else f"{dice:.4f}")
            )
        elif kind == "non_finite":
            self._line(
                f"{self.stage}, step {step}: {event['skipped']} step(s) skipped so far, their "
                f"gradient was not finite; cases {', '.join(event['cases'][:8])}"
            )

    def _line(self, text: str) -> None:
        self.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class EventLog:
    """Appends events. Opened at a step, it forgets what a killed process logged after the
    checkpoint of that step. `listen` hears every event as it is written."""

    def __init__(self, folder: Path, step: int, listen: Callable[[dict[str, Any]], None] | None):
        self.path = folder / EVENTS
        kept = [event for event in read_events(folder) if event.get("step", 0) <= step]
        write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = None
        self._folder, self._step, self._listen = folder, step, listen

    def write(self, event: str, **facts: Any) -> None:
        """One event. Numbers of events that have a step also go to TensorBoard."""
        if self._listen:
            self._listen({"event": event, **facts})
        self._file.write(
            json.dumps({"event": event, "time": round(time.time(), 3), **facts}) + "\n"
        )
        self._file.flush()
        step = facts.get("step")
        if step is None:
            return
        for name, value in facts.items():
            if (
                name not in ("step", "epoch")
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                self._tensorboard().add_scalar(f"{event}/{name}", value, step)

    def _tensorboard(self):
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(self._folder / "tensorboard"), purge_step=self._step + 1, flush_secs=30
            )
        return self._board

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()
