"""One node of the tree, trained: ranks are started by a launcher, their events followed. No Ray and
no torch here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from segfleet.core.errors import ExitCode, InputError, check_one_of
from segfleet.core.files import sync_folder, write_atomically
from segfleet.core.lock import Holder, is_locked
from segfleet.core.partial import temporary_name
from segfleet.core.process import process_of
from segfleet.core.progress import EVENTS, EventFollower
from segfleet.pipeline.events import read_events
from segfleet.pipeline.launch.local import RankFailed, run_ranks
from segfleet.pipeline.run import LOCK, StageFolder
from segfleet.sweeps.order import Order
from segfleet.sweeps.stopping import ask, withdraw

Report = Callable[[dict[str, Any]], None]
# after a fault of the machine (a killed rank, say); the stage resumes from its last checkpoint
RETRIES = 1
BUSY = "is in use by"


class Backend(Protocol):
    """Where the ranks of a node run."""

    def run(self, order: Order, poll: Callable[[], None]) -> None:
        """Do order.job, calling `poll` often. Raises RankFailed. Whatever ends this call ends
        the ranks."""

    def taken(self, order: Order) -> bool:
        """Whether another process has asked for ranks of this node, which may not run yet."""

    def stop(self, order: Order) -> None:
        """Ask the ranks of this order, and no others, to save and stop. Raises RankFailed if
        they wait for another process's ranks to end."""


class Local:
    """Ranks on this machine."""

    def taken(self, order: Order) -> bool:
        return False  # who runs holds the lock

    def stop(self, order: Order) -> None:
        ask(order.path, _is_child)  # where another process trains, our ranks end by themselves

    def run(self, order: Order, poll: Callable[[], None]) -> None:
        # Ray sets it to the CPUs of its own worker
        os.environ["OMP_NUM_THREADS"] = str(order.threads)
        run_ranks(order.job, order.ranks, poll, order.threads)


def _is_child(holder: Holder) -> bool:
    if holder.host != socket.gethostname():
        return False
    process = process_of(holder.process)
    return process is not None and process.parent == os.getpid()


def slurm() -> Backend:
    from segfleet.sweeps.slurm_backend import Slurm

    return Slurm()


BACKENDS: dict[str, Callable[[], Backend]] = {"local": Local, "slurm": slurm}


def backend(name: str) -> Backend:
    check_one_of("sweep: --on", name, BACKENDS)
    return BACKENDS[name]()


def perform(
    order: Order, report: Report, watch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train a node: {"state": done | stopped | paused | busy | failed, "message": ...}. `report`
    gets every validation as it comes; what `watch`, called often, raises ends the ranks."""
    path, stop = order.path, order.sweep / "stop"
    if stop.exists():
        return {"state": "stopped"}
    path.mkdir(parents=True, exist_ok=True)
    if is_locked(path / LOCK) or (where := backend(order.on)).taken(order):
        return {"state": "busy"}  # another process's run: its file `stop` is not ours to touch
    (path / "stop").unlink(missing_ok=True)  # no ranks run here: it has done its work
    if order.trunk:
        epochs = order.job.recipe["stages"][-1]["epochs"]
        continue_from(order.trunk, path, epochs * order.steps)
    validations = Validations(path, order, report)

    def look() -> None:
        watch()
        validations.poll()

    def poll() -> None:
        look()
        if stop.exists():
            where.stop(order)

    try:
        result = _run(where, order, poll, look)
    finally:
        withdraw(path)
    pause = math.inf if order.pause is None else order.pause
    if result["state"] == "stopped" and validations.reached >= pause:
        return {"state": "paused", **validations.last}
    return result


def _run(
    where: Backend, order: Order, poll: Callable[[], None], look: Callable[[], None]
) -> dict[str, Any]:
    for attempt in range(RETRIES + 1):
        try:
            where.run(order, poll)
            look()
            return {"state": "done"}
        except (RankFailed, InputError) as error:
            if error.exit_code == ExitCode.INTERRUPTED:
                look()
                return {"state": "stopped"}
            if BUSY in str(error):
                return {"state": "busy"}
            if error.exit_code != ExitCode.FAULT or attempt == RETRIES:
                return {"state": "failed", "message": str(error)}
    raise AssertionError("unreachable")


def continue_from(trunk: Path, path: Path, steps: int) -> None:
    """Let the stage in `path` start from the last checkpoint of a shorter one that differs in
    length alone. Does nothing the second time.

    Exact, because order, rate and randomness of a step depend on its number and not on the stage's
    length. The best checkpoints so far come along: the longer stage may find none better.
    """
    checkpoints = path / "checkpoints"
    if (done := StageFolder(path=trunk, index=0).done()) is None:
        return  # damaged: the stage is trained from its own beginning
    name = done["checkpoint"]
    best = {f"step-{checkpoint['step']:08d}" for checkpoint in done["best"].values()} - {name}
    present = {checkpoint.name for checkpoint in checkpoints.glob("step-*")}
    if present - best:  # the best ones come first: alone, they were left by a kill
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    for best_name in sorted(best - present):
        os.replace(_copied(trunk / "checkpoints" / best_name, checkpoints), checkpoints / best_name)
    partial = _copied(trunk / "checkpoints" / name, checkpoints)
    events = [
        {**event, "of": path.name, **({"steps": steps} if event["event"] == "stage_start" else {})}
        if "of" in event
        else event
        for event in read_events(trunk)
    ]
    write_atomically(path / EVENTS, "".join(json.dumps(event) + "\n" for event in events))
    os.replace(partial, checkpoints / name)
    sync_folder(checkpoints)


def _copied(checkpoint: Path, checkpoints: Path) -> Path:
    """A checkpoint under a temporary name in another folder."""
    partial = temporary_name(checkpoints / checkpoint.name)
    shutil.copytree(checkpoint, partial, copy_function=_link)
    return partial


def _link(source: str, target: str) -> None:
    """No second copy of the bytes where the file system can: a published checkpoint never
    changes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Validations:
    """Reports the validations of a node as they are written, each once."""

    def __init__(self, path: Path, order: Order, report: Report):
        self.events, self.report = EventFollower(path), report
        self.begin, self.steps = order.begin, order.steps
        self.measure = order.measure
        self.reported = order.start  # epochs of the stage; the trunk reported its own
        self.last: dict[str, Any] = {}

    @property
    def reached(self) -> int:
        """Epochs along the path."""
        return self.begin + self.reported

    def poll(self) -> None:
        for event in self.events.new():
            epochs = event.get("step", 0) // self.steps
            if event["event"] == "validation" and epochs > self.reported:
                self.reported = epochs
                self.last = {"epochs": self.begin + epochs, "dice": event.get(self.measure) or 0.0}
                self.report(self.last)
