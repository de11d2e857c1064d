"""Does pre-training help here, by how much, and with how many labelled cases?

    python benchmarks/transfer.py [--work DIR] [--pairs ...] [--seeds ...] [--until HH:MM]

Three ways between real data sets: Hippocampus (MR) to heart (cine MR, `sunnybrook_acdc_layout`),
back, and fluorescence to stained tissue of DSB 2018 (the 30 coloured of the 402 images here). Every
way starts from a masked autoencoder (labels off), from supervised pre-training (labels on) and from
nothing, at equal steps of fine-tuning; with 5, 10 and 20 labelled cases, nested. Then, with 10
cases from the supervised start, what each schedule of fine-tuning changes.

Three seeds, each with a pre-training of its own and a fold of its own, so that the three test sets
have no case in common. The heart takes the folds that leave 20 of its 24 cases (12 patients) to
train on: 6 patients are scored. A gain is the Dice of a start minus that from nothing, case by
case. Its 95 % interval is over patients; how much another pre-training and another order of the
same data would change is not in it. `per_seed` shows that: where seeds differ in sign, there is no
gain, whatever the interval says.

Sized to about an hour of one core: networks of 0.1 million parameters, 300 steps of pre-training,
80 of fine-tuning for pictures and 400 for volumes (after 80 these have hardly learnt anything, from
whatever start), scored once at the end. That shows directions, not what a large pre-training can
do. Stages that are trained already are found again in DIR/runs. Where there are
cores, commands of other pairs and `--seeds` fill the same DIR side by side; one without `--seeds`
then finds what they trained and writes the result.

Result: benchmarks/results/transfer.json, written after every row.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from segfleet.core.files import write_atomically
from segfleet.pipeline.jobs import Stores, run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse, with_absolute_store
from segfleet.pipeline.run import stage_folders
from segfleet.pipeline.scoring.intervals import holm, paired
from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.planning.plan import Overrides

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data"))
RESULT = HERE / "results" / "transfer.json"
COST = "cpu_seconds.json"  # of a run, with what it trained of its pre-training
SEEDS, CASES = (0, 1, 2), (5, 10, 20)
PRETRAIN = 300  # optimizer steps
FOLDS = {"hippocampus": (0, 1, 2), "heart": (1, 3, 4), "stained": (0, 1, 2)}  # of each seed
VOLUMES = {
    "finetune": 400,
    "model": {
        "name": "plain_unet_3d",
        "options": {
            "features": [8, 16, 32], "strides": [1, 2, 2], "kernels": [3, 3, 3],
            "deep_supervision": False,
        },
    },
    "patch": {"hippocampus": [32, 32, 32], "heart": [8, 64, 64]},
}  # fmt: skip
PICTURES = {
    "finetune": 80,
    "model": {
        "name": "plain_unet_2d",
        "options": {
            "features": [8, 16, 32, 64], "strides": [1, 2, 2, 2], "kernels": [3, 3, 3, 3],
            "deep_supervision": False,
        },
    },
    "patch": {"fluorescence": [96, 96], "stained": [96, 96]},
}  # fmt: skip
PAIRS = {
    "fluorescence to stained": ("fluorescence", "stained", PICTURES),
    "hippocampus to heart": ("hippocampus", "heart", VOLUMES),
    "heart to hippocampus": ("heart", "hippocampus", VOLUMES),
}
STARTS = ("nothing", "masked autoencoder", "supervised")
SCHEDULES: dict[str, dict[str, Any]] = {
    "all at one rate": {},
    "no warm-up": {"warmup": 0},
    "layer_decay 0.7": {"layer_decay": 0.7},
    "encoder frozen": {"freeze": ["encoder"]},
    "encoder frozen, thawed half way": {"freeze": ["encoder"], "unfreeze_at": 1},
    "head first": {"freeze": ["backbone"], "unfreeze_at": 1},
    "encoder at a tenth": {"rates": {"encoder": 0.1}},
    "anchor 0.01": {"anchor": 0.01},
    "lora of rank 4": {"lora": {"rank": 4}},
}


def stores(work: Path) -> dict[str, Path]:
    """The stores of all data sets, made where they are not there."""
    raw = work / "raw"
    for name in sorted((DATA / "dsb2018/stage1_train").iterdir()):
        picture = next((name / "images").glob("*.png"))
        colours = np.asarray(Image.open(picture).convert("RGB").resize((32, 32)), float)
        stained = np.abs(colours - colours.mean(-1, keepdims=True)).mean() > 4
        place = raw / ("stained" if stained else "fluorescence") / "stage1_train" / name.name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(name)
    made = {
        "hippocampus": ("msd", DATA / "Task04_Hippocampus"),
        "heart": ("acdc", DATA / "sunnybrook_acdc_layout"),
        "fluorescence": ("dsb2018", raw / "fluorescence"),
        "stained": ("dsb2018", raw / "stained"),
    }
    found = {}
    for name, (reader, folder) in made.items():
        found[name] = work / "stores" / name
        build(BuildRequest(reader, folder, found[name], overrides=Overrides()), quick=True)
    return found


def recipe_of(pair: str, start: str, cases: int, seed: int, known: dict, more: dict) -> dict:
    source, target, kind = PAIRS[pair]
    batch = 2 if kind is VOLUMES else 4
    data = {"store": str(known[target]), "patch": kind["patch"][target], "batch": batch,
            "fold": FOLDS[target][seed], "workers": 0}  # fmt: skip
    epochs = 2 if "unfreeze_at" in more else 1
    steps = {"epochs": epochs, "steps": kind["finetune"] // epochs}
    stages = [
        {"name": "finetune", **steps, "lr": 1e-3, "schedule": "cosine", "warmup": 10,
         "data": {"cases": cases}, **more}
    ]  # fmt: skip
    if start != "nothing":
        first = {"name": "pretrain", "epochs": 1, "steps": PRETRAIN, "lr": 2e-3, "warmup": 10,
                 "data": {"store": str(known[source]), "split": "all",
                          "patch": kind["patch"][source]}}  # fmt: skip
        if start == "masked autoencoder":
            first["task"] = "reconstruct"
            first["data"]["foreground"] = 0.0
        same = target == "stained"  # nuclei are nuclei
        stages[0]["inherit"] = {"head": "keep" if same else "new"}
        stages.insert(0, first)
    return {
        "name": pair, "seed": seed, "data": {**data, "foreground": 0.5}, "model": kind["model"],
        "stages": stages, "evaluation": {"overlap": 0.25, "batch": 4},
    }  # fmt: skip


def scores(document: dict, runs: Path, until: str) -> dict[tuple[str, str], float]:
    """(patient, case) -> mean Dice of a run, trained and scored now unless it has been. Raises Late
    where there is no time for that."""
    recipe, began = with_absolute_store(parse(document)), spent()
    leaf = stage_folders(runs, recipe, Stores().manifest)[-1].path
    if not (leaf / "evaluation.json").exists():
        if until and time.strftime("%H:%M") >= until:
            raise Late(f"it is {until}")
        job = Train(recipe=recipe.model_dump(mode="json"), root=runs)
        run_job(job, Ranks(torch.device("cpu")), StopRequest())
        write_atomically(leaf / COST, json.dumps(spent() - began))
    found = json.loads((leaf / "evaluation.json").read_text())["cases"]
    return {(c["group"], c["id"]): c["mean_dice"] for c in found if c["mean_dice"] is not None}


def gain(ours: list[dict], base: list[dict]) -> dict[str, Any]:
    """Of lists of scores, one per seed: how much better, paired by seed and case."""
    patients: dict[str, list[float]] = {}
    per_seed = []
    for mine, theirs in zip(ours, base, strict=True):
        off = {key: mine[key] - theirs[key] for key in sorted(mine.keys() & theirs.keys())}
        per_seed.append(float(np.mean(list(off.values()))))
        for (patient, _), value in off.items():
            patients.setdefault(patient, []).append(value)
    found = paired(list(patients.values()))
    agree = len({value > 0 for value in per_seed}) == 1
    return {**found, "patients": len(patients), "per_seed": per_seed, "seeds_agree": agree}


class Late(Exception):
    """The clock says that it is enough."""


def learning_curve(ways: Callable, cases: int) -> dict[str, Any]:
    """The Dice of every start, seed by seed, and what it is above that of nothing."""
    found = {s: [ways(s, cases, seed, {}) for seed in SEEDS] for s in STARTS}
    gains = {s: gain(found[s], found["nothing"]) for s in STARTS[1:]}
    return {"cases": cases, "dice": {s: means(one) for s, one in found.items()}, "gains": gains}


def schedule(ways: Callable, more: dict[str, Any]) -> dict[str, Any]:
    """The same of a schedule, above one rate for all."""
    base, own = ([ways("supervised", 10, s, m) for s in SEEDS] for m in ({}, more))
    return {"dice": means(own), **({"against_one_rate": gain(own, base)} if more else {})}


def means(found: list[dict]) -> list[float]:
    return [float(np.mean(list(one.values()))) for one in found]


def spent() -> float:
    """CPU seconds of this process and the children it waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def fill(way: Callable, pairs: list[str], seeds: list[int]) -> None:
    """Train and score whatever the result is made of, of these pairs and seeds."""
    curves = [(start, cases, {}) for cases in CASES for start in STARTS]
    for start, cases, more in curves + [("supervised", 10, m) for m in SCHEDULES.values()]:
        for pair in pairs:
            for seed in seeds:
                way(pair, start, cases, seed, more)


