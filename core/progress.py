"""How long work says where it stands, and how others follow it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segfleet.core.files import regular

Progress = Callable[[int, int], None]  # done, total
EVENTS = "events.jsonl"  # of a stage: one JSON object a line, appended as things happen


def silent(done: int, total: int) -> None:
    """The progress callback of whoever does not ask."""


class EventFollower:
    """Reads a stage's `events.jsonl` as it grows: every event once, whole lines alone.

    A stage that is resumed cuts the file back to its checkpoint and goes on; events after that are
    new ones, also those of steps that were reported before.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / EVENTS
        self._offset = 0  # bytes read
        self._file: int | None = None  # and of which file

    def new(self) -> list[dict[str, Any]]:
        """Events that were written since the last call; none while there is no file."""
        try:
            with open(self.path, "rb", opener=regular) as file:
                status = os.fstat(file.fileno())
                if status.st_size < self._offset or status.st_ino != self._file:
                    self._offset, self._file = 0, status.st_ino
                file.seek(self._offset)
                block = file.read()
        except (FileNotFoundError, ValueError):
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [event for line in whole.splitlines() if (event := parse_event(line)) is not None]


FAR = 1e11  # more steps than anybody trains, and seconds since 1970 till the year 5138
# what is always in an event of a kind
NUMBERS = {"stage_start": ("steps",), "step": ("step", "loss"), "validation": ("step",)}


def parse_event(line: bytes | str) -> dict[str, Any] | None:
    """One event, or None for a line that is damaged, or what a killed process left of one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    needed = NUMBERS.get(event["event"], ())
    numbers = {"time", "step", "samples_per_second", *needed} & event.keys()
    whole = all(isinstance(event[name], int | float) for name in numbers)
    # a time that no calendar has would end whoever shows it; a loss may be anything
    whole = whole and all(
        0 <= event[name] < FAR for name in ("time", "step", "steps") if name in numbers
    )
    return event if whole and event.keys() >= set(needed) else None
