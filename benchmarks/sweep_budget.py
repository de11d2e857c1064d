"""Best Dice against epochs spent, by searcher, on real data: 2018 DSB nuclei, two stages.

    python benchmarks/sweep_budget.py WORK [--only NAME ...]

The space is finite: 8 first stages of 6 epochs, each with 6 second ones of 3. Every searcher is
the product's own, with one slot, and is given stages that are really trained and scored; but a
stage that any of them has asked for before is taken from the folder of runs and not trained again.
That changes nothing: searchers are functions of seed and scores. What each would have spent alone
is counted. The same command goes on after anything. A population has other stages (its values
change every 3 epochs, the same list of them), and any of its networks counts.

Nothing is chosen on other cases than it is scored on: this compares how fast a searcher finds what
is good on the validation cases, not how good that is elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data")) / "dsb2018"
RESULT = HERE / "results" / "sweep_budget.json"
IMAGES = 40  # the first of the data set, by name
FIRST, SECOND = 6, 3  # epochs
BUDGETS = (36, 72, 108)  # epochs
MEMBERS = 6  # of a population
SEEDS = range(5)
RATES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5]
BASE = {
    "name": "budget",
    "data": {"store": "", "batch": 8, "patch": [32, 32]},
    "model": {"name": "unet_lite_standard", "options": {"width": 8}},
    "optimizer": {"name": "adamw"},
    "stages": [{"epochs": 1, "lr": 1e-3}],
    "evaluation": {"every": 1},
    "trackers": [],
}
TWO_STAGES = [
    {"name": "train", "epochs": FIRST, "steps": 6, "lr": RATES},
    {
        "name": "finetune", "epochs": SECOND, "steps": 6, "lr": RATES[:6], "schedule": "cosine",
        "inherit": "weights+optimizer",
    },
]  # fmt: skip
ONE_STAGE = [{**TWO_STAGES[0], "epochs": FIRST + SECOND}]
EVERY = len(RATES) * 6  # points
# What each searcher is asked for. `alone`: without a tree, every point trains its own path.
KINDS: dict[str, dict[str, Any]] = {
    "random, every point alone": {"search": "random", "alone": True},
    "random": {"search": "random"},
    "random, forks 3": {"search": "random", "forks": 3},
    "asha, stopping": {"search": "random", "scheduler": "asha"},
    "asha, promotion": {"search": "random", "scheduler": "asha", "asha": {"type": "promotion"}},
    "optuna, every point alone": {"search": "optuna", "alone": True},
    "optuna": {"search": "optuna"},
    "optuna, forks 3": {"search": "optuna", "forks": 3},
    "optuna, forks 3, candidates 3": {"search": "optuna", "forks": 3, "candidates": 3},
    "pbt": {"scheduler": "pbt"},
    "grid": {"search": "grid"},
}


def space(kind: str, budget: int, seed: int, store: Path) -> dict[str, Any]:
    words = {key: value for key, value in KINDS[kind].items() if key != "alone"}
    whole = FIRST + SECOND
    limits: dict[str, Any] = {"trials": EVERY}
    if KINDS[kind].get("alone"):
        limits["trials"] = budget // whole
    elif words.get("scheduler") != "asha":  # which spends less than its tree holds
        limits["epochs"] = budget
    if words.get("scheduler") == "pbt":
        words["pbt"] = {"population": MEMBERS, "interval": SECOND}
        limits = {}
    base = {**BASE, "data": {**BASE["data"], "store": str(store)}}
    stages = ONE_STAGE if words.get("scheduler") == "pbt" else TWO_STAGES
    return {
        "name": "budget", "base": base, "stages": stages, "seed": seed, "budget": limits, **words,
    }  # fmt: skip


class Shop:
    """Stages, trained when they are first asked for."""

    def __init__(self, runs: Path):
        self.runs, self.trained, self.seconds = runs, 0, 0.0

    def stage(self, order: Any, leaf: bool) -> Path:
        """The folder of a trained stage; of a leaf, scored."""
        from segfleet.pipeline.jobs import run_job
        from segfleet.pipeline.ranks import Ranks
        from segfleet.pipeline.stop import StopRequest

        path = self.runs / order.path.relative_to(order.job.root)
        needed = [path / "done.json", *([path / "evaluation.json"] if leaf else [])]
        if not all(file.exists() for file in needed):
            began = time.process_time()
            job = order.job.model_copy(
                update={"root": self.runs, "score": leaf, "pause_at": None, "max_seconds": None}
            )
            run_job(job, Ranks(), StopRequest())
            self.trained += 1
            self.seconds += time.process_time() - began
        return path


def replay(document: dict[str, Any], budget: int, shop: Shop, alone: bool) -> dict[str, Any]:
    """One search to the end of its budget. `curve`: [epochs spent, best Dice so far]."""
    from segfleet.sweeps.run import Resources
    from segfleet.sweeps.search.tree_search import FINISHED, start
    from segfleet.sweeps.space.load import parse_search
    from segfleet.sweeps.space.plan import make_plan

    runs = shop.runs.parent / f"replay-{os.getpid()}"
    shutil.rmtree(runs, ignore_errors=True)
    plan = make_plan(parse_search(document), runs, build=False)
    plan.folder.mkdir(parents=True)
    search = start(plan, Resources(slots=1), lambda done, total: None, None)
    spent, best, points, stages, curve = 0, 0.0, 0, 0, []
    passed: dict[str, int] = {}  # epochs along the path that a paused stage has
    while spent < budget and (order := search.next("n")) not in (None, FINISHED):
        node = plan.tree.nodes[order.node]
        leaf, own = bool(node.leaf_of), runs / node.path
        trained = shop.stage(order, leaf)
        begin = passed.get(node.uid, order.begin + order.start)
        reached, state = node.end, "done"
        for epochs, dice in validations(trained, order):
            if epochs <= begin:
                continue
            stop = search.validated("n", epochs, dice)
            if stop or epochs == order.pause:
                reached, state = epochs, "pruned" if stop else "paused"
                break
        spent += reached - begin
        passed[node.uid] = reached
        if state == "done":
            own.mkdir(parents=True)
            for name in ("done.json", *(["evaluation.json"] if leaf else [])):
                shutil.copyfile(trained / name, own / name)
            stages += 1
        result = {"state": state, "epochs": reached, "dice": dice}
        search.ended("n", {} if state == "pruned" else result)
        if state == "done" and leaf:
            points += 1
            if alone:
                spent = points * (FIRST + SECOND)
            found = json.loads((trained / "evaluation.json").read_text())
            score = found["summary"]["mean_foreground_dice"]
            if score > best:
                best = score
                curve.append([spent, round(best, 4)])
    shutil.rmtree(runs)
    return {"epochs": spent, "points": points, "best": round(best, 4), "curve": curve}


def validations(path: Path, order: Any) -> Iterator[tuple[int, float]]:
    from segfleet.sweeps.search.asha import validations as found

    return iter(found(path, order))


def prepare(work: Path) -> Path:
    """The store of the first images."""
    from segfleet.cli.main import app

    store, raw = work / "store", work / "raw" / "stage1_train"
    if not (store / "manifest.json").exists():
        raw.mkdir(parents=True, exist_ok=True)
        for folder in sorted((DATA / "stage1_train").iterdir())[:IMAGES]:
            if not (raw / folder.name).exists():
                (raw / folder.name).symlink_to(folder)
        words = ["preprocess", "dsb2018", "--raw", str(raw.parent), "--out", str(store)]
        app([*words, "--size", "64", "64"], standalone_mode=False)
    return store


def budgets_of(kind: str) -> tuple[int, ...]:
    """A list of points is made for its budget; whoever asks for one point after another has passed
    the smaller budgets on the way to the largest."""
    words = KINDS[kind]
    planned = words.get("search") in ("grid", "random") and "scheduler" not in words
    return BUDGETS if planned and not words.get("alone") else BUDGETS[-1:]


def summary(rows: dict[int, list[dict[str, Any]]], best: float | None) -> dict[str, Any]:
    """Of every budget the best Dice that was found within it, over the seeds; 0 where nothing was
    scored yet."""
    found = {}
    for budget in BUDGETS:
        runs = rows.get(budget) or rows[BUDGETS[-1]]
        values = [max((d for e, d in row["curve"] if e <= budget), default=0.0) for row in runs]
        mean = statistics.mean(values)
        found[str(budget)] = {
            "mean": round(mean, 4),
            "lowest": min(values),
            "highest": max(values),
            **({"below_the_best_of_all": round(best - mean, 4)} if best else {}),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    store, shop = prepare(work), Shop(work / "runs")
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    for kind in asked.only:
        for budget in budgets_of(kind):
            for seed in SEEDS if kind != "grid" else (0,):
                name = f"{kind} | {budget} | {seed}"
                if name not in known["runs"]:
                    document = space(kind, budget, seed, store)
                    alone = bool(KINDS[kind].get("alone"))
                    known["runs"][name] = replay(document, budget, shop, alone)
                    print(name, known["runs"][name], round(shop.seconds), flush=True)
                    write(known, shop)
    if "grid" in asked.only and "all" not in known:
        found = replay(
            {**space("grid", BUDGETS[0], 0, store), "budget": {}}, sys.maxsize, shop, False
        )
        known["all"] = found
    write(known, shop)


def write(known: dict[str, Any], shop: Shop) -> None:
    best = known.get("all", {}).get("best")
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name, row in known["runs"].items():
        kind, budget, _ = name.split(" | ")
        rows.setdefault(kind, {}).setdefault(int(budget), []).append(row)
    known["table"] = {kind: summary(of, best) for kind, of in rows.items() if BUDGETS[-1] in of}
    known["stages_trained"] = known.get("stages_trained", 0) + shop.trained
    known["cpu_seconds"] = round(known.get("cpu_seconds", 0) + shop.seconds, 1)
    shop.trained, shop.seconds = 0, 0.0
    RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
