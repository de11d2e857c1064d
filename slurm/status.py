"""Where every run stands: its own files, and for submitted ones SLURM's queue and accounting, asked once for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segfleet.pipeline import status as own
from segfleet.slurm.slurm_job import SlurmJob, jobs_of, look_at_all
from segfleet.slurm.submission import submissions

NOTHING = {"job": None, "queue": None, "reason": None, "node": None}


def status(root: Path) -> list[dict[str, Any]]:
    """The rows of pipeline.status, with job, queue (SLURM's own word), reason, node. Works without accounting and without SLURM."""
    rows = own.status(root)
    runs = [Path(row["path"]) for row in rows]
    found = look_at_all([SlurmJob(run, last) for run in runs for last in submissions(run)[-1:] if last.launcher == "slurm"])
    jobs = {str(job.run): facts for job, facts in found}
    return [_joined(row, jobs[row["path"]]) if row["path"] in jobs else {**row, **NOTHING} for row in rows]


def jobs(home: Path) -> list[dict[str, Any]]:
    """Rows of the jobs that make a store or a folder of predictions."""
    return [{"name": job.label or job.submission.name, **found} for job, found in look_at_all(jobs_of(home))]


def _joined(row: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """A run that is done is done, whatever became of its job; else the job knows better than a lock that other nodes may not see."""
    if row["state"] == "done" or row["state"] == "training" and job["state"] != "running":
        state = row["state"]
    else:
        busy = "scoring" if row["state"] == "trained" else "training" if row["steps"] else "starting"
        state = busy if job["state"] == "running" else job["state"]
    restarts = max(row["restarts"], job["starts"] - 1)
    if state == "done" and job["state"] == "unknown":
        job = {**job, **NOTHING, "job": job["job"]}
    return {**row, "state": state, "restarts": restarts, **{key: job[key] for key in NOTHING}}
