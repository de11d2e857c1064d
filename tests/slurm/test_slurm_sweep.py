"""A sweep whose stages are jobs on a real SLURM that preempts them, with a controller that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from segfleet.pipeline.recipe import load_recipe
from segfleet.slurm.local import run_ranks

SMALL = {"architectures": ["unet_lite_standard"], "tune": [1e-3, 1e-4]}
# Two architectures, two first rates, three second ones: the sweep of the local tests.
FULL = {"architectures": ["unet_lite_standard", "unet_lite_depthwise"], "tune": [1e-3, 3e-4, 1e-4]}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [SMALL, pytest.param(FULL, marks=pytest.mark.long)], ids=["6", "16"])
def test_a_sweep_of_jobs_survives_preemption_and_a_killed_controller(cluster, size, tmp_path, monkeypatch):
    document = yaml.safe_load((cluster.folder / "tiny.yaml").read_text())
    stages = [
        {"name": "base", "epochs": 1, "steps": 200, "lr": [1e-2, 1e-3]},
        {"name": "tune", "epochs": 1, "steps": 2, "lr": size["tune"], "inherit": "weights+optimizer"},
    ]
    leaves, first_stages = 2 * len(size["architectures"]) * len(size["tune"]), 2 * len(size["architectures"])
    space = {"name": "jobs", "base": document, "axes": {"model.name": size["architectures"]}, "stages": stages}
    (cluster.folder / "space.yaml").write_text(yaml.safe_dump(space))
    folder = f"sweep{leaves}"
    command = ["sweep", "space.yaml", "--on", "slurm", "--resource", "partition=low", "--slots", "2", "--runs", folder, "--json"]
    first = subprocess.Popen(
        [sys.executable, "-m", "segfleet.cli.main", *command], cwd=cluster.folder, env=cluster.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = cluster.folder / folder

    def jobs() -> dict[str, Path]:
        return {json.loads(path.read_text())["id"]: path.parents[2] for path in runs.rglob("submission.json")}

    def moving() -> bool:
        assert first.poll() is None, first.communicate()
        return any(cluster.events(run, "step") for run in jobs().values())

    cluster.wait(moving, 300, "a first step")
    job, run = next((job, run) for job, run in jobs().items() if cluster.events(run, "step"))
    cluster.call("sbatch", "-N4", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 2")
    cluster.wait(lambda: cluster.queue(job)[0] == "PENDING", 60, "the preemption")
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    psutil.wait_procs(family, timeout=30)
    for waiting in [number for number in jobs() if cluster.queue(number)[0] == "PENDING"]:
        cluster.release({"job": waiting, "log": str(next(iter((jobs()[waiting] / "slurm").glob("*"))) / "log")})
    done = subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *command], cwd=cluster.folder, env=cluster.environment,
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["nodes"] == {"done": first_stages + leaves} and len(outcome["ranking"]) == leaves
    submitted = [path.parents[2] for path in runs.rglob("submission.json")]
    assert len(submitted) == len(set(submitted)) == first_stages + leaves, "no stage was submitted twice"
    assert len(cluster.events(run, "resumed")) == 1, "preempted in the middle"
    steps = [event["step"] for event in cluster.events(run, "step")]
    assert steps == sorted(set(steps)), "no step was trained twice"

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    below = next(path for path in submitted if path.parent == run)  # a schedule that begins with the preempted stage, straight through
    recipe = load_recipe(str(below / "recipe.json")).model_dump(mode="json")
    run_ranks({"do": "train", "recipe": recipe, "root": str(tmp_path), "score": False}, 1, threads=1)
    ours, alone = cluster.weights(below), cluster.weights(tmp_path / below.relative_to(runs))
    assert ours.keys() == alone.keys() and all(torch.equal(ours[name], alone[name]) for name in ours)
