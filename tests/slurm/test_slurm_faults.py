"""Misfortunes of jobs on a real SLURM: each comes back by itself and ends with the weights of the
run nobody disturbed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

TWO = ("--nodes", "2", "--ranks-per-node", "1", "--no-check")
NODE = "127.0.0.12"  # the second node of every job here


def warned(cluster, job):
    """What the time limit, or a preemption with grace time, sends first."""
    cluster.call("scancel", "--signal=USR2", job["job"])


def asked_to_end(cluster, job):
    """A TERM from somebody who does not cancel."""
    cluster.call("scancel", "--signal=TERM", job["job"])


def requeued_while_saving(cluster, job):
    """SLURM ends the job in the middle of writing a checkpoint."""
    partial = Path(job["run"]).parent.glob
    cluster.wait(lambda: list(partial("checkpoints/.step-*")), 30, "a save", pause=0.02)
    cluster.call("scontrol", "requeue", job["job"])


def node_down(cluster, job):
    cluster.call("scontrol", "update", f"nodename={NODE}", "state=DOWN", "reason=test")


def preempted(cluster, job):
    cluster.call("sbatch", "-N4", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 2")


def node_killed(cluster, job):
    """The daemon, its helpers and the rank of one node, all at once, as a power cut would."""
    daemon = psutil.Process(cluster.sandbox.pids()[f"slurmd {NODE}"])
    helpers = cluster.helpers(job, NODE)
    assert helpers
    for process in [
        daemon,
        *helpers,
        *[victim for helper in helpers for victim in helper.children(recursive=True)],
    ]:
        os.kill(process.pid, signal.SIGKILL)


def test_a_warning_and_a_lost_node_change_nothing(cluster, straight):
    """Two nodes with two ranks each, two misfortunes in one job: the same weights as on four local
    ranks."""
    start = time.time()
    job = cluster.submit("--nodes", "2", "--ranks-per-node", "2")
    stage = cluster.wait_for_step(job, 5)
    first = next(event["time"] for event in cluster.events(stage, "step"))
    warned(cluster, job)
    cluster.release(job)
    assert len(cluster.stopped(job)) == 1
    cluster.wait(lambda: cluster.resumed(job), what="the second start")
    node_down(cluster, job)
    cluster.release(job)
    cluster.wait_for_state(job, "COMPLETED")
    resumed = cluster.resumed(job)
    assert resumed[0] == cluster.stopped(job)[0] and len(resumed) >= 2
    cluster.same_result(job, straight(4))
    row = cluster.row(job)
    assert row["state"] == "done" and row["restarts"] == 2
    print(f"submit to the first logged steps: {first - start:.1f} s")


def test_misfortunes_in_a_row_change_nothing(cluster, straight):
    """Asked to end, then requeued in the middle of a save, then a power cut on one node."""
    job, step = cluster.submit(*TWO, runs="row"), 10
    for number, fault in enumerate((asked_to_end, requeued_while_saving, node_killed), 1):
        cluster.wait_for_step(job, step)
        fault(cluster, job)
        cluster.release(job)
        cluster.wait(
            lambda number=number: len(cluster.resumed(job)) == number, what=f"start {number + 1}"
        )
        step = cluster.resumed(job)[-1] + 10
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.resumed(job)[-1] < 160, "every misfortune fell into the first stage"
    cluster.same_result(job, straight(2))
    row = cluster.row(job, "row")
    assert row["state"] == "done" and row["restarts"] == 3


ALONE = [
    (fault, "main")
    for fault in (warned, asked_to_end, requeued_while_saving, node_down, node_killed)
]


@pytest.mark.parametrize(
    ("fault", "partition"),
    [
        (preempted, "low"),
        # as when SLURM requeues a job: no warning, its last checkpoint
        pytest.param(preempted, "low0", marks=pytest.mark.long),
        *(pytest.param(*each, marks=pytest.mark.long) for each in ALONE),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_misfortune_changes_nothing(cluster, straight, fault, partition):
    runs = f"{fault.__name__}-{partition}"
    job = cluster.submit(*TWO, "--partition", partition, runs=runs)
    cluster.wait_for_step(job, 10)
    fault(cluster, job)
    cluster.release(job)
    cluster.wait_for_state(job, "COMPLETED")
    cluster.same_result(job, straight(2))
    row = cluster.row(job, runs)
    assert row["state"] == "done" and row["restarts"] == 1
    assert len(cluster.resumed(job)) == 1
