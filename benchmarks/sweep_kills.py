"""SIGKILL of a sweep's parts at random moments: the controller, a trial's process, Ray's raylet,
its control server, a rank.

    python benchmarks/sweep_kills.py [--kills 10]

A sweep of 16 stages (2 networks x 2 first x 3 second rates) is killed, and started again whenever
its command ended, until it is done. It must then have the ranking and the weights of an undisturbed
one, and no finished stage may have been written again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
from conftest import write_tiny_store  # noqa: E402
from sweep import space, weights  # noqa: E402

PARTS = {
    "controller": None,
    "trial": "ray::",
    "raylet": "raylet/raylet",
    "control server": "gcs_server",
    "rank": "segfleet.pipeline.launch.worker",
}
PATIENCE = 900.0  # seconds one command may take


def start(work: Path, runs: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "segfleet.cli.main",
        "sweep",
        "space.yaml",
        "--slots",
        "2",
        "--runs",
        runs,
        "--json",
    ]
    log = open(work / f"{runs}.log", "a")
    return subprocess.Popen(
        command,
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def family(process: subprocess.Popen) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def victims(process: subprocess.Popen, part: str) -> list[psutil.Process]:
    found = []
    for child in family(process):
        with suppress(psutil.Error):
            if PARTS[part] in " ".join(child.cmdline()):
                found.append(child)
    return found


def finished(runs: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.rglob("done.json")}


def disturbed(
    work: Path, name: str, deck: list[str], rng: random.Random
) -> tuple[list, list[dict]]:
    """One sweep, killed part by part from the deck; started again when its command was the victim.
    Its ranking, and the kills."""
    runs, rows = work / name, []
    while True:
        process, before, begun = start(work, name), finished(runs), time.monotonic()
        while deck and process.poll() is None:
            part, moment = deck[0], time.monotonic() + rng.uniform(1, 40)
            while process.poll() is None and (
                time.monotonic() < moment or (part != "controller" and not victims(process, part))
            ):
                time.sleep(0.05)
                assert time.monotonic() - begun < PATIENCE, f"nothing to kill: {part}"
            if process.poll() is not None:
                break
            relatives = family(process)
            with suppress(psutil.Error, IndexError):  # it may have ended by itself just now
                process.kill() if part == "controller" else rng.choice(
                    victims(process, part)
                ).kill()
                rows.append({"part": deck.pop(0), "stages_done": len(finished(runs))})
                print(json.dumps(rows[-1]), flush=True)
                if part == "controller":
                    process.wait()
                    psutil.wait_procs(
                        [relative for relative in relatives if relative.is_running()], timeout=120
                    )
                    break
        out, _ = process.communicate(timeout=PATIENCE)
        after = finished(runs)
        assert all(after[uid] == when for uid, when in before.items()), (
            "a finished stage was written again"
        )
        if process.returncode == 0:
            return ranking(json.loads(out)), rows


def ranking(document: dict) -> list[tuple]:
    return [(row["rank"], row["name"], row["score"], row["ci95"]) for row in document["ranking"]]


def main(kills: int) -> None:
    rng, deck, rows, sweeps = (
        random.Random(0),
        [part for _ in range(kills) for part in PARTS][:kills],
        [],
        [],
    )
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        work = Path(scratch)
        document = space(write_tiny_store(work / "store", 2, "zarr", 6, 2, 40, 1), 40)
        document["base"]["save_every"] = 5
        (work / "space.yaml").write_text(yaml.safe_dump(document))
        out, _ = (calm := start(work, "straight")).communicate(timeout=PATIENCE)
        assert calm.returncode == 0, (work / "straight.log").read_text()
        straight = ranking(json.loads(out))
        while deck:  # a sweep may be done before all kills have come
            name = f"killed{len(sweeps)}"
            found, more = disturbed(work, name, deck, rng)
            rows += more
            facts = {
                "kills": len(more),
                "stages": len(finished(work / name)),
                "same_ranking": found == straight,
            }
            sweeps.append(
                {**facts, "same_weights": weights(work / name) == weights(work / "straight")}
            )
            print(json.dumps(sweeps[-1]), flush=True)
    result = {"kills": rows, "sweeps": [sweep for sweep in sweeps if sweep["kills"]]}
    (HERE / "results" / "sweep_kills.json").write_text(json.dumps(result, indent=1) + "\n")
    assert all(sweep["same_ranking"] and sweep["same_weights"] for sweep in sweeps), (
        "a disturbed sweep ended differently"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    main(parser.parse_args().kills)
