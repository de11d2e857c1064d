"""Nodes of the tree as SLURM jobs. The controller holds no GPU: each of Tune's trials submits one
job and waits for it.

A job outlives its controller. Started again, the sweep finds it by the node's own folder and waits
for it instead of submitting another. Preemption and time limits are the job's own business: it
saves, comes back and stays the same trial. While SLURM is silent, this waits.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from segfleet.core.errors import ExitCode, InputError
from segfleet.pipeline.launch.local import RankFailed
from segfleet.slurm import cluster
from segfleet.slurm.job import OPEN, SlurmJob, attach
from segfleet.slurm.jobspec import JobSpec, make_spec
from segfleet.slurm.submission import train_job
from segfleet.slurm.submitit_launcher import QueueFull, SlurmLauncher, job_name

LOOK = 5.0  # seconds between looks at the queue


class Slurm:
    """order["options"]: {"cluster": a profile's name or null, "spec": fields of a JobSpec}."""

    end: float | None = None  # of time.monotonic(); the first attempt sets it for all

    def run(self, order: dict[str, Any], poll: Callable[[], None]) -> None:
        stop = Path(order["path"]) / "stop"  # the ranks look at it, and do not come back then
        if self.end is None:
            self.end = time.monotonic() + order["job"].get("max_seconds", math.inf)

        def tick() -> None:
            poll()
            if time.monotonic() > self.end:
                stop.touch()

        job = self._known(stop.parent) or self._submit(order, tick, stop)
        try:
            looked, state = 0.0, "queued"
            while state in OPEN:
                tick()
                if time.monotonic() - looked > LOOK:
                    state, looked = job.state(), time.monotonic()
                    if state == "queued" and stop.exists():  # nothing runs that would save and stop
                        with suppress(InputError):
                            job.cancel()
                time.sleep(0.2)
        except BaseException:
            # stopped by the scheduler, or by a fault of ours: nobody waits for the job any more
            with suppress(InputError):
                job.cancel()
            raise
        if state != "done":
            code = ExitCode.INTERRUPTED if state in ("stopped", "cancelled") else ExitCode.FAULT
            raise RankFailed(f"job {job.id} is {state}: {job.reason()}", code)

    def _known(self, path: Path) -> SlurmJob | None:
        """The job that an earlier controller submitted, if it lives."""
        try:
            job = attach(path)
        except InputError:
            return None
        return job if job.state() in OPEN else None

    def _submit(self, order: dict[str, Any], tick: Callable[[], None], stop: Path) -> SlurmJob:
        path, spec, root = (
            Path(order["path"]),
            spec_of(order["options"]),
            Path(order["job"]["root"]),
        )
        job = {**order["job"], **train_job(path, order["job"]["recipe"], root)}
        # kept by `run`: every start of the job would have all of it again
        job.pop("max_seconds", None)
        while True:
            try:
                return SlurmLauncher().submit_jobs(
                    [(path, job)], root, spec, job_name([path]), path
                )[0]
            except QueueFull:
                pass
            except InputError:
                if cluster.there_is_one() or shutil.which("sinfo") is None:  # that was the answer
                    raise
            while True:
                tick()
                if stop.exists():
                    raise RankFailed("stopped before SLURM took the job", ExitCode.INTERRUPTED)
                time.sleep(LOOK)
                if cluster.there_is_one():
                    break


def spec_of(options: dict[str, Any]) -> JobSpec:
    return make_spec(options.get("spec") or {}, options.get("cluster"))


def check(options: dict[str, Any]) -> JobSpec:
    """The resources of every job, asked of the controller once. Raises InputError with SLURM's own
    words."""
    spec = spec_of(options)
    cluster.check(spec)
    return spec
