"""Ranks on this machine through the same protocol as a cluster's."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil
import pytest

from segfleet.slurm.jobspec import JobSpec
from segfleet.slurm.local import RankFailed, run_ranks
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
    assert ended(again) == "done" and again.reason() is None and finished(run, recipe)


@pytest.mark.parametrize(("asked", "given"), [(2, "2"), (None, "3")])
def test_threads_that_are_asked_for_win_over_the_environment(monkeypatch, asked, given):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    seen = set()

    def look() -> None:
        for child in psutil.Process().children():
            with suppress(psutil.ZombieProcess):
                if "segfleet.slurm.worker" in child.cmdline():
                    seen.add(child.environ()["OMP_NUM_THREADS"])

    with pytest.raises(RankFailed, match="found 'nothing', expected one of"):
        run_ranks({"do": "nothing"}, 1, look, asked)
    assert seen == {given}
