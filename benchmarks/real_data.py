"""Accuracy on real data: preprocess, train and score a shipped recipe through the command line,
timed.

    python benchmarks/real_data.py hippocampus [--work DIR] [key=value ...]
    python benchmarks/real_data.py dsb2018

The data sets are looked for in $SEGFLEET_TEST_DATA, else in ../shared/data beside the repository.
Two ranks of one thread each. Targets, after at most 15 minutes of training on 2 cores (30
core-minutes): hippocampus, 208 cases, fold 0: mean foreground Dice of whole volumes >= 0.885;
dsb2018, 402 images, fold 0: mean Dice per image >= 0.92. With --work the store and the run are kept
there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data"))
SETS = {
    "hippocampus": ("msd", "Task04_Hippocampus", 0.885),
    "dsb2018": ("dsb2018", "dsb2018", 0.92),
}
RANKS = 2


def segfleet(*arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments), "--json"]
    return json.loads(
        subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, check=True, text=True
        ).stdout
    )


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def events(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]


def main(name: str, work: str | None, changes: list[str]) -> None:
    reader, folder, target = SETS[name]
    with nullcontext(work) if work else tempfile.TemporaryDirectory(prefix="segfleet-") as scratch:
        store, runs = f"{scratch}/store", f"{scratch}/runs"
        start = time.time()
        made = segfleet("preprocess", reader, "--raw", DATA / folder, "--out", store)
        preprocessing = time.time() - start
        before = cpu_seconds()
        done = segfleet(
            "train", name, f"data.store={store}", *changes, "--ranks", RANKS, "--runs", runs
        )
        cores = cpu_seconds() - before
        logs = [event for stage in done["stages"] for event in events(stage)]
        scores = json.loads((Path(done["run"]) / "evaluation.json").read_text())
    summary = scores["summary"]
    result = {
        "recipe": name,
        "changes": changes,
        "store": made["id"],
        "cases_scored": summary["cases"],
        "preprocessing_seconds": round(preprocessing, 1) if made["status"] == "written" else None,
        "training_minutes": round((logs[-1]["time"] - logs[0]["time"]) / 60, 2),
        "core_minutes_training_and_scoring": round(cores / 60, 2)
        if logs[0]["time"] > start
        else None,  # None: it was there already
        "load_average": os.getloadavg(),
        "mean_foreground_dice": summary["mean_foreground_dice"],
        "confidence_95": summary["mean_foreground_dice_ci95"],
        "structures": {key: value["dice"]["mean"] for key, value in summary["structures"].items()},
        "target": target,
        "reached": summary["mean_foreground_dice"] >= target,
        "losses": [round(event["loss"], 4) for event in logs if event["event"] == "step"][
            :: max(1, len(logs) // 20)
        ],
    }
    (HERE / "results" / f"real_data_{'_'.join([name, *changes])}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SETS)
    parser.add_argument("changes", nargs="*")
    parser.add_argument("--work")
    options = parser.parse_intermixed_args()
    main(options.name, options.work, options.changes)
