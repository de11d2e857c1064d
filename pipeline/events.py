"""What happened in a stage: JSON lines in `events.jsonl`, and the same numbers for those who watch
the run elsewhere (`trackers.py`). Written by rank 0 alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.files import is_uid, write_atomically
from segfleet.core.progress import EVENTS, parse_event
from segfleet.pipeline.trackers import Trackers


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of a stage folder in order. A line cut off by a kill is left out, as is a file that was
    put there from another stage."""
    path = Path(folder) / EVENTS
    if not path.exists():
        return
    own = path.absolute().parent.name
    with open(path, "rb") as file:
        for line in file:
            if (event := parse_event(line)) is None:
                continue
            if event.get("of", own) != own and is_uid(own):
                sys.stderr.write(
                    f"segfleet: {path} was written for {event['of']} and is left out\n"
                )
                return
            yield event


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
    checkpoint of that step. `listen` hears every event as it is written, `trackers` the numbers of
    those that have a step."""

    def __init__(
        self,
        folder: Path,
        step: int,
        listen: Callable[[dict[str, Any]], None] | None,
        trackers: Trackers | None = None,
    ):
        self.path = folder / EVENTS
        kept = [event for event in read_events(folder) if event.get("step", 0) <= step]
        write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = open(self.path, "a", encoding="utf-8")
        self._listen, self._trackers = listen, trackers

    def write(self, event: str, **facts: Any) -> None:
        """One event."""
        if self._listen:
            self._listen({"event": event, **facts})
        self._file.write(
            json.dumps({"event": event, "time": round(time.time(), 3), **facts}) + "\n"
        )
        self._file.flush()
        step = facts.get("step")
        numbers = {
            f"{event}/{name}": value
            for name, value in facts.items()
            if name not in ("step", "epoch")
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        }
        if self._trackers and numbers and step is not None:
            self._trackers.numbers(numbers, step)

    def pictures(self, found: Mapping[str, np.ndarray], step: int) -> None:
        """Pictures (Y, X, 3) uint8 by name, for the trackers alone."""
        for name, pixels in found.items() if self._trackers else ():
            self._trackers.picture(name, pixels, step)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._trackers:
            self._trackers.close()
