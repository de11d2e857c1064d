"""Ranks on this machine through the same protocol as a cluster's."""

from __future__ import annotations

import time

from segfleet.slurm.jobspec import JobSpec
from segfleet.slurm.local_launcher import LocalLauncher
from segfleet.slurm.prepare import describe, finished, prepare


def ended(job, timeout=100):
    deadline = time.monotonic() + timeout
    while job.state() == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return job.state()


def test_a_local_job_is_stopped_and_goes_on(work, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(work)
    recipe, run = prepare("tiny.yaml", [], work / "local")
    job = LocalLauncher().submit(run, describe(recipe), work / "local", JobSpec(ranks_per_node=1))
    while not list(run.parent.glob("events.jsonl")):
        assert job.state() == "running", job.reason()
        time.sleep(0.05)
    job.cancel()
    assert ended(job) == "stopped" and "all saved" in job.reason()
    again = LocalLauncher().submit(run, describe(recipe), work / "local", JobSpec(ranks_per_node=1))
    assert ended(again) == "done" and again.reason() is None and finished(run)
