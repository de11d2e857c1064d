"""What happened in a stage: JSON lines in `events.jsonl`, and the same numbers for those who watch
the run elsewhere (`reports/trackers.py`). Written by rank 0 alone."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import is_uid, read_file, write_atomically
from segfleet.core.progress import EVENTS, parse_event
from segfleet.pipeline.reports.trackers import Trackers

THIN = 20_000  # steps of a stage after which its file gets fewer of them


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of a stage folder in order. A line cut off by a kill is left out, as is a file that
    was put there from another stage."""
    for line in _whole(Path(folder) / EVENTS).splitlines():
        if (event := parse_event(line)) is None:
            continue
        if _of_another(folder, event):
            return
        yield event


def recent_events(
    folder: Path,
) -> tuple[dict[str, Any] | None, int, list[dict[str, Any]]]:
    """Where a stage stands: its last beginning, how often it was resumed, and its last
    two steps. Of a long file these lines alone are decoded."""
    whole = _whole(Path(folder) / EVENTS)
    begun = next(_backwards(whole, "stage_start"), None)
    if begun and _of_another(folder, begun):
        return None, 0, []
    steps = list(itertools.islice(_backwards(whole, "step"), 2))[::-1]
    resumed = sum(parse_event(line) is not None for line in _lines(whole, "resumed"))
    return begun, resumed, steps


def ended(folder: Path) -> bool:
    """Whether the last thing a stage's file says is that it was trained to its end."""
    last = _whole(Path(folder) / EVENTS).rstrip().rpartition(b"\n")[2]
    return last.startswith(_mark("finished"))


def _of_another(folder: Path, event: dict[str, Any]) -> bool:
    """Whether an event was written for another stage, which is said."""
    if "of" not in event:  # as nearly all
        return False
    path = Path(folder).absolute() / EVENTS
    own = path.parent.name
    if event["of"] == own or not is_uid(own):
        return False
    sys.stderr.write(f"segfleet: {path} was written for {event['of']} and is left out\n")
    return True


def _whole(path: Path) -> bytes:
    """Nothing, if there is no file."""
    try:
        return read_file(path)
    except FileNotFoundError:
        return b""
    except ValueError:
        sys.stderr.write(f"segfleet: {path} is no file and is left out\n")
        return b""


def _backwards(whole: bytes, kind: str) -> Iterator[dict[str, Any]]:
    """Events of a kind, the last one first."""
    mark, end = _mark(kind), len(whole)
    while (at := whole.rfind(mark, 0, end)) >= 0:
        if at == 0 or whole[at - 1 : at] == b"\n":
            stop = whole.find(b"\n", at)
            line = whole[at : stop if stop >= 0 else len(whole)]
            if (event := parse_event(line)) is not None:
                yield event
        end = at


def _lines(whole: bytes, kind: str) -> Iterator[bytes]:
    mark, at = _mark(kind), -1
    while (at := whole.find(mark, at + 1)) >= 0:
        if at == 0 or whole[at - 1 : at] == b"\n":
            stop = whole.find(b"\n", at)
            yield whole[at : stop if stop >= 0 else len(whole)]


def _mark(kind: str) -> bytes:
    """How a line of `EventLog` begins."""
    return json.dumps({"event": kind}).encode()[:-1]


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


def comes_to_file(last: int, step: int) -> bool:
    """Whether the file gets a step's numbers after those of step `last`: all of them up to step
    20,000, then every second one, from 40,000 on every fourth, and so on. So a stage of a million
    steps has 7,600 lines and not 100,000, and each is near its neighbours."""
    if step < THIN:
        return True
    gap = 10 * 2 ** ((step // THIN).bit_length())
    return step // gap != last // gap


class EventLog:
    """Appends events. Those of steps get fewer as a stage gets longer (`comes_to_file`). Opened at
    a step, it forgets what a killed process logged after the checkpoint of that step. `listen`
    gets every event as it is written, `trackers` the numbers of those that have a step."""

    def __init__(
        self,
        folder: Path,
        step: int,
        listen: Callable[[dict[str, Any]], None] | None,
        trackers: Trackers | None = None,
    ):
        self.path = folder / EVENTS
        earlier = [event for event in read_events(folder) if event.get("step", 0) <= step]
        write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in earlier))
        self._file = open(self.path, "a", encoding="utf-8")
        self._listen, self._trackers = listen, trackers
        self._step, self._waiting = step, ""

    def write(self, event: str, **fields: Any) -> None:
        """One event."""
        if self._listen:
            self._listen({"event": event, **fields})
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n"
        step = fields.get("step")
        if event == "step" and not comes_to_file(self._step, fields["step"]):
            self._waiting = line  # it is written if anything else happens before the next one is
        else:
            self._file.write(line if event == "step" else self._waiting + line)
            self._file.flush()
            self._step, self._waiting = self._step if step is None else step, ""
        numbers = {
            f"{event}/{name}": value
            for name, value in fields.items()
            if name not in ("step", "epoch")
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        }
        if self._trackers and numbers and step is not None:
            self._trackers.numbers(numbers, step)

    def check_place(self) -> None:
        """Raises InputError where the folder was moved or removed: what is written from now on
        would lie apart from what was written before."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return
        raise InputError(
            f"run: {self.path.parent} was moved or removed while it was being trained. Put it back "
            "and run the same command again: it goes on from the last checkpoint"
        )

    def pictures(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Pictures (Y, X, 3) uint8 by name, for the trackers alone."""
        if self._trackers:
            for name, pixels in images.items():
                self._trackers.picture(name, pixels, step)

    def close(self) -> None:
        self._file.write(self._waiting)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._trackers:
            self._trackers.close()


BEGUN = ("stage_start", "resumed")  # events with which ranks begin to work on a stage


def training_of(folders: Iterable[Path]) -> dict[str, Any]:
    """What training the stages in these folders took: {"seconds", "joules", "hardware": [...]};
    None where nothing is known."""
    return training_by([list(read_events(folder)) for folder in folders])


def training_by(stages: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """The same of the events of every stage."""
    events = [event for stage in stages for event in stage]
    energy = [event["joules"] for event in events if event.get("joules") is not None]
    begun = [event for event in events if event.get("event") in BEGUN]
    timed = any("time" in event for event in events)
    return {
        "seconds": sum(map(trained_seconds, stages)) if timed else None,
        "joules": sum(energy) if energy else None,
        "hardware": list(dict.fromkeys(e["hardware"] for e in begun if "hardware" in e)),
    }


def trained_seconds(events: Iterable[dict[str, Any]]) -> float:
    """How long the ranks worked on a stage, by its events: validation included and pauses left
    out."""
    total, start, last = 0.0, None, None
    for event in events:
        if "time" not in event:
            continue
        if event.get("event") in BEGUN:
            total += (last - start) if start is not None else 0.0
            start = event["time"]
        last = event["time"]
    return total + (last - start if start is not None else 0.0)
