"""Nodes of the tree as SLURM jobs. The controller holds no GPU and starts no Ray: a thread per job
submits it and waits for it, and one question to SLURM's queue serves them all.

A job outlives its controller. Started again, the sweep finds it by the node's own folder and waits
for it instead of submitting another. Preemption and time limits are the job's own business: it
saves, comes back and stays the same trial. While SLURM is silent, this waits.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from segfleet.core.errors import ExitCode, InputError
from segfleet.core.lock import Holder
from segfleet.pipeline.launch.local import RankFailed, signals_to
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.preprocess.stores.manifest import NAME
from segfleet.slurm import cluster, poll
from segfleet.slurm.job import JobStatus, SlurmJob, attach, look_at_all
from segfleet.slurm.jobspec import JobSpec, make_spec
from segfleet.slurm.submitit_launcher import QueueFull, SlurmLauncher, job_name
from segfleet.sweeps.order import Order
from segfleet.sweeps.stopping import ask

LOOK = 60.0  # seconds between looks at the queue; its own files show that a job has ended well
PAUSE = 0.5  # seconds between looks at a job's files


class Detached(Exception):
    """The process that waits for the ranks exits and they keep running: the next one finds them."""


# Threads talk to SLURM one after another: submitit submits with the environment of the process,
# which is another one for that moment.
TALK = threading.RLock()


class Queue:
    """States of many jobs, asked for all at once and not more often than every LOOK seconds."""

    def __init__(self) -> None:
        self.looked = -math.inf
        self.jobs: dict[str, SlurmJob] = {}
        self.found: dict[str, JobStatus] = {}

    def look(self, job: SlurmJob) -> JobStatus:
        """One that was not there at the last look is queued."""
        with TALK:
            self.jobs[job.id] = job
            if time.monotonic() - self.looked >= LOOK:
                looked = look_at_all(list(self.jobs.values()), min(LOOK, poll.seconds()))
                self.found = {other.id: status for other, status in looked}
                self.looked = time.monotonic()
            return self.found.get(job.id) or JobStatus(state="queued")

    def forget(self, job: SlurmJob) -> None:
        with TALK:
            self.jobs.pop(job.id, None)


QUEUE = Queue()


class Slurm:
    """order.options: {"cluster": a profile's name or null, "spec": fields of a JobSpec}."""

    end: float | None = None  # of time.monotonic(); the first attempt sets it for all

    def run(self, order: Order, poll: Callable[[], None]) -> None:
        stop = order.path / "stop"  # the ranks look at it, and do not come back then
        if self.end is None:
            self.end = time.monotonic() + (order.job.max_seconds or math.inf)

        def poll_until_end() -> None:
            poll()
            if time.monotonic() > self.end:
                self.stop(order)

        job = self._known(stop.parent) or self._submit(order, poll_until_end, stop)
        try:
            status = self._wait(job, poll_until_end, stop)
        except Detached:
            raise
        except BaseException:
            # stopped by the search, or by a fault of ours: no process waits for the job any more
            with suppress(InputError), TALK:
                job.cancel()
            raise
        finally:
            QUEUE.forget(job)
        if status.state != "done":
            stopped = status.state in ("stopped", "cancelled")
            code = ExitCode.INTERRUPTED if stopped else ExitCode.FAULT
            raise RankFailed(f"job {job.id} is {status.state}: {status.reason}", code)

    def taken(self, order: Order) -> bool:
        """Whether a job that another sweep or a person submitted trains this node, or waits to."""
        job = self._known(order.path)
        return job is not None and job.submission.settings().sweep != order.sweep

    def stop(self, order: Order) -> None:
        def is_its_job(holder: Holder) -> bool:
            try:
                return holder.job != "" and holder.job == attach(order.path).id
            except InputError:
                return False

        if not ask(order.path, is_its_job):  # the job may wait for days
            raise RankFailed("stopped while another process trains the stage", ExitCode.INTERRUPTED)

    def _wait(self, job: SlurmJob, poll: Callable[[], None], stop: Path) -> JobStatus:
        """What became of the job."""
        noticed = False
        while True:
            poll()
            if job.submission.outcome()[0] == "done":
                return JobStatus(state="done")
            status = QUEUE.look(job)
            if not status.open:
                return status
            if status.state == "queued" and stop.exists() and not noticed:
                with suppress(InputError), TALK:
                    if job.state() == "queued":  # nothing runs that would save and stop
                        job.cancel()
                    QUEUE.looked, noticed = -math.inf, True
            time.sleep(PAUSE)

    def _known(self, path: Path) -> SlurmJob | None:
        """The job that an earlier controller submitted, if it lives."""
        try:
            job = attach(path)
        except InputError:
            return None
        with TALK:  # not what was found a minute ago: whether to submit again hangs on it
            return job if job.look().open else None

    def _submit(self, order: Order, poll: Callable[[], None], stop: Path) -> SlurmJob:
        path, root = order.path, order.job.root
        spec = cluster.fed(spec_of(order.options), [order.job.recipe["data"]["workers"]])
        # the limit is kept by `run`: every start of the job would have all of it again
        job = order.of_job(run=path, waits=True, max_seconds=None).job
        while True:
            try:
                with TALK:
                    return SlurmLauncher().submit_jobs(
                        [(path, job)], root, spec, job_name([path]), path, sweep=order.sweep
                    )[0]
            except QueueFull:
                pass
            except InputError:
                with TALK:
                    answers = cluster.there_is_one() or shutil.which("sinfo") is None
                if answers:  # that was it
                    raise
            while True:
                poll()
                if stop.exists():
                    raise RankFailed("stopped before SLURM took the job", ExitCode.INTERRUPTED)
                time.sleep(min(LOOK, 5.0))
                with TALK:
                    if cluster.there_is_one():
                        break


def await_stores(made_by: dict[Path, list[SlurmJob]], name: str) -> None:
    """Until every store is there; the queue is asked once a minute for all. Raises InputError if
    the jobs of one have ended without it, Interrupted when asked to go, whereupon the jobs stay."""
    waiting = dict(made_by)
    with signals_to():
        stop = StopRequest()
        while True:
            for out, jobs in list(waiting.items()):
                statuses = [QUEUE.look(job) for job in jobs]
                if (out / NAME).is_file():
                    for job in jobs:
                        QUEUE.forget(job)
                    del waiting[out]
                elif not any(status.open for status in statuses):
                    last = statuses[-1]
                    raise InputError(
                        f"{name}: the jobs of the store {out} have ended without it; the last one, "
                        f"{last.job}, is {last.state}: {last.reason}. The same command submits "
                        "them again; what is finished is kept"
                    )
            if not waiting:
                return
            if stop.asked():
                raise Interrupted(
                    f"{name}: the jobs that make the stores stay; the same command goes on with "
                    "them"
                )
            time.sleep(PAUSE)


def spec_of(options: dict[str, Any]) -> JobSpec:
    return cluster.settled(make_spec(options.get("spec") or {}, options.get("cluster")))


def check(options: dict[str, Any]) -> JobSpec:
    """The resources of every job, asked of the controller once. Raises InputError with SLURM's own
    words."""
    spec = spec_of(options)
    cluster.check(spec)
    return spec
