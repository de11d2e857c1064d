"""Kill -9 of a random rank at random moments, until a run is done; its weights must be bitwise
those of an undisturbed run.

    python benchmarks/kills.py [--kills 30] [--engines ddp zero0 zero1 zero2 zero3]

Two local ranks, fp32, a tiny network with batch normalisation, two stages. The kills are shared out
among the engines. Counted: steps lost per kill (between the last step logged and the step resumed
from) against the checkpoint interval.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from conftest import write_tiny_store  # noqa: E402

INTERVAL, RANKS = 5, 2
ENGINES = {
    "ddp": [],
    **{
        f"zero{stage}": ["engine.name=deepspeed", f"engine.options.zero={stage}"]
        for stage in range(4)
    },
}


def recipe(store: Path) -> dict:
    return {
        "name": "kills",
        "data": {"store": str(store), "batch": 4, "patch": [16, 16]},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [
            {"name": "base", "epochs": 4, "steps": 40, "lr": 1e-2},
            {"name": "tune", "epochs": 2, "steps": 40, "lr": 1e-3, "inherit": "weights+optimizer"},
        ],
        "save_every": INTERVAL,
    }


def start(work: Path, runs: Path, changes: list[str]) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "segfleet.cli.main",
        "train",
        str(work / "kills.yaml"),
        *changes,
    ]
    options = ["--ranks", str(RANKS), "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [
            child
            for child in psutil.Process(process.pid).children()
            if "segfleet.pipeline.launch.worker" in child.cmdline()
        ]
    except psutil.NoSuchProcess:
        return []


def events(runs: Path, kind: str) -> list[dict]:
    found = []
    for path in sorted(runs.rglob("events.jsonl"), key=lambda path: len(path.parts)):
        found += [
            {**event, "stage": len(path.parts)}
            for event in map(json.loads, path.read_text().splitlines())
            if event["event"] == kind
        ]
    return found


def last_step(runs: Path) -> tuple[int, int]:
    """(depth of the stage's folder, last step logged)."""
    return max(((event["stage"], event["step"]) for event in events(runs, "step")), default=(0, 0))


def weights(runs: Path) -> dict[str, torch.Tensor]:
    leaf = next(path.parent for path in runs.rglob("recipe.json"))
    done = json.loads((leaf / "done.json").read_text())
    return load_file(leaf / "checkpoints" / done["checkpoint"] / "weights.safetensors")


def disturbed(
    work: Path, runs: Path, changes: list[str], kills: int, longest: float, rng: random.Random
) -> dict:
    """One run, killed `kills` times, restarted each time until it is done."""
    lost, moments = [], []
    while True:
        process = start(work, runs, changes)
        if len(moments) < kills:
            while not workers(process) and process.poll() is None:
                time.sleep(0.02)
            wait = rng.uniform(0.5, longest)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.02)
            victims = workers(process)
            if victims and process.poll() is None:
                before = last_step(runs)
                rng.choice(victims).kill()
                moments.append(round(wait, 2))
                process.communicate()
                before = max(before, last_step(runs))
                after = restart_point(runs)
                if after is not None and before[0]:
                    lost.append(max(0, before[1] - after[1]) if after[0] == before[0] else 0)
                continue
        if process.communicate()[0] is None and process.returncode == 0:
            return {"kills": len(moments), "seconds_after_start": moments, "steps_lost": lost}
        raise SystemExit(f"a run that nobody killed ended with exit code {process.returncode}")


def restart_point(runs: Path) -> tuple[int, int] | None:
    """(depth, step) of the newest complete checkpoint."""
    steps = [
        (len(path.parts) - 2, int(path.name.split("-")[1]))
        for path in runs.rglob("step-*")
        if (path / "manifest.json").exists()
    ]
    return max(steps, default=None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    options = parser.parse_args()
    rng = random.Random(0)
    rows = []
    with tempfile.TemporaryDirectory(prefix="segfleet-") as scratch:
        work = Path(scratch)
        store = write_tiny_store(work / "store", 2, "zarr", 6, 2, 24, 1)
        (work / "kills.yaml").write_text(yaml.safe_dump(recipe(store)))
        for place, engine in enumerate(options.engines):
            kills = options.kills // len(options.engines) + (
                place < options.kills % len(options.engines)
            )
            begin = time.monotonic()
            process = start(work, work / f"straight-{engine}", ENGINES[engine])
            if process.communicate()[0] is None and process.returncode:
                raise SystemExit(f"the undisturbed run of {engine} failed")
            longest, left = time.monotonic() - begin, kills
            right = weights(work / f"straight-{engine}")
            # a run may be done before all of its kills have come; the next one takes the rest
            for number in itertools.count():
                if not left:
                    break
                runs = work / f"killed-{engine}-{number}"
                row = disturbed(work, runs, ENGINES[engine], left, longest, rng)
                if not row["kills"]:
                    continue
                left -= row["kills"]
                found = weights(runs)
                equal = right.keys() == found.keys() and all(
                    torch.equal(right[name], found[name]) for name in right
                )
                worst = max(
                    (right[name].double() - found[name].double()).abs().max().item()
                    for name in right
                )
                rows.append(
                    {"engine": engine, **row, "bitwise_equal": equal, "largest_difference": worst}
                )
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "ranks": RANKS,
        "checkpoint_interval": INTERVAL,
        "kills": sum(row["kills"] for row in rows),
        "engines": rows,
    }
    (HERE / "results" / "kills.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
