"""What a user gets who decides nothing: `segfleet preprocess`, then `segfleet train auto` with a
budget, on real data.

    python benchmarks/auto.py [hippocampus | dsb2018 | sunnybrook ...] [--budget 15min] [--fold 0]

The data sets are looked for in $SEGFLEET_TEST_DATA, else in ../shared/data beside the repository.
Targets within 15 minutes of 2 cores (30 core-minutes, counted in CPU time since the machine may be
shared): what the hand-made recipes reach, 0.885 on hippocampus over five folds and 0.92 on dsb2018;
sunnybrook, an ACDC layout, trains without further settings. One fold is no mean of five, so what
the hand-made recipe reached on the same fold stands beside it (`real_data.py`, as last measured).
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
from pathlib import Path

from segfleet.core import settings

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data"))
SETS = {
    "hippocampus": ("msd", "Task04_Hippocampus", 0.885),
    "dsb2018": ("dsb2018", "dsb2018", 0.92),
    "sunnybrook": ("acdc", "sunnybrook_acdc_layout", None),
}
CORE_MINUTES = 30


def segfleet(*arguments: str) -> dict:
    command = [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def hand_made(name: str, fold: int) -> float | None:
    """What `real_data.py` wrote of this fold."""
    change = f"_data.fold={fold}" if fold else ""
    path = HERE / "results" / f"real_data_{name}{change}.json"
    return json.loads(path.read_text())["mean_foreground_dice"] if path.exists() else None


def measure(name: str, budget: str, fold: int, work: Path) -> dict:
    """Preprocess and train one data set without a recipe; what came out."""
    reader, folder, target = SETS[name]
    store, runs = work / name, work / "runs"
    segfleet("preprocess", reader, "--raw", DATA / folder, "--out", store)
    begin, before, load = time.time(), cpu_seconds(), os.getloadavg()[0]
    done = segfleet(
        *("train", "auto", f"data.store={store}", f"data.fold={fold}"),
        *("--budget", budget, "--runs", runs),
    )
    cores, seconds = cpu_seconds() - before, time.time() - begin
    scores = json.loads((Path(done["run"]) / "evaluation.json").read_text())["summary"]
    plan = settings.read(next((runs / "auto").glob("*.yaml")), "plan")
    stage, dice = plan["stages"][-1], scores["mean_foreground_dice"]
    return {
        "budget": budget,
        "fold": fold,
        "cases_scored": scores["cases"],
        "mean_foreground_dice": dice,
        "confidence_95": scores["mean_foreground_dice_ci95"],
        "structures": {key: value["dice"]["mean"] for key, value in scores["structures"].items()},
        "target": target,
        "reached": dice is not None and dice >= (target or 0),
        "hand_made_on_this_fold": hand_made(name, fold),
        "core_minutes_plan_training_scoring": round(cores / 60, 2),
        "core_minutes_target": CORE_MINUTES,
        "minutes_by_the_clock": round(seconds / 60, 2),
        "load_average_before": round(load, 2),
        "plan": {
            "model": plan["model"],
            "patch": plan["data"]["patch"],
            "batch": plan["data"]["batch"],
            "steps": stage["epochs"] * stage["steps"],
            "precision": plan["engine"]["precision"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(SETS))
    parser.add_argument("--budget", default="15min")
    parser.add_argument("--fold", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.names) - set(SETS):
        parser.error(f"found {', '.join(sorted(unknown))}, expected some of: {', '.join(SETS)}")
    path = HERE / "results" / "auto.json"
    for name in options.names:
        with tempfile.TemporaryDirectory(prefix="segfleet-") as work:
            found = measure(name, options.budget, options.fold, Path(work))
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: found}, indent=1) + "\n")
        print(name, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
