"""SLURM starts a job again when it lost a node that may have lost only SLURM: the first start goes,
the second one waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from segfleet.core import lock as locks
from segfleet.core.errors import InputError
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.run import StageFolder
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.training import stages
from segfleet.slurm.rank import next_life

HOLD = (
    "import sys; from pathlib import Path; from segfleet.pipeline.run import lock_stage\n"
    "lock = lock_stage(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
)


@pytest.fixture
def orphan(tmp_path):
    """A process of job 7 that holds the stage's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "SLURM_JOB_ID": "7"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def wanted(tmp_path, waits: bool = True) -> tuple[SimpleNamespace, StageFolder]:
    folder = StageFolder(path=tmp_path, index=0)
    facts = {"ranks": Ranks(), "waits": waits, "folders": [folder], "said": []}
    run = SimpleNamespace(**facts, asked_to_stop=lambda: False)
    run.warn = run.said.append
    return run, folder


def test_the_same_job_waits_for_its_earlier_start(orphan, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(stages, "LOOK", 0.05)
    run, folder = wanted(tmp_path)
    threading.Timer(1.0, orphan.kill).start()
    begin = time.monotonic()
    with stages.locked(run, folder):
        assert time.monotonic() - begin > 0.5
    assert len(run.said) == 1 and "of job 7; waiting for it" in run.said[0]


@pytest.mark.parametrize(("job", "waits"), [("8", True), ("7", False), ("", True)])
def test_anybody_else_is_refused(orphan, tmp_path, monkeypatch, job, waits):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    run, folder = wanted(tmp_path, waits)
    with pytest.raises(InputError, match=r"is in use by process \d+ on .* of job 7; wait"):
        stages.locked(run, folder).__enter__()


def test_whoever_waits_for_a_lease_is_stopped_and_not_refused(orphan, tmp_path, monkeypatch):
    """On a disk without flock the lease of a killed process lasts a minute and a half."""
    monkeypatch.setattr(locks.Lock, "is_left_behind", lambda self: True)
    run, folder = wanted(tmp_path, waits=False)
    asked = threading.Event()
    run.asked_to_stop = asked.is_set
    threading.Timer(1.0, asked.set).start()
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="stopped while waiting for stage 1"):
        stages.locked(run, folder).__enter__()
    assert 0.9 < time.monotonic() - begin < 30


def test_the_earlier_start_is_asked_to_stop_by_the_later_one(tmp_path):
    stop = StopRequest()
    stop.later = next_life(tmp_path / "life-12_3.1")
    assert stop.later.name == "life-12_3.2" and not stop.asked()
    stop.later.mkdir()
    assert stop.asked() and stop.reason == "a later start of the same job"
