"""Where every run stands: its own files, and for submitted ones SLURM's queue and accounting, asked
once for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segfleet.core.errors import explain
from segfleet.pipeline.run import RECIPE, run_folders
from segfleet.pipeline.status import run_status
from segfleet.slurm import poll
from segfleet.slurm.job import SlurmJob, jobs_of, look_at_all
from segfleet.slurm.submission import submissions

NOTHING = {"job": None, "queue": None, "reason": None, "node": None}


def status(root: Path) -> list[dict[str, Any]]:
    """The rows of pipeline.status, with job, queue (SLURM's own word), reason, node. Works without
    accounting and without SLURM."""
    runs = run_folders(root)
    rows = [_row(run) for run in runs]
    found = look_at_all(
        [
            SlurmJob(run, last)
            for run in runs
            for last in submissions(run)[-1:]
            if last.launcher == "slurm"
        ],
        poll.seconds(),
    )
    jobs = {str(job.run): facts for job, facts in found}
    return [
        _joined(row, jobs[row["path"]])
        if row["path"] in jobs
        else {**row, **NOTHING, "reason": row.get("reason")}
        for row in rows
    ]


def _row(run: Path) -> dict[str, Any]:
    """What the run's own files say; of one that cannot be read (made by another version, damaged),
    why."""
    try:
        return run_status(run)
    except (ValueError, OSError) as error:
        known = explain(error)
        reason = known[0] if known else f"{run / RECIPE} or a file beside it is damaged: {error}"
        nothing = dict.fromkeys(
            (
                "fold",
                "family",
                "score",
                "date",
                "steps",
                "loss",
                "samples_per_second",
                "remaining_seconds",
            )
        )
        row = {
            "run": run.name,
            "path": str(run),
            "recipe": "?",
            "stages": 0,
            "state": "unreadable",
            "stage": 0,
            "step": 0,
            "restarts": 0,
        }
        return {**row, **nothing, "reason": reason}


def jobs(home: Path) -> list[dict[str, Any]]:
    """Rows of the jobs that make a store or a folder of predictions."""
    return [
        {"name": job.label or job.submission.name, **found}
        for job, found in look_at_all(jobs_of(home), poll.seconds())
    ]


def _joined(row: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """A run that is done is done, whatever became of its job; else the job knows better than a lock
    that other nodes may not see."""
    if (
        row["state"] in ("done", "unreadable")
        or row["state"] == "training"
        and job["state"] != "running"
    ):
        state = row["state"]
    else:
        busy = (
            "scoring" if row["state"] == "trained" else "training" if row["steps"] else "starting"
        )
        state = busy if job["state"] == "running" else job["state"]
    restarts = max(row["restarts"], job["starts"] - 1)
    if state in ("done", "unreadable") and job["state"] == "unknown":
        job = {**job, **NOTHING, "job": job["job"]}
    facts = {key: job[key] for key in NOTHING} | (
        {"reason": row["reason"]} if state == "unreadable" else {}
    )
    return {**row, "state": state, "restarts": restarts, **facts}
