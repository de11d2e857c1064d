"""A sweep from start to end. Run it, kill it, run it again: only what is missing on disk is
trained.

Ray lives in a process of its own (`ray_controller.py`). If that dies, or Ray does, another one is
started and resumes from what is on disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from segfleet.core.errors import ExitCode, InputError
from segfleet.core.machine import cpus, mig_slices, threads_of
from segfleet.pipeline.launch.local import RankFailed, signals_to
from segfleet.pipeline.run import lock_stage
from segfleet.pipeline.stop import LEAVE, Interrupted
from segfleet.slurm import snapshot
from segfleet.sweeps import threads
from segfleet.sweeps.ray import keeper
from segfleet.sweeps.results.ledger import STOP, Ledger
from segfleet.sweeps.search.tree_search import start
from segfleet.sweeps.slurm_backend import Detached
from segfleet.sweeps.space.plan import Plan, codes_of, foreign, prepare_folder
from segfleet.sweeps.trial import backend

JOBS = 16  # in SLURM's queue at a time, by default
RAY = ("gcs_server", "raylet/raylet")  # a session without one of these hangs, or waits for minutes
JOINING = 60.0  # seconds that a cluster may take to let us in
FRUITLESS = 3  # sessions in a row that may die before one more stage is done
LOG = "ray.log"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """`slots` nodes of the tree at a time, each with `ranks` processes. `address`: a Ray cluster to
    attach to; none: one of our own."""

    slots: int | None = None
    ranks: int = 1
    on: str = "local"
    address: str | None = None
    options: dict[str, Any] | None = None  # of the back end

    @property
    def threads(self) -> int:
        """Of every rank."""
        return threads_of() or max(1, cpus() // (self.at_once * self.ranks))

    @property
    def at_once(self) -> int:
        return self.slots or (
            JOBS if self.on == "slurm" else max(1, (gpus() or cpus()) // self.ranks)
        )

    def check(self) -> None:
        """Raises InputError for what cannot run, before anything is written."""
        backend(self.on)
        if self.on == "slurm":
            if self.ranks > 1:
                advice = f"use --resource ranks_per_node={self.ranks}"
                raise InputError(
                    f"sweep: --ranks: found {self.ranks} with --on slurm, whose jobs say it; "
                    f"{advice}"
                )
            from segfleet.sweeps.slurm_backend import check

            check(self.options or {})


def gpus() -> int:
    """GPUs, or slices of them, that ranks here would train on, by the rule of `ranks.pick_device`;
    CUDA_VISIBLE_DEVICES counts."""
    if os.environ.get("SEGFLEET_DEVICE", "cuda") != "cuda":
        return 0
    if slices := mig_slices():
        return len(slices)
    import torch  # the check of the plan's networks has loaded it

    return torch.cuda.device_count()


def frozen_elsewhere(plan: Plan) -> Path | None:
    """The frozen code that this sweep began with, if what runs here is another version."""
    codes = codes_of(plan)
    if not codes or codes[-1]["hash"] == snapshot.digest():
        return None
    return snapshot.frozen(plan.runs, codes[-1]["hash"])


def settle_code(plan: Plan, current: bool) -> list[dict[str, Any]]:
    """One version of segfleet for all stages, whenever they start: what runs here, frozen. Raises
    InputError if the sweep began with another one, unless `current` says that it continues with
    this.
    """
    codes, now = codes_of(plan), snapshot.freeze_code(plan.runs).name
    if not codes or codes[-1]["hash"] != now:
        if codes and not current:
            last, commit = codes[-1]["hash"], codes[-1]["commit"] or "no commit"
            raise InputError(
                f"sweep {plan.search.space.name}: it began with the code {last} ({commit}), here "
                f"is {now}. --code frozen goes on with the code that it began with, --code current "
                "with this one; stages whose network, loss or data path changed are then trained "
                "again"
            )
        codes = [*codes, {"hash": now, "commit": snapshot.commit()["commit"]}]
    return codes


def run_sweep(
    plan: Plan,
    resources: Resources,
    progress: Callable[[int, int], None] = lambda done, total: None,
    current: bool = False,
) -> Ledger:
    """Train and score what is missing. `current`: see `settle_code`. Raises InputError for the
    user's mistakes, Interrupted after an agreed stop."""
    resources.check()
    if fault := foreign(plan):
        raise InputError(fault)
    lock = lock_stage(plan.folder)  # first: who is refused changes nothing
    try:
        prepare_folder(plan, settle_code(plan, current))
        (plan.folder / STOP).unlink(missing_ok=True)
        ledger = Ledger(plan.tree, plan.runs, plan.folder)
        ledger.forget_failures()
        if ledger.open() or not plan.complete:
            with listening(plan.folder, detaches=resources.on == "slurm") as detach:
                if resources.on == "slurm":
                    _run_threads(plan, resources, progress, detach)
                else:
                    _run_sessions(plan, resources, progress)
            plan.catch_up()
            ledger = Ledger(plan.tree, plan.runs, plan.folder)
        ended = plan.complete and all(
            state in ("done", "pruned", "lost", "failed") for state in ledger.states().values()
        )
        if (plan.folder / STOP).exists() and not ended:
            raise Interrupted(
                "the sweep stopped in order; all saved. Run the same command again to go on."
            )
        if plan.search.space.budget.hours and not ended:
            sys.stderr.write(
                "segfleet: budget.hours is used up; all saved. Run the same command again to go "
                "on.\n"
            )
        return ledger
    finally:
        lock.release()


