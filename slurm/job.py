"""A run that was submitted to SLURM, as its queue, its accounting and the run's own files know
it."""

from __future__ import annotations

import getpass
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.preprocess.building.request import Preprocess, Survey, Write
from segfleet.slurm import cluster, poll
from segfleet.slurm.submission import Submission, latest, submissions, together

WORDS = {
    "queued": (
        "PENDING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
    ),
    "running": (
        "RUNNING",
        "COMPLETING",
        "CONFIGURING",
        "SUSPENDED",
        "STOPPED",
        "RESIZING",
        "SIGNALING",
        "STAGE_OUT",
    ),
    "done": ("COMPLETED",),
    "cancelled": ("CANCELLED",),
    "failed": (
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
        "PREEMPTED",
    ),
}
STATES = {word: state for state, words in WORDS.items() for word in words}
OPEN = ("queued", "running", "unknown")  # not known to have ended; unknown: SLURM does not answer
CLOCKS = 2 * 3600.0  # s by which the clocks of machines that share a folder may differ
CANCELLED = "cancelled"  # a file in the submission's folder
HINTS = {
    "OUT_OF_MEMORY": "ask for more memory (--memory)",
    "TIMEOUT": "the ranks did not stop in time; `segfleet resume` goes on from the last checkpoint",
    "DependencyNeverSatisfied": "the run it waits for failed; cancel this one",
    "QOSMaxJobsPerUserLimit": "as many of your jobs run as the quality of service allows",
}


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """What is known of a job: by SLURM, and by what its ranks left."""

    state: str  # queued, running, done, failed, stopped, cancelled, lost or unknown
    reason: str | None = None
    job: str | None = None
    queue: str | None = None  # SLURM's own word
    node: str | None = None
    starts: int = 0

    @property
    def open(self) -> bool:
        """Whether it is not known to have ended."""
        return self.state in OPEN


