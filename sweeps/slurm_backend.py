"""Nodes of the tree as SLURM jobs. The controller holds no GPU: each of Tune's trials submits one job and waits for it.

A job outlives its controller. Started again, the sweep finds it by the node's own folder and waits for it instead of submitting another.
Preemption and time limits are the job's own business: it saves, comes back and stays the same trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from segfleet.preprocess.problems import InputError
from segfleet.slurm import cluster
from segfleet.slurm.jobspec import JobSpec, make_spec
from segfleet.slurm.local import INTERRUPTED, RankFailed
from segfleet.slurm.slurm_job import SlurmJob, attach
from segfleet.slurm.submitit_launcher import SlurmLauncher

LOOK = 5.0  # seconds between looks at the queue
ALIVE = ("queued", "running")


class Slurm:
    """order["options"]: {"cluster": a profile's name or null, "spec": fields of a JobSpec}."""

    def run(self, order: dict[str, Any], poll: Callable[[], None]) -> None:
        job = self._known(Path(order["path"])) or self._submit(order)
        try:
            looked, state = 0.0, "queued"
            while state in ALIVE:
                poll()
                if time.monotonic() - looked > LOOK:
                    state, looked = job.state(), time.monotonic()
                time.sleep(0.2)
        except BaseException:  # stopped by the scheduler, or by a fault of ours: nobody waits for the job any more
            with suppress(InputError):
                job.cancel()
            raise
        if state != "done":
            code = INTERRUPTED if state in ("stopped", "cancelled") else 1
            raise RankFailed(f"job {job.id} is {state}: {job.reason()}", code)

    def _known(self, path: Path) -> SlurmJob | None:
        """The job that an earlier controller submitted, if it lives."""
        try:
            job = attach(path)
        except InputError:
            return None
        return job if job.state() in ALIVE else None

    def _submit(self, order: dict[str, Any]) -> SlurmJob:
        job, spec = order["job"], spec_of(order["options"])
        return SlurmLauncher(ask=False).submit(Path(order["path"]), job["recipe"], Path(job["root"]), spec)


def spec_of(options: dict[str, Any]) -> JobSpec:
    return make_spec(options.get("spec") or {}, options.get("cluster"))


def check(options: dict[str, Any]) -> JobSpec:
    """The resources of every job, asked of the controller once. Raises InputError with SLURM's own words."""
    spec = spec_of(options)
    cluster.check(spec)
    return spec
