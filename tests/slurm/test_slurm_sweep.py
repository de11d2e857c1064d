"""A sweep whose stages are jobs on a real SLURM, with a controller that is killed and a job that is preempted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml


@pytest.mark.timeout(1800)
def test_a_sweep_of_jobs_survives_a_requeue_and_a_killed_controller(cluster):
    document = yaml.safe_load((cluster.folder / "tiny.yaml").read_text())
    stages = [
        {"name": "base", "epochs": 1, "steps": 60, "lr": [1e-2, 1e-3]},
        {"name": "tune", "epochs": 1, "steps": 2, "lr": [1e-3, 1e-4], "inherit": "weights+optimizer"},
    ]
    (cluster.folder / "space.yaml").write_text(yaml.safe_dump({"name": "jobs", "base": document, "stages": stages}))
    command = ["sweep", "space.yaml", "--on", "slurm", "--slots", "2", "--runs", "sweep", "--json"]
    first = subprocess.Popen(
        [sys.executable, "-m", "segfleet.cli.main", *command], cwd=cluster.folder, env=cluster.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = cluster.folder / "sweep"

    def jobs() -> dict[str, Path]:
        return {json.loads(path.read_text())["id"]: path.parents[2] for path in runs.rglob("submission.json")}

    def moving() -> bool:
        assert first.poll() is None, first.communicate()
        return any(cluster.events(run, "step") for run in jobs().values())

    cluster.wait(moving, 300, "a first step")
    job, run = next((job, run) for job, run in jobs().items() if cluster.events(run, "step"))
    cluster.call("scontrol", "requeue", job)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    psutil.wait_procs(family, timeout=30)
    cluster.release({"job": job, "log": str(next(iter((run / "slurm").glob("*"))) / "log")})
    done = json.loads(cluster.segfleet(*command).stdout)
    assert done["nodes"] == {"done": 6} and len(done["ranking"]) == 4
    submitted = [path.parents[2] for path in runs.rglob("submission.json")]
    assert len(submitted) == len(set(submitted)) == 6, "no stage was submitted twice"
    assert len(cluster.events(run, "resumed")) == 1
