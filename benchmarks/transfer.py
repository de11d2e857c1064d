"""Does pre-training help here, by how much, and with how many labelled cases?

    python benchmarks/transfer.py [--work DIR] [--pairs ...] [--until HH:MM]

Three ways between real data sets: Hippocampus (MR) to heart (MR), back, and fluorescence to stained
tissue of DSB 2018. Every way starts from a masked autoencoder (labels off), from supervised
pre-training (labels on) and from nothing, at equal steps of fine-tuning; with 5, 10 and 20 labelled
cases, nested; three seeds. A gain is the Dice of a start minus that from nothing, paired case by
case, the mean over seeds, its 95 % interval over patients. Then, with 10 cases from the supervised
start, what each schedule of fine-tuning adds. Small networks and short runs: they show directions,
not what a large pre-training can do. Stages that are trained already are found again in DIR/runs.

Result: benchmarks/results/transfer.json, written after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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
SEEDS, CASES = (0, 1, 2), (5, 10, 20)
PRETRAIN, FINETUNE = 200, 80  # optimizer steps
VOLUMES = {
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
    "layer_decay 0.7": {"layer_decay": 0.7},
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
    data = {"store": str(known[target]), "patch": kind["patch"][target], "batch": batch}
    steps = {"epochs": 2, "steps": FINETUNE // 2} if "unfreeze_at" in more else {
        "epochs": 1, "steps": FINETUNE}  # fmt: skip
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
        stages[0]["inherit"] = {"head": "new"}
        stages.insert(0, first)
    return {
        "name": pair, "seed": seed, "data": {**data, "foreground": 0.5}, "model": kind["model"],
        "stages": stages, "evaluation": {"overlap": 0.25, "batch": 4},
    }  # fmt: skip


def scores(document: dict, runs: Path) -> dict[tuple[str, str], float]:
    """(patient, case) -> mean Dice of a run, trained and scored now unless it has been."""
    ranks, recipe = Ranks(torch.device("cpu")), with_absolute_store(parse(document))
    job = Train(recipe=recipe.model_dump(mode="json"), root=runs)
    run_job(job, ranks, StopRequest())
    leaf = stage_folders(runs, recipe, Stores().manifest)[-1].path
    found = json.loads((leaf / "evaluation.json").read_text())["cases"]
    return {(c["group"], c["id"]): c["mean_dice"] for c in found if c["mean_dice"] is not None}


def gain(ours: list[dict], base: list[dict]) -> dict[str, Any]:
    """Of lists of scores, one per seed: how much better, paired by seed and case."""
    keys = sorted(set.intersection(*[set(one) for one in (*ours, *base)]))
    off = {k: float(np.mean([a[k] - b[k] for a, b in zip(ours, base, strict=True)])) for k in keys}
    patients: dict[str, list[float]] = {}
    for (patient, _), value in off.items():
        patients.setdefault(patient, []).append(value)
    per_seed = [
        float(np.mean([a[k] - b[k] for k in keys])) for a, b in zip(ours, base, strict=True)
    ]
    return {**paired(list(patients.values())), "patients": len(patients), "per_seed": per_seed}


def main(work: Path, pairs: list[str], until: str) -> None:
    torch.set_num_threads(1)
    known, runs = stores(work), work / "runs"
    out: dict[str, Any] = {
        "pretraining_steps": PRETRAIN, "finetuning_steps": FINETUNE, "seeds": len(SEEDS),
        "learning_curves": {}, "schedules": {},
    }  # fmt: skip
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime

    def late() -> bool:
        return bool(until) and time.strftime("%H:%M") >= until

    def note() -> None:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
        out["cpu_minutes"] = round(used / 60, 1)
        RESULT.write_text(json.dumps(out, indent=1) + "\n")

    for pair in pairs:
        curve = out["learning_curves"].setdefault(pair, [])
        for cases in CASES:
            found: dict[str, list[dict]] = {start: [] for start in STARTS}
            for seed in SEEDS:
                if late():
                    out["stopped"] = f"at {pair}, {cases} cases, seed {seed}: by the clock"
                    note()
                    return
                for start in STARTS:
                    found[start].append(
                        scores(recipe_of(pair, start, cases, seed, known, {}), runs)
                    )
            dice = {s: [float(np.mean(list(one.values()))) for one in found[s]] for s in STARTS}
            gains = {s: gain(found[s], found["nothing"]) for s in STARTS[1:]}
            curve.append({"cases": cases, "dice": dice, "gains": gains})
            note()
            print(pair, cases, {s: round(g["mean"], 4) for s, g in gains.items()}, flush=True)
        table = {}
        base: list[dict] = []
        for name, more in SCHEDULES.items():
            if late():
                out["stopped"] = f"at {pair}, schedule {name}: by the clock"
                note()
                return
            own = [scores(recipe_of(pair, "supervised", 10, s, known, more), runs) for s in SEEDS]
            base = base or own
            table[name] = {
                "dice": [float(np.mean(list(one.values()))) for one in own],
                **({} if own is base else {"against_one_rate": gain(own, base)}),
            }
            out["schedules"][pair] = table
            note()
        print(pair, {k: round(float(np.mean(v["dice"])), 4) for k, v in table.items()}, flush=True)
    every = [g for c in out["learning_curves"].values() for row in c for g in row["gains"].values()]
    for one, p in zip(every, holm([g["p"] for g in every]), strict=True):
        one["p_holm"] = p
    note()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="Where stores and runs are kept.")
    parser.add_argument("--pairs", nargs="*", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--until", default="", help="HH:MM, when to stop.")
    options = parser.parse_args()
    if options.work:
        main(options.work, options.pairs, options.until)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder), options.pairs, options.until)
