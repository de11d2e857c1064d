"""A two-stage sweep with shared stages against plain Ray Tune, one trial per schedule: wall-clock
and core-seconds.

    python benchmarks/sweep.py [STEPS] [SLOTS]

Space: 2 networks x 2 first rates x 3 second rates on a synthetic 2D store; the first stage has five
times the steps of the second, as in
100 + 20 epochs. Plain: `tune.Tuner` over the same grid, a function trainable that runs both stages
from the start (the same ranks, the same checkpoints, the same scoring), nothing shared. Every leaf
of both must have bitwise equal weights.

Overhead of the controller, per stage (target: 2 s): the sweep with one slot against its 16 stages
started one by one without Ray.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

SHORT = 5  # steps of an epoch where only the controller is looked at
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))


def space(store: Path, steps: int) -> dict:
    return {
        "name": "bench",
        "base": {
            "name": "bench",
            "data": {"store": str(store), "batch": 2, "patch": [32, 32]},
            "model": {"name": "unet_lite_standard", "options": {"width": 8}},
            "stages": [{"epochs": 1, "lr": 1e-3}],
        },
        "axes": {"model.name": ["unet_lite_standard", "unet_lite_depthwise"]},
        "stages": [
            {"name": "train", "epochs": 5, "steps": steps, "lr": [1e-2, 1e-3]},
            {"name": "finetune", "epochs": 1, "steps": steps, "lr": [1e-3, 3e-4, 1e-4]},
        ],
    }


def shared(document: dict, runs: Path, slots: int) -> None:
    from segfleet.sweeps.run import Resources, run_sweep
    from segfleet.sweeps.space.load import parse_search
    from segfleet.sweeps.space.plan import make_plan

    run_sweep(make_plan(parse_search(document), runs), Resources(slots=slots))


def plain(document: dict, runs: Path, slots: int) -> None:
    """What one writes without segfleet's tree: a grid and a function."""
    from ray import tune

    from segfleet.pipeline.launch.job import Train
    from segfleet.sweeps.ray.controller import NAMES, ray_session
    from segfleet.sweeps.run import Resources
    from segfleet.sweeps.space.load import parse_search
    from segfleet.sweeps.space.plan import make_plan

    plan = make_plan(parse_search(document), runs)
    jobs = [
        Train(recipe=trial.recipe.model_dump(mode="json"), root=runs / str(trial.number))
        for trial in plan.trials
    ]

    def alone(config: dict) -> None:
        from segfleet.pipeline.launch.job import Train
        from segfleet.pipeline.launch.local import run_ranks

        os.environ["OMP_NUM_THREADS"] = "1"
        run_ranks(Train.model_validate_json(config["job"]), 1, threads=1)

    runs.mkdir(parents=True)
    with ray_session(Resources(slots=slots), runs) as storage:
        tune.Tuner(
            tune.with_resources(alone, {"cpu": 1}),
            param_space={"job": tune.grid_search([job.model_dump_json() for job in jobs])},
            tune_config=tune.TuneConfig(reuse_actors=True, **NAMES),
            run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0),
        ).fit()


def alone(document: dict, runs: Path, slots: int) -> None:
    """The same stages one after another, without Ray and without a controller."""
    from segfleet.pipeline.launch.local import run_ranks
    from segfleet.sweeps.space.load import parse_search
    from segfleet.sweeps.space.plan import make_plan

    plan = make_plan(parse_search(document), runs)
    for node in plan.tree.walk():
        run_ranks(plan.order(node).job, 1, threads=1)


def weights(root: Path) -> dict[str, str]:
    """sha256 of the last weights of every finished stage, by uid."""
    found = {}
    for done in root.rglob("done.json"):
        name = json.loads(done.read_text())["checkpoint"]
        files = json.loads((done.parent / "checkpoints" / name / "manifest.json").read_text())[
            "files"
        ]
        found[done.parent.name] = files["weights.safetensors"]["sha256"]
    return found


class Meter:
    """Core seconds of a process and all below it. A rank counts when it ends, through the process
    that waited for it."""

    def __init__(self):
        self.seen: dict[int, float] = {}

    def look(self, pid: int) -> None:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):
                words, times = " ".join(process.cmdline()), process.cpu_times()
                if "segfleet.pipeline.launch.worker" not in words:
                    below = (
                        times.children_user + times.children_system
                        if words.startswith("ray::")
                        else 0.0
                    )
                    self.seen[process.pid] = times.user + times.system + below


def measured(how: str, steps: int, slots: int, store: Path, runs: Path) -> dict[str, float]:
    """In a process of its own: wall seconds, and core seconds of everything it starts, Ray's own
    processes included."""
    import subprocess

    start, meter = time.perf_counter(), Meter()
    command = [
        sys.executable,
        __file__,
        "--child",
        how,
        str(steps),
        str(slots),
        str(store),
        str(runs),
    ]
    with open(runs.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
        while process.poll() is None:
            meter.look(process.pid)
            time.sleep(0.3)
    assert process.returncode == 0, runs.with_suffix(".log").read_text()
    steps_run = sum(json.loads(path.read_text())["steps"] for path in runs.rglob("done.json"))
    seconds = {
        "wall_seconds": round(time.perf_counter() - start, 1),
        "core_seconds": round(sum(meter.seen.values()), 1),
    }
    return {**seconds, "optimizer_steps": steps_run}


def main(steps: int, slots: int) -> None:
    from conftest import write_tiny_store

    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
        root = Path(scratch)
        store = write_tiny_store(root / "store", 2, "zarr", 6, 2, 40, 1)
        ours, theirs = (
            measured(how, steps, slots, store, root / how) for how in ("shared", "plain")
        )
        first, second = weights(root / "shared"), weights(root / "plain")
        assert first == second and len(first) == 16, (
            "shared and separate training must agree bitwise"
        )
        one, bare = (
            measured(how, SHORT, 1, store, root / f"{how}-1") for how in ("shared", "alone")
        )
    result = {
        "steps_of_an_epoch": steps, "slots": slots, "cores": os.cpu_count(), "shared": ours,
        "plain": theirs,
        "ratio": {key: round(theirs[key] / ours[key], 3) for key in ours},
        "equal_stages": len(first),
        "controller_seconds_per_stage": round((one["wall_seconds"] - bare["wall_seconds"]) / 16, 2),
        "one_slot": {"steps_of_an_epoch": SHORT, "sweep": one, "alone": bare},
        "load": os.getloadavg(),
    }  # fmt: skip
    (HERE / "results" / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        how, steps, slots, store, runs = sys.argv[2:]
        {"shared": shared, "plain": plain, "alone": alone}[how](
            space(Path(store), int(steps)), Path(runs), int(slots)
        )
    else:
        main(*(int(word) for word in (sys.argv[1:] + ["150", "2"][len(sys.argv) - 1 :])))