def _run_threads(
    plan: Plan,
    resources: Resources,
    progress: Callable[[int, int], None],
    detach: threading.Event,
) -> None:
    """Jobs of SLURM, waited for by this process: no Ray where no rank runs. Raises Interrupted if
    it is to exit while the jobs stay."""
    hours = plan.search.space.budget.hours
    search = start(plan, resources, progress, 3600 * hours if hours else None)
    try:
        threads.drive(search, resources.at_once, detach)
    except Detached:
        raise Interrupted(
            "the sweep's own job goes and its stages' jobs stay; the same command goes on with them"
        ) from None


def _run_sessions(plan: Plan, resources: Resources, progress: Callable[[int, int], None]) -> None:
    """Sessions of Ray, one after another, until one ends in order."""
    hours = plan.search.space.budget.hours
    end = time.monotonic() + 3600 * hours if hours else None
    died, last = 0, -1
    while True:
        seconds = max(1.0, end - time.monotonic()) if end else None
        fault = Session(plan, resources, seconds).follow(progress)
        if fault is None:
            return
        plan.catch_up()
        finished = Ledger(plan.tree, plan.runs, plan.folder).epochs_done()
        died, last = (1 if finished > last else died + 1), finished
        log = plan.folder / LOG
        if died == FRUITLESS:
            raise RankFailed(
                f"sweep: {fault}, {FRUITLESS} times without a stage done in between; Ray's own "
                f"words are in {log}",
                1,
            )
        sys.stderr.write(f"segfleet: {fault}; started again, what is done stays done ({log})\n")


class Session:
    """One life of Ray: the process that drives it, watched from here."""

    def __init__(self, plan: Plan, resources: Resources, seconds: float | None):
        order = {
            "space": plan.search.space.model_dump(mode="json"), "base": plan.search.base,
            "runs": str(plan.runs),
            "resources": asdict(resources if resources.address else replace(resources,
                                                                            slots=resources.at_once)),
            "seconds": seconds,
        }  # fmt: skip
        code = snapshot.frozen(plan.runs, snapshot.digest())
        paths = [str(code)] if code else []
        paths += [path] if (path := os.environ.get("PYTHONPATH")) else []
        environment = {
            **os.environ,
            "SEGFLEET_PARENT": str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        command = [sys.executable, "-P", "-m", "segfleet.sweeps.ray.controller"]
        with open(plan.folder / LOG, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order))
            self.process.stdin.close()
        self.closing, self.error, self.watching = False, None, resources.address is None
        self.joined, self.until = False, time.monotonic() + JOINING
        self.parts: dict[str, Any] = {}  # of Ray -> its process

    def follow(self, progress: Callable[[int, int], None]) -> str | None:
        """Until it ends. None, or what went wrong: a Ray that dies also shows as an error of
        the process that talked to it. Raises InputError."""
        listener = threading.Thread(target=self._read_messages, args=(progress,), daemon=True)
        listener.start()
        fault = None
        try:
            while fault is None and self.process.poll() is None:
                time.sleep(0.5)
                fault = None if self.closing else self._missing()
        finally:
            self._end()
            listener.join()
        if self.error and self.error["code"] == ExitCode.INPUT:
            raise InputError(self.error["error"])
        fault = fault or (self.error and self.error["error"])
        return fault or (
            f"the process that drives Ray ended with exit code {self.process.returncode}"
            if self.process.returncode
            else None
        )

    def _read_messages(self, progress: Callable[[int, int], None]) -> None:
        for line in self.process.stdout:
            with suppress(json.JSONDecodeError):  # a line that a killed process was writing
                message = json.loads(line)
                if "epochs" in message:
                    progress(*message["epochs"])
                elif "error" in message:
                    self.error = message
                self.closing = self.closing or "closing" in message
                self.joined = self.joined or "joined" in message

    def _missing(self) -> str | None:
        """Which part of a Ray of our own was there and is no more; or that a cluster is silent."""
        import psutil

        if not (self.watching or self.joined) and time.monotonic() > self.until:
            self.error = {
                "error": "sweep: --address: something answers there, but no Ray cluster of this "
                f"version and token let us in within {JOINING:.0f} s",
                "code": ExitCode.INPUT,
            }
            return self.error["error"]

        if self.watching and len(self.parts) < len(RAY):
            for process, words in self._family():
                self.parts |= {
                    part: process for part in RAY if any(part in word for word in words[:1])
                }
        for part, process in self.parts.items():
            try:
                gone = process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                gone = True
            if gone and not self.closing and self.process.poll() is None:
                return f"Ray died ({Path(part).name} was killed; out of memory?)"
        return None

    def _family(self) -> list[tuple[Any, list[str]]]:
        """Every process below the driving one, with its command; a zombie has none."""
        import psutil

        family = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    family.append((child, child.cmdline()))
        return family

    def _end(self) -> None:
        """No process of the session outlives it."""
        import psutil

        # the keeper ends by itself, and before it whatever else is left of the session
        family = [process for process, words in self._family() if keeper.MODULE not in words]
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=30)


@contextmanager
def listening(folder: Path, detaches: bool) -> Iterator[threading.Event]:
    """Ctrl-C and the like: the ranks save and stop, by the file `stop` in the folder, which anybody
    may write. Ctrl-C twice: at once. In a job of its own, of a sweep whose stages are jobs, a
    signal means that this process exits alone: the event is set."""
    asked: set[int] = set()
    detach, alone = threading.Event(), detaches and os.environ.get(LEAVE) == "1"

    def ask(number: int, _) -> None:
        if alone:
            detach.set()
            return
        if number in asked and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        if not asked:
            (folder / STOP).touch()
            sys.stderr.write("segfleet: stopping; the ranks save first (once more: stop at once)\n")
        asked.add(number)

    with signals_to(ask):
        yield detach
