"""Kills by seed over everything that runs for long, and what is left of it.

    python benchmarks/chaos.py [--kills 200] [--seconds 3600] [--work FOLDER] [--only WORD]

Scenarios: training with DDP and ZeRO 0 to 3 (two ranks, two loader processes each), saving (every
step), scoring, preprocessing, predicting, staging and a sweep. A kill starts the scenario in a fresh
folder, waits for a moment drawn by the kill's seed, kills one process drawn from its tree (or the
command itself) with SIGKILL, waits until nothing of it runs, and gives the same command again until
it is done. Then its result must be that of an undisturbed run, bit by bit, and there must be no
process, no half-written file and no temporary folder. Kill n is the same whenever it is done: with
--seconds the command stops and goes on later with the same --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
from conftest import write_tiny_store  # noqa: E402

MARK = "SEGFLEET_CHAOS"
CACHES = ("torchinductor",)  # torch's own, which is meant to stay
LONGEST = 600.0  # seconds of one command; more is a hang
DEEPSPEED = "engine.name=deepspeed"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    words: list[str]  # of segfleet; paths are relative to the scenario's own folder
    results: tuple[str, ...]  # globs whose bytes must be the same
    before: tuple[str, ...] = ()  # folders of the world that are copied into it
    share: float = 1.0  # of the kills


def scenarios() -> dict[str, Scenario]:
    weights = ("runs/**/done.json:checkpoint",)
    train = ["train", "tiny.yaml", "--ranks", "2", "data.workers=2"]
    found = {
        f"train zero{n}": Scenario(
            words=[*train, DEEPSPEED, f"engine.options.zero={n}"], results=weights, share=0.5
        )
        for n in range(4)
    }
    return {
        "train ddp": Scenario(words=train, results=weights, share=2.0),
        **found,
        "save": Scenario(words=["train", "tiny.yaml", "save_every=1"], results=weights, share=2.0),
        "stage": Scenario(
            words=["train", "tiny.yaml", "--stage-to", "$TMPDIR/../staged"],
            results=weights,
            share=1.0,
        ),
        "score": Scenario(
            words=["evaluate", "tiny", "evaluation.mirror=[0]"],
            results=("runs/**/evaluation.json:summary",),
            before=("runs",),
        ),
        "preprocess": Scenario(
            words=["preprocess", "msd", "--raw", "../raw", "--out", "made", "--workers", "2"],
            results=("made/manifest.json:id",),
            share=2.0,
        ),
        "predict": Scenario(
            words=["predict", "tiny", "../images", "--out", "predicted"],
            results=("predicted/*.png", "predicted/*.nii.gz"),
            before=("runs",),
            share=2.0,
        ),
        "sweep": Scenario(
            words=["sweep", "space.yaml", "--slots", "2"], results=weights, share=0.5
        ),
    }


def build(world: Path) -> None:
    from PIL import Image

    write_tiny_store(world / "store", 2, "zarr", 6, 1, 24, 1)
    stages = [
        {"name": "base", "epochs": 2, "steps": 8, "lr": 1e-2},
        {"name": "tune", "epochs": 1, "steps": 8, "lr": 1e-3, "inherit": "weights+optimizer"},
    ]
    recipe = {
        "name": "tiny",
        "data": {"store": str(world / "store"), "batch": 4, "patch": [16, 16]},
        "model": {"name": "unet_lite_standard", "options": {"width": 2}},
        "stages": stages,
        "save_every": 4,
    }
    (world / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    axes = [{**stages[0], "epochs": 1}, {**stages[1], "lr": [1e-3, 1e-4]}]
    space = {"name": "space", "base": {**recipe, "name": "space"}, "stages": axes}
    (world / "space.yaml").write_text(yaml.safe_dump(space))
    (world / "images").mkdir()
    import numpy as np

    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(world / "images" / f"image{number}.png")
    run(world, ["datasets", "msd", "phantom", "raw", "--cases", "6"], "none")
    run(world, ["train", "tiny.yaml"], "none")


def start(folder: Path, words: list[str], mark: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "segfleet.cli.main", *words],
        cwd=folder,
        env={
            **os.environ,
            MARK: mark,
            "OMP_NUM_THREADS": "1",
            "SEGFLEET_DEVICE": "cpu",
            "TMPDIR": str(folder.resolve().parent / "tmp"),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=open(folder / "stderr", "a"),
        start_new_session=True,
    )


def run(folder: Path, words: list[str], mark: str) -> float:
    begin, process = time.monotonic(), start(folder, words, mark)
    try:
        code = process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        code = "hangs"
    if code != 0:
        raise SystemExit(f"{words}: {code}\n{(folder / 'stderr').read_text()[-3000:]}")
    return time.monotonic() - begin


def marked(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes()  # a zombie has none
            if words and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(folder.name))
    return sorted(found)


def outcome(folder: Path, scenario: Scenario) -> dict[str, str]:
    """What must be the same: of `glob:key` that key of a document (a checkpoint: its weights)."""
    found = {}
    for result in scenario.results:
        glob, _, key = result.partition(":")
        for path in sorted(folder.glob(glob)):
            name = str(path.relative_to(folder))
            if key == "checkpoint":
                last = path.parent / "checkpoints" / json.loads(path.read_text())[key]
                found[name] = sha((last / "weights.safetensors").read_bytes())
            elif key:
                found[name] = sha(json.dumps(json.loads(path.read_text())[key]).encode())
            else:
                found[name] = sha(path.read_bytes())
    return found


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def litter(folder: Path) -> list[str]:
    """Half-written files of the scenario, temporary folders that killed processes left."""
    half = [path for path in folder.rglob("*") if ".partial" in path.name or path.name == "stop"]
    temporary = folder.parent / "tmp"
    left = [path for path in temporary.iterdir() if not path.name.startswith(CACHES)]
    return [str(path.relative_to(folder.parent)) for path in (*half, *left)]


def fresh(world: Path, folder: Path, scenario: Scenario) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.parent / "tmp", ignore_errors=True)
    (folder.parent / "tmp").mkdir(parents=True)
    folder.mkdir(parents=True)
    for name in ("tiny.yaml", "space.yaml"):
        shutil.copy(world / name, folder / name)
    for name in scenario.before:
        shutil.copytree(world / name, folder / name)
    for name in ("raw", "images"):
        if not (folder.parent / name).exists():
            shutil.copytree(world / name, folder.parent / name)


def disturbed(
    world: Path, work: Path, name: str, scenario: Scenario, seed: int, takes: float
) -> dict:
    rng, folder, mark = random.Random(seed), work / "at" / "here", f"{os.getpid()}-{seed}"
    fresh(world, folder, scenario)
    process, moment = start(folder, scenario.words, mark), rng.uniform(0.1, 0.95) * takes
    end = time.monotonic() + moment
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    row = {"scenario": name, "seed": seed, "moment": round(moment / takes, 2), "killed": None}
    if process.poll() is None:
        tree = marked(mark)
        victim = process.pid if rng.random() < 0.4 or not tree else rng.choice(tree)
        with suppress(OSError):
            words = Path(f"/proc/{victim}/cmdline").read_bytes().split(b"\0")
            row["killed"] = "command" if victim == process.pid else words[-2].decode()[:60]
            os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(LONGEST)
    killed = row["killed"] == "command"
    while marked(mark) and time.monotonic() - begin < 90:
        time.sleep(0.1)
    row["seconds_until_gone" if killed else "seconds_until_end"] = round(
        time.monotonic() - begin, 1
    )
    row["processes_left"] = len(marked(mark))
    for number in marked(mark):
        with suppress(OSError):
            os.kill(number, signal.SIGKILL)
    row["ends"] = process.returncode
    for _ in range(3):
        again = start(folder, scenario.words, mark)
        try:
            code = again.wait(LONGEST)
        except subprocess.TimeoutExpired:
            again.kill()
            code = "hangs"
        if code == 0:
            break
    row["again"] = code
    row["same"] = code == 0 and outcome(folder, scenario) == json.loads(
        (work / f"{name}.json").read_text()
    )
    end = time.monotonic() + 5
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    row["processes_left"] += len(marked(mark))
    row["files_left"] = litter(folder)
    return row


def main(options: argparse.Namespace) -> int:
    work, log = options.work.resolve(), options.work.resolve() / "log.jsonl"
    world = work / "world"
    if not (work / "built").exists():
        shutil.rmtree(work, ignore_errors=True)
        (work / "tmp").mkdir(parents=True)
        world.mkdir()
        build(world)
        (work / "built").touch()
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known, end = {row["seed"] for row in rows}, time.monotonic() + options.seconds
    table = scenarios()
    names, shares = list(table), [one.share for one in table.values()]
    with open(log, "a") as file:
        for seed in range(options.kills):
            name = random.Random(1000 + seed).choices(names, shares)[0]
            if seed in known or options.only not in name:
                continue
            if time.monotonic() > end:
                break
            right = work / f"{name}.json"
            if not right.exists():
                fresh(world, work / "at" / "here", table[name])
                takes = run(work / "at" / "here", table[name].words, "calm")
                right.write_text(json.dumps(outcome(work / "at" / "here", table[name])))
                (work / f"{name}.takes").write_text(str(takes))
            takes = float((work / f"{name}.takes").read_text())
            row = disturbed(world, work, name, table[name], seed, takes)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)
    return report(rows, options.kills)


def report(rows: list[dict], wanted: int) -> int:
    hit = [row for row in rows if row["killed"]]
    faults = [row for row in hit if not row["same"] or row["processes_left"] or row["files_left"]]
    result = {
        "kills_wanted": wanted,
        "kills": len(hit),
        "by_scenario": dict(sorted(Counter(row["scenario"] for row in hit).items())),
        "equal_results": sum(row["same"] for row in hit),
        "processes_left": sum(row["processes_left"] for row in hit),
        "files_left": sum(len(row["files_left"]) for row in hit),
        "longest_seconds_until_gone": max((r.get("seconds_until_gone", 0) for r in hit), default=0),
        "longest_seconds_until_end": max((r.get("seconds_until_end", 0) for r in hit), default=0),
        "faults": faults,
    }
    (HERE / "results" / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "faults"}))
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=86400.0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/segfleet-chaos"))
    parser.add_argument("--only", default="", help="a word of the scenario's name")
    sys.exit(main(parser.parse_args()))
