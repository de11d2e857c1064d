"""Jobs on a real SLURM that need more time than their limit, or another engine: the same weights as
on local ranks.

Apart from test_slurm_faults.py, so that the two long files run side by side.
"""

from __future__ import annotations

import pytest

TWO = ("--nodes", "2", "--ranks-per-node", "1", "--no-check")
SLOW = """
import os
if "SLURM_PROCID" in os.environ:
    import time
    from segfleet.pipeline.data import sampler
    draw = sampler.PatchSampler.draw
    def slow(*arguments):
        time.sleep(0.12)
        return draw(*arguments)
    sampler.PatchSampler.draw = slow
"""


@pytest.mark.timeout(600)
def test_time_limits_change_nothing(cluster, straight, tmp_path):
    """A limit of one minute, a training of two: it saves before the limit, comes back, and ends
    exactly."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    job = cluster.submit(
        *TWO, "--time", "1", "--warning", "15", runs="limits", PYTHONPATH=str(tmp_path)
    )
    for stops in (1, 2):
        cluster.wait(lambda stops=stops: len(cluster.stopped(job)) == stops, 150, f"stop {stops}")
        cluster.release(job)
    while cluster.wait_for_state(job, "COMPLETED", "PENDING", timeout=150) == "PENDING":
        cluster.release(job)
    assert cluster.resumed(job) == cluster.stopped(job)
    cluster.same_result(job, straight(2))


def test_zero_one_on_two_nodes(cluster, straight):
    short = ("stages.0.epochs=1", "stages.0.steps=10", "stages.1.steps=5")
    job = cluster.submit(*TWO, *short, "--engine", "deepspeed", runs="zero")
    cluster.wait_for_state(job, "COMPLETED", timeout=280)
    cluster.same_result(job, straight(2, *short, "engine.name=deepspeed"))
