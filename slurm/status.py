"""Where every run stands: its own files, and for submitted ones SLURM's queue and accounting, asked once for all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from segfleet.pipeline import status as own
from segfleet.preprocess.problems import InputError
from segfleet.slurm import cluster
from segfleet.slurm.slurm_job import SlurmJob, jobs_of, look_at_all
from segfleet.slurm.submission import submissions

NOTHING = {"job": None, "queue": None, "reason": None, "node": None}


def status(root: Path) -> list[dict[str, Any]]:
    """The rows of pipeline.status, with job, queue (SLURM's own word), reason, node. Works without accounting and without SLURM."""
    rows = own.status(root)
    found = {row["run"]: submissions(Path(row["path"]))[-1:] for row in rows}
    jobs = {row["run"]: SlurmJob(Path(row["path"]), last) for row in rows for last in found[row["run"]] if last.launcher == "slurm"}
    queue, accounts = {}, {}
    if jobs:
        with suppress(InputError):
            queue = cluster.queue()
        accounts = cluster.account([job.id for job in jobs.values() if job.id not in queue])
    return [_joined(row, jobs[row["run"]].look(queue, accounts)) if row["run"] in jobs else {**row, **NOTHING} for row in rows]


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
    return {**row, "state": state, "restarts": restarts, **{key: job[key] for key in NOTHING}}
