"""Plans against nnU-Net's planner: target spacing, slice axis, patch and batch, 3D and 2D.

    python benchmarks/plans.py --nnunet ENVIRONMENT/bin/python [--seed 16]
    [--out benchmarks/results/plans.json]

70 random 3D fingerprints, 40 random 2D ones and those of ten known data sets (median shapes and
spacings as published) go through `make_plan` and through nnU-Net's `ExperimentPlanner` in an
environment of its own (benchmarks/preprocess.py installs one). Printed is how many are equal in
everything, and every difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# name -> spacing in mm, shape, cases, channel, labels with background
KNOWN = {
    "BrainTumour": ((1.0, 1.0, 1.0), (138, 169, 138), 484, "MRI", 4),
    "Heart": ((1.37, 1.25, 1.25), (115, 320, 232), 20, "MRI", 2),
    "Liver": ((1.0, 0.7676, 0.7676), (432, 512, 512), 131, "CT", 3),
    "Hippocampus": ((1.0, 1.0, 1.0), (36, 50, 35), 260, "MRI", 3),
    "Prostate": ((3.6, 0.625, 0.625), (20, 320, 319), 32, "MRI", 3),
    "Lung": ((1.245, 0.7851, 0.7851), (252, 512, 512), 63, "CT", 2),
    "Pancreas": ((2.5, 0.8027, 0.8027), (93, 512, 512), 281, "CT", 3),
    "ACDC": ((10.0, 1.5625, 1.5625), (9, 256, 216), 200, "MRI", 4),
    "KiTS": ((3.0, 0.7816, 0.7816), (107, 512, 512), 210, "CT", 3),
    "AMOS": ((5.0, 0.7129, 0.7129), (101, 541, 541), 240, "CT", 16),
}


def fingerprints(seed: int) -> list[dict]:
    draw, found = np.random.default_rng(seed), []
    for name, (spacing, shape, cases, channel, labels) in KNOWN.items():
        found.append(
            {
                "name": name,
                "spacings": [spacing] * cases,
                "shapes": [shape] * cases,
                "channel": channel,
                "labels": labels,
                "dims": 3,
            }
        )
    for number in range(110):
        dims = 3 if number < 70 else 2
        cases = int(draw.integers(4, 60))
        if dims == 3:
            middle = np.exp(draw.uniform(np.log(0.4), np.log(2), 3))
            if draw.random() < 0.5:
                middle[draw.integers(3)] *= draw.uniform(2, 8)
            edge = draw.uniform(80, 400, 3) / middle
        else:
            middle, edge = np.array([999.0, 1, 1]), np.array([1, *draw.uniform(100, 2000, 2)])
        varies = draw.uniform(0.8, 1.25, (cases, 3)) if dims == 3 else np.ones((cases, 3))
        shapes = np.maximum(edge * draw.uniform(0.8, 1.25, (cases, 3)), 8).astype(int)
        if dims == 2:
            shapes[:, 0] = 1
        found.append(
            {
                "name": f"random {dims}D {number if dims == 3 else number - 70}",
                "spacings": np.round(middle * varies, 4).tolist(),
                "shapes": shapes.tolist(),
                "channel": "MRI",
                "labels": int(draw.integers(2, 15)),
                "dims": dims,
            }
        )
    return found


def ours(prints: list[dict]) -> list[dict]:
    from segfleet.preprocess.planning.fingerprint import Fingerprint
    from segfleet.preprocess.planning.plan import make_plan
    from segfleet.preprocess.stores.manifest import Dataset

    found = []
    for one in prints:
        dataset = Dataset(
            name=one["name"],
            reader="none",
            dims=one["dims"],
            channels=(one["channel"],),
            labels={"background": 0, **{f"label {k}": k for k in range(1, one["labels"])}},
        )
        plan = make_plan(
            dataset,
            Fingerprint(
                shapes=one["shapes"],
                spacings=one["spacings"],
                intensity=({},),
                kept=1.0,
                dtypes=("float32",),
                cases_with={},
                orientations={},
            ),
        )
        row = {"transpose": list(plan.transpose), "spacing": list(plan.target_spacing)}
        row["2d"] = [list(plan.patch_2d[1:]), plan.batch_2d]
        if one["dims"] == 3:
            row["3d"] = [list(plan.patch), plan.batch]
        found.append(row)
    return found


def nnunet(prints: list[dict]) -> list[dict]:
    """In the other environment. The same steps as `ExperimentPlanner.plan_experiment`, which also
    writes files and plans a low-resolution network."""
    import torch
    from nnunetv2.experiment_planning.experiment_planners import (
        default_experiment_planner as module,
    )

    found = []
    for one in prints:
        labels = {"background": 0, **{f"label {k}": k for k in range(1, one["labels"])}}
        planner = module.ExperimentPlanner.__new__(module.ExperimentPlanner)
        facts = {
            "dataset_fingerprint.json": {
                "spacings": one["spacings"],
                "shapes_after_crop": one["shapes"],
                "median_relative_size_after_cropping": 1.0,
            },
            "dataset.json": {
                "channel_names": {"0": one["channel"]},
                "labels": labels,
                "numTraining": len(one["shapes"]),
            },
        }
        module.maybe_convert_to_dataset_name = lambda name: "Dataset001"
        module.load_json = lambda path, facts=facts: facts[Path(path).name]
        module.isfile = lambda path: path.endswith("fingerprint.json")
        module.get_filenames_of_train_images_and_targets = lambda *a: {}
        planner.__init__(1)
        spacing = planner.determine_fullres_target_spacing()
        forward, _ = planner.determine_transpose()
        shapes = [
            module.compute_new_shape(shape, own, spacing)
            for own, shape in zip(one["spacings"], one["shapes"], strict=True)
        ]
        median = np.median(shapes, 0)[forward]
        voxels = float(np.prod(median) * len(shapes))
        row = {
            "transpose": [int(a) for a in forward],
            "spacing": [float(s) for s in spacing[forward]],
        }
        networks = {"2d": (spacing[forward][1:], median[1:])}
        if one["dims"] == 3:
            networks["3d"] = (spacing[forward], median)
        for name, (step, size) in networks.items():
            with torch.device("meta"):  # it makes hundreds of networks, only to measure them
                plan = planner.get_plans_for_configuration(step, size, name, voxels, {})
            row[name] = [[int(n) for n in plan["patch_size"]], int(plan["batch_size"])]
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nnunet", help="python of an environment with nnunetv2")
    parser.add_argument("--seed", type=int, default=16, help="of the random fingerprints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/plans.json")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        prints = json.loads(options.side.read_text())
        options.out.write_text(json.dumps(nnunet(prints)))
        return
    prints = fingerprints(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch) / "asked.json", Path(scratch) / "told.json"
        asked.write_text(json.dumps(prints))
        command = [options.nnunet, __file__, "--side", str(asked), "--out", str(told)]
        folders = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), scratch)
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **folders}
        )
        theirs = json.loads(told.read_text())
    mine = ours(prints)
    table, equal = [], {}
    for one, here, there in zip(prints, mine, theirs, strict=True):
        near = np.allclose(here["spacing"], there["spacing"], rtol=0, atol=2e-6)
        same = near and all(here[key] == there[key] for key in there if key != "spacing")
        kind = one["name"].rpartition(" ")[0] or "known"
        equal.setdefault(kind, []).append(bool(same))
        table.append({"name": one["name"], "equal": bool(same), "ours": here, "nnU-Net": there})
        if not same or kind == "known":
            print(one["name"], "equal" if same else "DIFFERENT", here, *(() if same else (there,)))
    summary = {kind: f"{sum(rows)} of {len(rows)}" for kind, rows in equal.items()}
    print(summary)
    result = {"equal": summary, "plans": table}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
