"""A sweep whose stages are jobs on a real SLURM that preempts them, with a controller that is
killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.launch.local import RankFailed, run_ranks
from segfleet.pipeline.recipe import load_recipe
from segfleet.slurm.prepare import prepare
from segfleet.sweeps import slurm_backend
from segfleet.sweeps.order import Order
from segfleet.sweeps.space.load import parse_search
from segfleet.sweeps.space.plan import make_plan

PLAIN, RESIDUAL = (
    {"name": f"{kind}_unet_2d", "options": {"features": [4, 8]}} for kind in ("plain", "resenc")
)
SMALL = {"architectures": [PLAIN], "tune": [1e-3, 1e-4]}
# Two architectures, two first rates, three second ones: the sweep of the local tests.
FULL = {"architectures": [PLAIN, RESIDUAL], "tune": [1e-3, 3e-4, 1e-4]}


def found(folder: Path, name: str) -> list[Path]:
    """Files of this name. Path.rglob fails where a running job removes a folder meanwhile."""
    return [Path(place) / name for place, _, files in os.walk(folder) if name in files]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [SMALL, FULL], ids=["6", "16"])
def test_a_sweep_of_jobs_survives_preemption_and_a_killed_controller(
    cluster, size, tmp_path, monkeypatch
):
    document = yaml.safe_load((cluster.folder / "tiny.yaml").read_text())
    stages = [
        {"name": "base", "epochs": 1, "steps": 200, "lr": [1e-2, 1e-3]},
        {
            "name": "tune",
            "epochs": 1,
            "steps": 2,
            "lr": size["tune"],
            "inherit": "weights+optimizer",
        },
    ]
    leaves, first_stages = (
        2 * len(size["architectures"]) * len(size["tune"]),
        2 * len(size["architectures"]),
    )
    space = {
        "name": "jobs",
        "base": document,
        "axes": {"model": size["architectures"]},
        "stages": stages,
    }
    (cluster.folder / "space.yaml").write_text(yaml.safe_dump(space))
    folder = f"sweep{leaves}"
    command = [
        "sweep",
        "space.yaml",
        "--on",
        "slurm",
        "--resource",
        "partition=low",
        "--slots",
        "2",
        "--runs",
        folder,
        "--json",
    ]
    first = subprocess.Popen(
        [sys.executable, "-m", "segfleet.cli.main", *command], cwd=cluster.folder,
        env=cluster.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = cluster.folder / folder

    def jobs() -> dict[str, Path]:
        return {
            json.loads(path.read_text())["id"]: path.parents[2]
            for path in found(runs, "submission.json")
        }

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
        cluster.release(
            {"job": waiting, "log": str(next(iter((jobs()[waiting] / "slurm").glob("*"))) / "log")}
        )
    done = subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *command], cwd=cluster.folder,
        env=cluster.environment,
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["nodes"] == {"done": first_stages + leaves} and len(outcome["ranking"]) == leaves
    submitted = [path.parents[2] for path in found(runs, "submission.json")]
    assert len(submitted) == len(set(submitted)) == first_stages + leaves, (
        "no stage was submitted twice"
    )
    assert len(cluster.events(run, "resumed")) == 1, "preempted in the middle"
    steps = [event["step"] for event in cluster.events(run, "step")]
    assert steps == sorted(set(steps)), "no step was trained twice"

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # a schedule that begins with the preempted stage, straight through
    below = next(path for path in submitted if path.parent == run)
    recipe = load_recipe(str(below / "recipe.json")).model_dump(mode="json")
    run_ranks(Train(recipe=recipe, root=tmp_path, score=False), 1, threads=1)
    ours, alone = cluster.weights(below), cluster.weights(tmp_path / below.relative_to(runs))
    assert ours.keys() == alone.keys() and all(
        torch.equal(ours[name], alone[name]) for name in ours
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_submitted_sweep_comes_back_and_finds_its_stages(cluster):
    """The job that waits is requeued in the middle: its stages' jobs stay, and none is submitted
    twice. Cancelled, it stops them all and stays away; submitted again, it goes on."""
    document = yaml.safe_load((cluster.folder / "tiny.yaml").read_text())
    stages = [
        {"epochs": 1, "steps": 300, "lr": [1e-2, 1e-3]},
        {"epochs": 1, "steps": 2, "lr": [1e-3, 1e-4], "inherit": "weights+optimizer"},
    ]
    space = {"name": "left", "base": document, "stages": stages}
    (cluster.folder / "left.yaml").write_text(yaml.safe_dump(space))
    runs = cluster.folder / "left"
    words = ["--runs", runs, "--json", "--", "sweep", "left.yaml", "--on", "slurm", "--slots", 2]

    def submit() -> dict:
        return json.loads(cluster.segfleet("submit", *words).stdout)

    def jobs() -> list[Path]:
        own = runs.glob("[!s.]*")
        return [path.parents[2] for one in own for path in found(one, "submission.json")]

    def moving() -> bool:
        return any(cluster.events(run, "step") for run in jobs())

    made = submit()
    cluster.wait(moving, 300, "a first step")
    cluster.call("scontrol", "requeue", made["job"])
    cluster.release(made)
    cluster.wait(lambda: len(found(runs, "done.json")) >= 2, 300, "two stages")
    assert "jobs stay" in Path(made["log"]).read_text()

    again = cluster.segfleet("cancel", runs / "sweeps" / "left")
    cluster.wait(
        lambda: cluster.queue(made["job"])[0] not in ("RUNNING", "PENDING"), 120, "the end"
    )
    assert again.returncode == 0 and "Traceback" not in Path(made["log"]).read_text()
    last = submit()
    cluster.wait_for_state(last, "COMPLETED", timeout=600)
    outcome = json.loads((runs / "sweeps" / "left" / "outcome.json").read_text())
    assert outcome["nodes"] == {"done": 6} and len(outcome["ranking"]) == 4
    submitted = jobs()
    assert len(set(submitted)) == 6
    for run in set(submitted):
        steps = [event["step"] for event in cluster.events(run, "step")]
        assert steps == sorted(set(steps)), "no step was trained twice"


@pytest.fixture
def stage(cluster, monkeypatch):
    """`stage(seed, steps)`: what a trial is told of an inner stage of one epoch."""
    for name in ("PATH", "SLURM_CONF", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setattr(slurm_backend, "LOOK", 0.0)

    def order(seed: int, steps: int, **more) -> Order:
        root = cluster.folder / "stages"
        text = json.dumps([{"epochs": 1, "steps": steps, "lr": 1e-2}])
        [(recipe, path)] = prepare(
            str(cluster.folder / "tiny.yaml"), [f"seed={seed}", f"stages={text}"], root
        )
        job = Train(recipe=recipe.model_dump(mode="json"), root=root, score=False, **more)
        return Order(
            job=job, node=path.name, path=path, sweep=root, begin=0, steps=steps, on="slurm",
            options={"cluster": None, "spec": {}},
        )  # fmt: skip

    return order


@pytest.mark.long
def test_a_silent_controller_is_waited_for(cluster, stage):
    """While it is away a job is submitted later, neither taken for lost nor submitted again, and
    nothing untrue is said of it."""
    order, told = stage(1, 100_000), []
    run = order.path

    def silence() -> None:
        os.kill(cluster.sandbox.pids()["slurmctld"], signal.SIGTERM)
        cluster.wait(lambda: "slurmctld" not in cluster.sandbox.pids(), 20, "the controller's end")

    def poll() -> None:
        # it was asked once in the silence: to take the job, how it is
        if "slurmctld" not in cluster.sandbox.pids():
            cluster.sandbox.start_controller()
            if told:
                (run / "stop").touch()
        if told or not cluster.events(run, "step"):
            return
        silence()
        words = [("status", "stages"), ("cancel", run), ("resume", run), ("logs", run, "-f")]
        commands = [[sys.executable, "-m", "segfleet.cli.main", *map(str, one)] for one in words]
        asked = [
            subprocess.Popen(
                one,
                cwd=cluster.folder,
                env=cluster.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for one in commands
        ]
        told.extend((process.communicate(), process.returncode) for process in asked[:3])
        assert asked[3].poll() is None, "logs -f goes on"
        told.append(asked[3])

    silence()
    with pytest.raises(RankFailed, match="is stopped") as stopped:
        slurm_backend.Slurm().run(order, poll)
    assert stopped.value.exit_code == 75
    (status, code), (cancel, refused), (resume, again), logs = told
    assert (
        code == 0
        and status[0].count("1 job(s) is unknown: squeue says:") == 1
        and "forgotten" not in status[0]
    )
    assert refused == 2 and "Unable to contact slurm controller" in cancel[1]
    assert again == 2 and "is unknown; squeue says:" in resume[1]
    assert len(list((run / "slurm").glob("*/submission.json"))) == 1, "it was not submitted again"
    _, errors = logs.communicate(timeout=60)
    assert logs.returncode == 0 and errors.count("whether the job still runs is unknown") == 1


@pytest.mark.long
def test_the_hours_of_a_budget_end_a_job_for_good(cluster, stage):
    """One that runs saves and stays away, one that still waits is cancelled. An inner stage is not
    scored, submitted again neither."""
    order = stage(2, 3)
    slurm_backend.Slurm().run(order, lambda: None)
    assert (order.path / "done.json").exists()
    assert not (order.path / "evaluation.json").exists()
    order = stage(2, 100_000, max_seconds=20)
    run = order.path
    with pytest.raises(RankFailed) as stopped:
        slurm_backend.Slurm().run(order, lambda: None)
    assert (
        stopped.value.exit_code == 75
        and "is stopped" in str(stopped.value)
        and len(cluster.events(run, "stopped")) == 1
    )
    first = json.loads((run / "slurm" / "0001" / "job.json").read_text())
    assert first["max_seconds"] is None and first["score"] is False
    (run / "stop").unlink(missing_ok=True)
    again = json.loads(cluster.segfleet("resume", run, "--json").stdout)
    assert json.loads((run / "slurm" / "0002" / "job.json").read_text()) == first
    cluster.segfleet("cancel", run)
    cluster.wait(lambda: cluster.queue(again["job"])[0] == "CANCELLED", 30, "the end")

    order = stage(3, 100_000, max_seconds=2)
    order.options["spec"]["sbatch"] = ("--hold",)
    with pytest.raises(RankFailed, match="is cancelled") as stopped:
        slurm_backend.Slurm().run(order, lambda: None)
    assert stopped.value.exit_code == 75


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_sweep_over_pretrainings_survives_kill_9_of_a_rank_and_of_its_controller(
    cluster, tiny_store, tmp_path, monkeypatch
):
    """Two pre-trainings on one store, fine-tuned on two others: the same ranking and weights as
    when every path is trained on this machine and nobody is killed."""
    source, *targets = (
        str(tiny_store(dims=2, **more)) for more in ({"classes": 3}, {}, {"cases": 5})
    )
    first = {"name": "pretrain", "epochs": 1, "steps": 200, "lr": 1e-2}
    space = {
        "name": "transfer",
        "base": yaml.safe_load((cluster.folder / "tiny.yaml").read_text()),
        "axes": {"data.store": targets},
        "stages": [
            {
                **first, "task": ["segment", "reconstruct"],
                "data": {"store": source, "split": "all"},
            },
            {"name": "finetune", "epochs": 1, "steps": 20, "lr": 1e-3, "inherit": {"head": "new"}},
        ],
    }  # fmt: skip
    (cluster.folder / "transfer.yaml").write_text(yaml.safe_dump(space))

    def sweep(runs: Path) -> subprocess.Popen:
        command = ["sweep", "transfer.yaml", "--on", "slurm", "--slots", "2", "--json", "--runs"]
        return subprocess.Popen(
            [sys.executable, "-m", "segfleet.cli.main", *command, str(runs)],
            cwd=cluster.folder, env=cluster.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ranking(process: subprocess.Popen) -> list:
        out, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        rows = json.loads(out)["ranking"]
        return [(row["rank"], row["name"], row["score"], row["ci95"]) for row in rows]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    calm, runs = tmp_path / "calm", tmp_path / "runs"
    plan = make_plan(parse_search(space), calm)
    for one in plan.trials:
        run_ranks(Train(recipe=one.recipe.model_dump(mode="json"), root=calm), 1, threads=1)
    expected = ranking(sweep(calm))
    assert len(expected) == 4 and not found(calm, "submission.json"), "all was there"

    command = sweep(runs)

    def moving(stages: list[Path], pattern: str = "events.jsonl") -> Path | None:
        assert command.poll() is None, command.communicate()
        return next((stage for stage in stages if any(stage.glob(pattern))), None)

    nodes = list(plan.tree.walk())
    pretrainings, tunings = (
        [runs / node.path for node in nodes if node.index == stage] for stage in (0, 1)
    )
    saved = "checkpoints/step-*"
    cluster.wait(lambda: moving(pretrainings, saved), 300, "a first checkpoint")
    victim = moving(pretrainings, saved)
    job = json.loads(found(victim / "slurm", "submission.json")[0].read_text())["id"]
    ranks = [
        process
        for helper in cluster.helpers({"job": job})
        for process in helper.children(recursive=True)
        if process.name().startswith("python")
    ]
    ranks[0].kill()
    cluster.wait(lambda: moving([victim], "slurm/0002"), 300, "the stage's second job")
    cluster.wait(lambda: moving(tunings), 300, "a fine-tuning")
    family = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGKILL)
    command.communicate()
    psutil.wait_procs(family, timeout=30)
    assert len(found(runs, "done.json")) < len(nodes), "killed in the middle"

    assert ranking(sweep(runs)) == expected
    assert cluster.events(victim, "resumed"), "its second job went on from a checkpoint"
    for node in nodes:
        ours, alone = (cluster.weights(root / node.path) for root in (runs, calm))
        assert ours.keys() == alone.keys() and all(torch.equal(ours[n], alone[n]) for n in ours)
    assert len({path.parents[2] for path in found(runs, "submission.json")}) == len(nodes) == 6
    steps = [event["step"] for event in cluster.events(victim, "step")]
    assert steps == sorted(set(steps)), "no step was logged twice"
