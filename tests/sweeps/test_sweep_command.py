"""`segfleet sweep` with real Ray and real ranks: shared equals alone, bit by bit; kills; a failing
stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.launch.local import run_ranks
from segfleet.pipeline.recipe import load_recipe

TREE = 9
SHORT = [
    {"name": "train", "epochs": 1, "steps": 2, "lr": [1e-2, 3e-3, 1e-3]},
    {
        "name": "finetune",
        "epochs": 1,
        "steps": 1,
        "lr": [1e-3, 1e-4],
        "inherit": "weights+optimizer",
    },
]


def segfleet(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process, timeout=600):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def events(folder: Path, *kinds: str) -> list[dict]:
    return [
        event
        for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        if event["event"] in kinds
    ]


def ends(document: dict) -> list[list[str]]:
    """Stages of every ranked run."""
    return [stages for row in document["ranking"] for stages in row["stages"]]


def final(folder: Path) -> dict[str, torch.Tensor]:
    done = json.loads((folder / "done.json").read_text())
    return load_file(folder / "checkpoints" / done["checkpoint"] / "weights.safetensors")


def wait_until(condition, process, timeout=600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, finished(process)
        time.sleep(0.1)


CHECKING = """
import sys
from pathlib import Path
from segfleet.cli.sweep import checked_apart
checked_apart(sys.argv[1], [], Path("runs"))
"""


def test_a_killed_controller_leaves_no_process_that_checks_its_plan(space, tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    command = [sys.executable, "-c", CHECKING, "space.yaml"]
    controller = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    family: list[psutil.Process] = []

    def checks() -> bool:
        family[:] = psutil.Process(controller.pid).children(recursive=True)
        return any("/torch/" in place.path for p in family for place in p.memory_maps())

    wait_until(checks, controller)
    controller.kill()
    controller.communicate()
    left = psutil.wait_procs(family, 30)[1]
    for process in left:
        process.kill()
    assert not left and len(family) > 1


def test_a_sweep_for_a_ray_cluster_of_its_own_becomes_a_job(space, tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    words = ("--on", "ray-in-slurm", "--nodes", "2", "--resource", "cpus=3", "--dry-run", "--json")
    code, out, err = finished(segfleet("sweep", "space.yaml", *words, cwd=tmp_path))
    assert code == 0, err
    (script,) = json.loads(out)["scripts"]
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --cpus-per-task=3\n" in script
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_is_killed_and_goes_on_and_a_failing_stage_takes_only_its_own(
    space, tmp_path, monkeypatch
):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**space, "axes": {}, "stages": SHORT}))
    code, out, err = finished(segfleet("sweep", "space.yaml", "--dry-run", "--json", cwd=tmp_path))
    assert code == 0, err
    planned = json.loads(out)
    assert (
        planned["nodes"],
        planned["stage_trainings_naive"],
        planned["epochs_shared"],
        planned["epochs_naive"],
    ) == (TREE, 12, 9, 12)
    assert not (tmp_path / "runs").exists() and planned["disk_bytes"] > 0
    nodes = {node["uid"]: node for node in planned["tree"]}
    victim = [node for node in planned["tree"] if node["depth"] == 0][1]
    lost = {uid for uid, node in nodes.items() if node["after"] == victim["uid"]}
    Path(victim["path"]).mkdir(parents=True)
    (Path(victim["path"]) / "checkpoints").write_text("a file where a folder must be")

    def done() -> dict[str, int]:
        return {
            uid: path.stat().st_mtime_ns
            for uid, node in nodes.items()
            if (path := Path(node["path"]) / "done.json").exists()
        }

    first = segfleet("sweep", "space.yaml", "--slots", 2, cwd=tmp_path)
    wait_until(lambda: len(done()) >= 2, first)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs([process for process in family if is_ours(process)], timeout=30)
    assert not alive, "no rank and no part of Ray outlives the controller"
    before = done()  # not earlier: a rank may write its last word while it is being killed
    assert 2 <= len(before) < TREE - 4

    second = segfleet("sweep", "space.yaml", "--slots", 2, "--json", cwd=tmp_path)
    wait_until(lambda: len(done()) > len(before), second)
    raylet = next(
        process
        for process in psutil.Process(second.pid).children(recursive=True)
        if "raylet/raylet" in command_of(process)[0]
    )
    raylet.kill()
    code, out, err = finished(second)
    assert code == 1 and out and "Ray died (raylet was killed" in err and "Traceback" not in err, (
        err
    )
    document = json.loads(out)
    assert document["nodes"] == {"done": 6, "failed": 1, "lost": 2} and list(
        document["failed"]
    ) == [victim["uid"]]
    assert (
        "checkpoints" in document["failed"][victim["uid"]]
        and f"stage {victim['uid']} failed" not in out
    )
    after = done()
    assert set(after) == set(nodes) - lost - {victim["uid"]}
    assert all(after[uid] == when for uid, when in before.items())  # no finished stage ran again
    for uid in after:
        stage = Path(nodes[uid]["path"])
        steps = [event["step"] for event in events(stage, "step")]
        assert steps == sorted(set(steps)), "no step was trained twice"
        if uid in before:
            assert len(events(stage, "stage_start")) == 1 and not events(stage, "resumed")
    assert [row["rank"] for row in document["ranking"]] == list(range(1, 5)) and len(
        document["unranked"]
    ) == 2

    leaves = [node for node in planned["tree"] if node["leaf_of"] and node["uid"] in after]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for leaf in (leaves[0], leaves[-1]):  # the same schedule, straight through, alone
        recipe = load_recipe(str(Path(leaf["path"]) / "recipe.json")).model_dump(mode="json")
        run_ranks(
            Train(recipe=recipe, root=tmp_path / "alone", score=False),
            1,
            threads=1,
        )
        ours, alone = (
            final(Path(leaf["path"])),
            final(tmp_path / "alone" / Path(leaf["path"]).relative_to(tmp_path / "runs")),
        )
        assert ours.keys() == alone.keys() and all(
            torch.equal(ours[name], alone[name]) for name in ours
        )

    sweep = tmp_path / "runs" / "sweeps" / "tiny"
    assert (sweep / "report.html").read_text().startswith("<!doctype html>") and (
        sweep / "ranking.csv"
    ).exists()
    assert load_recipe(str(sweep / "best.yaml")).name == "tiny-best"
    code, out, err = finished(segfleet("sweep", "status", "space.yaml", "--json", cwd=tmp_path))
    states = json.loads(out)["states"]
    assert code == 0 and states["done"] == 6 and states["failed"] == 1 and states["lost"] == 2
    assert not list(Path("/tmp").glob(f"sf-*/session_*_{first.pid}")), (
        "a killed controller's temporary folder is swept away"
    )


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]


def is_ours(process: psutil.Process) -> bool:
    """Ray's two agents look for their raylet now and then, and go by themselves within a minute or
    so."""
    words = " ".join(command_of(process))
    parts = (
        "segfleet.pipeline.launch.worker",
        "segfleet.sweeps.ray.controller",
        "raylet/raylet",
        "gcs_server",
        "ray::",
    )
    return any(part in words for part in parts) and "Agent" not in words


MISTAKES = [
    (
        ["nope"],
        "found no file 'nope' and no shipped space of that name; shipped: all_architectures_2d",
    ),
    (["space.yaml", "data.store=nowhere"], "nowhere holds no manifest.json"),
    (["space.yaml", "--on", "cloud"], "--on: found 'cloud', expected one of: local"),
    (["space.yaml", "--dry-run", "--on", "cloud"], "--on: found 'cloud', expected one of: local"),
    (["space.yaml", "--dry-run", "--on", "slurm", "--resource", "tiem=12h"], "tiem"),
    (["space.yaml", "--dry-run", "--on", "slurm", "--cluster", "nosuch"], "nosuch"),
    (
        ["space.yaml", "--on", "slurm", "--ranks", "4"],
        "found 4 with --on slurm, whose jobs say it; use --resource ranks_per_node=4",
    ),
    (["status"], "segfleet sweep status SPACE"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=lambda value: value[-1] if isinstance(value, list) else ""
)
def test_a_mistake_gets_one_message(space, tmp_path, arguments, words):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    code, out, err = finished(segfleet("sweep", *arguments, cwd=tmp_path))
    assert code == 2 and words in err and "Traceback" not in err and out == "", err


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_in_order(space, tmp_path, number):
    stages = [{"epochs": 1, "steps": 400, "lr": [1e-2, 1e-3]}]
    space["base"]["save_every"] = 1000
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**space, "axes": {}, "stages": stages}))
    process = segfleet("sweep", "space.yaml", "--slots", 2, cwd=tmp_path)
    wait_until(
        lambda: any(events(path.parent, "step") for path in tmp_path.rglob("events.jsonl")), process
    )
    process.send_signal(number)
    code, _, err = finished(process)
    assert code == 75 and "all saved" in err and "Traceback" not in err, err
    stopped = [
        folder.parent
        for folder in tmp_path.rglob("events.jsonl")
        if events(folder.parent, "stopped")
    ]
    assert stopped
    code, _, err = finished(segfleet("sweep", "space.yaml", "--slots", 2, cwd=tmp_path))
    assert code == 0, err
    for folder in stopped:
        at = events(folder, "stopped")[-1]["at_step"]
        # at 0 there was nothing to save
        assert [event["from_step"] for event in events(folder, "resumed")] == ([at] if at else [])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_population_ends_with_the_hours_of_its_budget(space, tmp_path):
    stages = [{"epochs": 40, "steps": 20, "lr": {"loguniform": [1e-4, 1e-2]}}]
    space |= {
        "axes": {},
        "stages": stages,
        "scheduler": "pbt",
        "pbt": {"population": 3},
        "budget": {"hours": 60 / 3600},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    start = time.monotonic()
    code, out, err = finished(
        segfleet("sweep", "space.yaml", "--slots", 1, "--json", cwd=tmp_path), timeout=400
    )
    assert code == 0 and "budget.hours is used up; all saved" in err and "Traceback" not in err, err
    assert json.loads(out)["ranking"] == [] and time.monotonic() - start < 300


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": "asha", "asha": {"grace": 1, "factor": 2}},
        {"scheduler": "asha", "asha": {"grace": 1, "factor": 2, "type": "promotion"}},
        {"search": "optuna", "budget": {"trials": 3}},
        {
            "scheduler": "pbt",
            "stages": [{"epochs": 3, "steps": 2, "lr": {"loguniform": [1e-4, 1e-2]}}],
            "pbt": {"population": 3},
        },
    ],
    ids=["asha", "promotion", "optuna", "pbt"],
)
def test_schedulers_and_searches_run_and_run_again_for_nothing(space, tmp_path, changes):
    space["base"]["evaluation"] = {"every": 1}
    stages = [
        {"epochs": 2, "steps": 2, "lr": [1e-2, 1e-3]},
        {"epochs": 2, "steps": 2, "lr": [1e-3, 1e-4]},
    ]
    (tmp_path / "space.yaml").write_text(
        yaml.safe_dump({**space, "axes": {}, "stages": stages, **changes})
    )
    documents, written = [], []
    for _ in range(2):
        code, out, err = finished(
            segfleet("sweep", "space.yaml", "--slots", 2, "--json", cwd=tmp_path), timeout=800
        )
        assert code == 0, err
        documents.append(json.loads(out))
        written.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")})
    first, second = documents
    assert first == second and written[0] == written[1]
    assert first["best"]["score"] >= max(row["score"] for row in first["ranking"])
    if "search" in changes:
        assert len(first["ranking"]) == 3
    if changes.get("scheduler") == "asha":
        word = "paused" if "type" in changes["asha"] else "stopped early"
        assert {row["reason"].partition(":")[0] for row in first["unranked"]} <= {word}
        for path in tmp_path.rglob("done.json"):  # what is trained to its end is scored and ranked
            assert any(path.parent.name in stages for stages in ends(first)), path
    if changes.get("scheduler") == "pbt":
        assert len(first["ranking"]) == 5 and {row["epochs"] for row in first["ranking"]} == {
            1,
            2,
            3,
        }
