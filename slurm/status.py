"""Where every run stands: its own files, and for submitted ones SLURM's queue and accounting, asked
once for all."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from segfleet.core.errors import explain
from segfleet.pipeline.reports.status import Row, run_status
from segfleet.pipeline.run import RECIPE, run_folders
from segfleet.slurm import poll
from segfleet.slurm.job import JobStatus, SlurmJob, jobs_of, look_at_all
from segfleet.slurm.submission import submissions


def status(root: Path) -> list[Row]:
    """The rows of pipeline.status, with what SLURM knows of their jobs. Works without accounting
    and without SLURM."""
    runs = run_folders(root)
    rows = [_row(run) for run in runs]
    looked = look_at_all(
        [
            SlurmJob(run, last)
            for run in runs
            for last in submissions(run)[-1:]
            if last.launcher == "slurm"
        ],
        poll.seconds(),
    )
    jobs = {str(job.run): job_status for job, job_status in looked}
    return [_joined(row, jobs[row.path]) if row.path in jobs else row for row in rows]


def _row(run: Path) -> Row:
    """What the run's own files say; of one that cannot be read (made by another version, damaged),
    why."""
    try:
        return run_status(run)
    except (ValueError, OSError) as error:
        explained = explain(error)
        reason = (
            explained[0] if explained else f"{run / RECIPE} or a file beside it is damaged: {error}"
        )
        return Row(run=run.name, path=str(run), state="unreadable", reason=reason)


def jobs(home: Path) -> list[dict[str, Any]]:
    """Rows of the jobs that make a store or a folder of predictions."""
    return [
        {"name": job.label or job.submission.name, **asdict(job_status)}
        for job, job_status in look_at_all(jobs_of(home), poll.seconds())
    ]


def _joined(row: Row, job_status: JobStatus) -> Row:
    """A run that is done is done, whatever became of its job; else the job knows better than a lock
    that other nodes may not see."""
    fields = {
        "job": job_status.job,
        "queue": job_status.queue,
        "reason": job_status.reason,
        "node": job_status.node,
    }
    state = row.state
    if state in ("done", "unreadable"):
        if job_status.state == "unknown":
            fields = {"job": job_status.job}
        if state == "unreadable":
            fields["reason"] = row.reason
    elif job_status.state == "running":
        state = "scoring" if state == "trained" else "training" if row.steps else "starting"
    elif state != "training":
        state = job_status.state
    return replace(row, state=state, restarts=max(row.restarts, job_status.starts - 1), **fields)
