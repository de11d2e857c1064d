"""A SLURM with an accounting database: what became of jobs that the controller has forgotten, and
which accounts there are."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from segfleet.core.errors import InputError
from segfleet.slurm import cluster as slurm
from segfleet.slurm.sandbox import sandbox as sandboxes
from segfleet.slurm.sandbox.sandbox import Sandbox, missing

SHORT = ("stages.0.epochs=1", "stages.0.steps=3", "stages.1.steps=2", "--no-check")
HELD = ("--array", "seed=4..6", "--sbatch=--hold", "--no-check", "--runs", "runs", "--json")


@pytest.fixture(scope="module")
def sandbox():
    """In place of the session's: one that keeps accounts and whose controller soon forgets. `make
    test` does not install what it needs."""
    if why := missing(accounting=True):
        pytest.skip(f"no SLURM with accounting: {why}")
    folder = Path(tempfile.mkdtemp(prefix="segfleet-slurm-"))
    made = Sandbox(folder, accounting=True, remembers=2)
    try:
        made.start()
        made.call("sacctmgr", "-i", "add", "account", "hearts")
        made.call("sacctmgr", "-i", "add", "qos", "fast")
        yield made
    finally:
        made.stop()
        assert not made.pids()
        shutil.rmtree(folder)


@pytest.mark.long
def test_what_became_of_jobs_that_the_controller_has_forgotten(cluster):
    """None of the last five has left a word of its own: only the database knows."""
    done = cluster.submit(*SHORT, "seed=1")
    failed = cluster.submit(*SHORT, "seed=2", "--setup", "exit 3")
    cancelled = cluster.submit(*SHORT, "seed=3", "--setup", "sleep 60")
    never = json.loads(cluster.segfleet("submit", "tiny.yaml", *HELD).stdout)
    cluster.wait_for_state(cancelled, "RUNNING")
    cluster.call("scancel", cancelled["job"], never[0]["job"].partition("_")[0])
    cluster.wait_for_state(done, "COMPLETED")
    cluster.wait(lambda: not cluster.call("squeue", "--states=all", "-h").strip(), 40, "forgetting")
    rows = {
        row["path"]: row
        for row in json.loads(cluster.segfleet("status", cluster.folder / "runs", "--json").stdout)
    }
    expected = [
        (done, "COMPLETED", "done", None),
        (failed, "FAILED", "failed", "FAILED: exit code 3"),
    ]
    expected += [(job, "CANCELLED", "cancelled", None) for job in (cancelled, *never)]
    for job, queue, state, reason in expected:
        row = rows[job["run"]]
        assert (row["job"], row["queue"], row["state"], row["reason"]) == (
            job["job"],
            queue,
            state,
            reason,
        )
        assert row["node"] is None if job in never else row["node"] in sandboxes.NODES


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--account", "harts"], "account: found 'harts', expected one of: hearts, root"),
        (["--qos", "faster"], "qos: found 'faster', expected one of: fast, normal"),
    ],
)
def test_accounts_are_checked_before_submission(cluster, arguments, words):
    before = cluster.jobs()
    done = cluster.segfleet(
        "submit", "tiny.yaml", "--no-check", *arguments, "--runs", "mistakes", code=2
    )
    assert words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert cluster.jobs() <= before
    assert not list((cluster.folder / "mistakes").rglob("submission.json"))


@pytest.mark.long
def test_an_account_and_a_quality_that_exist(cluster):
    """In whatever case, as SLURM itself takes them."""
    job = cluster.submit(
        *SHORT, "seed=7", "--account", "Hearts", "--qos", "FAST", "--sbatch=--hold"
    )
    assert cluster.queue(job["job"])[0] == "PENDING"


def test_programs_that_are_missing_are_told_with_their_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sandboxes, "SEARCH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"slurmdbd, mariadbd.* not found; .*munge slurmdbd mariadb-server$"
    ):
        Sandbox(tmp_path / "slurm", accounting=True).start()
    assert "slurmdbd" not in missing() and not (tmp_path / "slurm").exists()


TABLE = """\
7_0|COMPLETED|None|node1|0:0|tiny
7_[1-2,5%1]|CANCELLED by 0|JobArrayTaskLimit|None assigned|0:0|tiny
8|FAILED|None|node2|0:9|tiny
9|REVOKED|None|None assigned|0:0|tiny
9|RUNNING|None|node3|0:0|tiny
10|REVOKED|None|None assigned|0:0|tiny
"""


def test_how_sacct_is_read(monkeypatch):
    asked = []
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "call", lambda *command, of: asked.append(command) or TABLE)
    found = slurm.account(["7_1", "7_2", "8"])
    assert "7,8" in asked[0] and sorted(found) == ["7_0", "7_1", "7_2", "7_5", "8", "9"]
    assert found["7_2"] == {
        "name": "tiny",
        "state": "CANCELLED",
        "reason": "JobArrayTaskLimit",
        "node": None,
    }
    assert found["9"]["state"] == "RUNNING", "in another cluster of the federation"
    assert found["8"]["reason"] == "signal 9" and found["7_0"]["reason"] is None