def collect(way: Callable, pairs: list[str], out: dict[str, Any]) -> Iterator[None]:
    """Into `out` a row at a time: all learning curves, then all schedules; what there was no time
    for is named."""
    for pair in pairs:
        rows = out["learning_curves"].setdefault(pair, [])
        for cases in CASES:
            try:
                rows.append(learning_curve(partial(way, pair), cases))
            except Late:
                out["no_time_for"].append(f"{pair}, {cases} cases")
            yield
    for pair in pairs:
        table = out["schedules"].setdefault(pair, {})
        for name, more in SCHEDULES.items():
            try:
                table[name] = schedule(partial(way, pair), more)
            except Late:
                out["no_time_for"].append(f"{pair}, {name}")
            yield


def write(out: dict[str, Any], runs: Path) -> None:
    """The result so far; p-values are corrected over all learning curves, and all schedules."""
    curves = [
        g for c in out["learning_curves"].values() for row in c for g in row["gains"].values()
    ]
    tables = [row for table in out["schedules"].values() for row in table.values()]
    against = [row["against_one_rate"] for row in tables if "against_one_rate" in row]
    for family in (curves, against):
        for one, p in zip(family, holm([gain["p"] for gain in family]), strict=True):
            one["p_holm"] = p
    cost = sum(float(path.read_text()) for path in runs.rglob(COST))
    out["cpu_minutes"] = round(cost / 60, 1)
    write_atomically(RESULT, json.dumps(out, indent=1) + "\n")


def main(work: Path, pairs: list[str], seeds: list[int], until: str) -> None:
    torch.set_num_threads(1)
    known, runs = stores(work), work / "runs"

    def way(pair: str, start: str, cases: int, seed: int, more: dict) -> dict:
        return scores(recipe_of(pair, start, cases, seed, known, more), runs, until)

    out: dict[str, Any] = {
        "pretraining_steps": PRETRAIN,
        "finetuning_steps": {pair: PAIRS[pair][2]["finetune"] for pair in pairs},
        "seeds": len(SEEDS),
        "learning_curves": {}, "schedules": {}, "no_time_for": [],
    }  # fmt: skip
    if not seeds:
        for _ in collect(way, pairs, out):
            write(out, runs)
        return
    try:
        fill(way, pairs, seeds)
    except Late as why:
        print(why, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="Where stores and runs are kept.")
    parser.add_argument("--pairs", nargs="*", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--seeds", nargs="*", type=int, choices=SEEDS, default=[],
                        help="Train these alone, and write no result.")  # fmt: skip
    parser.add_argument("--until", default="", help="HH:MM, when to stop.")
    options = parser.parse_args()
    if options.work:
        main(options.work, options.pairs, options.seeds, options.until)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder), options.pairs, options.seeds, options.until)