@dataclass(frozen=True)
class SlurmJob:
    run: Path
    submission: Submission

    @property
    def id(self) -> str:
        return self.submission.id

    @property
    def cluster(self) -> str | None:
        """The cluster that was asked for by name; None: that of SLURM_CONF."""
        return self.submission.spec.get("clusters")

    @property
    def owner(self) -> str:
        """Who submitted it: SLURM lets only that user and root cancel it."""
        try:
            return Path(self.submission.folder).owner()
        except (KeyError, FileNotFoundError):  # a user this machine does not know
            return getpass.getuser()

    @property
    def is_another_users(self) -> bool:
        """Of another user, and we are not root."""
        try:
            return os.geteuid() not in (0, Path(self.submission.folder).stat().st_uid)
        except FileNotFoundError:
            return False

    @property
    def label(self) -> str:
        """What a job of a store does, such as "survey 0"; empty for the others, whose ranks are
        distinguished."""
        job = self.submission.job()
        if isinstance(job, Survey | Write):
            return f"{job.do} {job.share[0]}"
        if isinstance(job, Preprocess):
            return "publish" if self.submission.settings().before else "preprocess"
        return ""

    def state(self) -> str:
        return self.look().state

    def reason(self) -> str | None:
        return self.look().reason

    def look(self) -> JobStatus:
        return look_at_all([self])[0][1]

    def judge(
        self, queue: Mapping[str, Any], accounts: Mapping[str, Any], silence: str | None
    ) -> JobStatus:
        """The same from tables fetched for many jobs. `silence`: SLURM's words, where it did not
        tell its queue."""
        row = self._row(queue) or self._row(accounts)
        outcome, why = self.submission.outcome()
        ended = (
            "cancelled"
            if (Path(self.submission.folder) / CANCELLED).exists()
            else "unknown"
            # some clusters hide the jobs of other users
            if silence or self.is_another_users
            else "lost"
        )
        # it may have come back since: only its end is certain
        if silence and outcome != "done" and shutil.which("squeue"):
            outcome, ended = None, "unknown"
        state = STATES.get(row["state"], "running") if row else (outcome or ended)
        reason = row["reason"] if row and state in ("queued", "running") else None
        if state in ("failed", "stopped"):
            reason = why or (row and ": ".join(filter(None, (row["state"], row["reason"])))) or None
            if outcome == "stopped":
                state = "stopped"
        elif state == "lost":
            reason = (
                "SLURM has forgotten this job and its ranks left no word; segfleet resume goes on"
            )
        elif state == "unknown":
            reason = silence or f"SLURM does not show this job of {self.owner}; ask them"
        hint = HINTS.get((row or {}).get("state", "")) or HINTS.get(reason or "")
        return JobStatus(
            job=self.id,
            queue=row["state"] if row else ("unknown" if state == "unknown" else None),
            state=state,
            reason=f"{reason}: {hint}" if hint else reason,
            node=row["node"] if row else None,
            starts=len(self.submission.lives),
        )

    def _row(self, table: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a table knows of this job: by its name too, for ids come again on a new cluster."""
        # an array that was cancelled whole has one row
        row = table.get(self.id) or table.get(self.id.partition("_")[0])
        return row if row and row["name"] == self.submission.name else None

    def cancel(self) -> None:
        cancel([(self, self.look())])

    def wait(self, timeout: float, poll: float = 0.5) -> str:
        """The state in which it ended. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (state := self.state()) in OPEN:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {self.id} is still {state} after {timeout:.0f} s")
            time.sleep(poll)
        return state


def attach(run: Path) -> SlurmJob:
    """The latest submission of a run to SLURM. Raises InputError if there is none."""
    submission = latest(run)
    if submission.launcher != "slurm":
        raise InputError(f"run: {run.name} was started on this machine, not by SLURM")
    return SlurmJob(run, submission)


def refuse_if_active(*runs: Path) -> None:
    """Raises InputError if a job of these runs, or of what is made beside them, waits or runs."""
    jobs = [
        SlurmJob(run, submission)
        for run in runs
        for submission in submissions(run)
        if submission.launcher == "slurm"
    ]
    for job, status in look_at_all(jobs, poll.moment()):
        run, name = job.run, job.run.name.removesuffix(".jobs")
        if status.state in ("queued", "running"):
            cancel = name if name == run.name else run.with_suffix("")
            raise InputError(
                f"run: {name} is {status.state} already as job {job.id}; `segfleet cancel "
                f"{cancel}` first"
            )
        if status.state == "unknown":
            raise InputError(
                f"run: whether {name} still runs as job {job.id} is unknown; {status.reason}"
            )


def look_at_all(jobs: list[SlurmJob], age: float = 0.0) -> list[tuple[SlurmJob, JobStatus]]:
    """What `look` says of each; SLURM is asked once for all of a cluster, and not at all where an
    answer of the last `age` seconds is there that is younger than the jobs."""
    by_id: dict[int, JobStatus] = {}
    for of in dict.fromkeys(job.cluster for job in jobs):
        own = [job for job in jobs if job.cluster == of]
        by_id |= zip(map(id, own), _look(own, of, age), strict=True)
    return [(job, by_id[id(job)]) for job in jobs]


def _look(jobs: list[SlurmJob], of: str | None, age: float) -> list[JobStatus]:
    """The same of jobs of one cluster."""
    now, since = time.time(), max(job.submission.time for job in jobs)
    when = {"age": age, "since": min(since, now), "of": of}
    try:
        queue, silence = cluster.queue(frozenset(job.owner for job in jobs), **when), None
    except InputError as error:
        queue, silence = {}, str(error)
    unlisted = [] if silence else [job.id for job in jobs if job.id not in queue]
    accounts = cluster.account(unlisted, **when)
    judged = [job.judge(queue, accounts, silence) for job in jobs]
    # Nobody is lost by an old answer: a job from a machine whose clock is late may be younger
    new = [job for job in jobs if abs(now - job.submission.time) < CLOCKS]
    if age and any(
        status.state == "lost" and job in new for job, status in zip(jobs, judged, strict=True)
    ):
        return _look(jobs, of, 0.0)
    return judged


def cancel(jobs: list[tuple[SlurmJob, JobStatus]]) -> list[str]:
    """Cancel those that wait or run, with what `look` said of each; their ids. SLURM forgets what
    never started, so a mark is left.

    Raises InputError with SLURM's own words if it does not answer.
    """
    active = [job for job, status in jobs if status.open]
    if others := sorted({job.owner for job in active if job.is_another_users}):
        raise InputError(
            f"cancel: job {active[-1].id} belongs to {', '.join(others)}; only they can cancel it"
        )
    if active:
        for of in dict.fromkeys(job.cluster for job in active):
            cluster.call("scancel", *(job.id for job in active if job.cluster == of), of=of)
        poll.forget()
    for job in active:
        (Path(job.submission.folder) / CANCELLED).touch()
    return [job.id for job in active]


def jobs_of(run: Path) -> list[SlurmJob]:
    """The latest submission to SLURM and the jobs it waits for. Raises InputError if there is
    none."""
    attach(run)
    return [SlurmJob(run, submission) for submission in together(run)]
