"""How close to the published methods: initialisation, coarse targets, imported nnU-Nets, metrics.

    python benchmarks/fidelity.py [init] [targets] [nnunet --work DIR] [recipes --work DIR]

init: mean and deviation of what every network's tensors start from, over five seeds, by kind of
layer, beside the authors' rule. targets: coarse targets of deep supervision against PyTorch's
`nearest-exact`, which nnU-Net v2 uses, on real volumes. nnunet: predictions of imported nnU-Nets
against nnU-Net's own, voxel by voxel; DIR is what `benchmarks/nnunet_side.py` left, made in an
environment that holds nnunetv2. Target: 99.9 % of voxels equal, with foreground in them. recipes:
two published set-ups end to end at reduced length on the nuclei of the 2018 Data Science Bowl,
every way of counting printed side by side. Results are kept in benchmarks/results/fidelity.json,
part by part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data"))
RESULTS = HERE / "results" / "fidelity.json"
SEEDS = 5
EQUAL = 0.999  # of all voxels: the target for imported nnU-Nets
SHORT, IMAGES = 40, 96  # steps of a published set-up here, on so many images


def segfleet(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def initialisation() -> dict[str, Any]:
    """network -> kind of layer -> {tensors, mean, deviation over the layer's published rule}."""
    import torch

    sys.path.insert(0, str(HERE.parent / "tests" / "models"))
    import test_initialisation as rules

    from segfleet.models.registry import build_model, spec

    found: dict[str, Any] = {}
    for name, rule_of in rules.NETWORKS.items():
        chosen, kinds = spec(name), {}
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = build_model(
                name, in_channels=chosen.in_channels, num_classes=chosen.num_classes,
                options=chosen.reduced,
            )  # fmt: skip
            for parameter, value in model.named_parameters():
                where, _, leaf = parameter.rpartition(".")
                kind, number = rule_of(parameter, model.get_submodule(where), leaf)
                spread = number / 3**0.5 if kind == "uniform" else number
                unit = value.detach().flatten() / (spread or 1.0)
                kinds.setdefault(kind, []).append(unit)
        found[name] = {
            kind: {
                "tensors": len(units) // SEEDS,
                "mean": round(float(torch.cat(units).mean()), 4),
                "deviation": round(float(torch.cat(units).std()), 4),
            }
            for kind, units in sorted(kinds.items())
            if kind in ("uniform", "normal", "constant")
        }
    return found


def targets() -> dict[str, Any]:
    """Dice of our coarse target against nearest-exact's, per factor, on real labels."""
    import nibabel
    import numpy as np
    import torch
    import torch.nn.functional as F

    from segfleet.pipeline.losses import deep_supervision

    files = sorted((DATA / "sunnybrook_acdc_layout/training").glob("*/*_gt.nii.gz"))[:8]
    found = {}
    for factors in ((1, 2, 2), (1, 4, 4), (2, 8, 8)):
        same = total = 0
        for file in files:
            label = np.asarray(nibabel.load(file).dataobj).T
            label = torch.from_numpy(label.astype(np.int64))[None, None]
            label = label[..., : label.shape[2] // 2 * 2, :, :]
            size = [n // f for n, f in zip(label.shape[2:], factors, strict=True)]
            ours = deep_supervision.nearest(label, size)
            theirs = F.interpolate(label.float(), size, mode="nearest-exact").long()
            same += 2 * int(((ours == 3) & (theirs == 3)).sum())
            total += int((ours == 3).sum() + (theirs == 3).sum())
        found["x".join(map(str, factors))] = {"volumes": len(files), "dice": round(same / total, 5)}
    return found


def nnunet(work: Path) -> dict[str, Any]:
    """set and fold -> share of voxels on which the imported run and nnU-Net agree."""
    found = {}
    for home in sorted(path.parent for path in work.glob("*/model")):
        runs = segfleet("import", "nnunet", home / "model", "--to", home / "imported")["runs"]
        for theirs, run in zip(sorted(home.glob("predictions_*")), runs, strict=True):
            fold = theirs.name.rpartition("_")[2]
            out = home / f"ours_{fold}"
            segfleet("predict", run, home / "images", "--out", out)
            as_it_is = alike(theirs, out)
            found[f"{home.name} fold {fold}"] = {
                **as_it_is,
                "met": as_it_is["equal"] >= EQUAL and as_it_is["foreground"] > 0,
                # nnU-Net adds up tiles in half precision, in which close logits become equal
                "with_single_precision_sums": alike(home / f"single_{fold}", out),
                "nnunet_half_against_single": alike(theirs, home / f"single_{fold}"),
            }
    return found


def alike(one: Path, other: Path) -> dict[str, Any]:
    """How many voxels of two folders of label files are equal."""
    import nibabel
    import numpy as np

    equal = voxels = foreground = 0
    for file in sorted(one.glob("*.nii.gz")):
        a, b = (np.asarray(nibabel.load(p).dataobj) for p in (file, other / file.name))
        equal, voxels = equal + int((a == b).sum()), voxels + a.size
        foreground += int((a > 0).sum())
    return {
        "voxels": voxels,
        "foreground": foreground,
        "equal": equal / voxels,
        "different": voxels - equal,
    }


SETUPS = {  # recipe: a smaller network, how its header prepares images besides
    "nlie_unet_dsb2018": ("nlie_unet_t", ("--masks", "nearest", "--normalisation", "imagenet")),
    "asc_seg_busi": ("asc_seg_nomamba", ("--normalisation", "minmax255")),
}


def recipes(work: Path, names: list[str]) -> dict[str, Any]:
    """Published set-ups end to end, shortened: every way of counting, side by side."""
    found, raw = {}, work / "raw"
    for image in sorted((DATA / "dsb2018/stage1_train").iterdir())[:IMAGES]:
        shutil.copytree(image, raw / "stage1_train" / image.name, dirs_exist_ok=True)
    for name in names:
        network, more = SETUPS[name]
        store = work / f"{name}_store"
        segfleet(
            "preprocess", "dsb2018", "--raw", raw, "--out", store, "--size", 96, 96,
            "--interpolation", "bilinear", *more,
        )  # fmt: skip
        trained = segfleet(
            "train", name, f"data.store={store}", f"model.name={network}", "data.patch=[96,96]",
            "data.split=80-20-seed2981", "data.workers=0", "stages.0.epochs=2",
            f"stages.0.steps={SHORT // 2}", "stages.0.lr=2e-3", "stages.0.period=null",
            "evaluation.every=2", "evaluation.cases=20", "--runs", work / "runs",
        )  # fmt: skip
        document = json.loads((Path(trained["run"]) / "evaluation.json").read_text())
        scores = next(iter(document["summary"]["structures"].values()))
        found[name] = {
            "network": network, "images": len(document["cases"]), "steps": SHORT,
            "dice": scores["variants"], "one_confusion_matrix": scores["pooled"],
            "per_image": {
                metric: scores[metric]["mean"]
                for metric in ("dice", "iou", "mean_iou", "accuracy", "specificity", "sensitivity")
            },
        }  # fmt: skip
    return found


def numbers(found: dict[str, Any], path: str = "") -> dict[str, float]:
    """Every number in nested tables, by the keys that lead to it."""
    flat: dict[str, float] = {}
    for key, value in found.items():
        where = f"{path} {key}".replace("_", " ").strip()
        if isinstance(value, dict):
            flat |= numbers(value, where)
        elif isinstance(value, float):
            flat[where] = value
    return flat


def side_by_side(setups: dict[str, dict[str, Any]]) -> str:
    """A table of all scores, one column for each set-up."""
    columns = {name: numbers(found) for name, found in setups.items()}
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    lines = ["  ".join([" " * 60, *columns])]
    for row in rows:
        cells = (f"{column.get(row, float('nan')):{len(n)}.4f}" for n, column in columns.items())
        lines.append("  ".join([f"{row:60}", *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=("init", "targets", "nnunet", "recipes"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    told = parser.parse_args()
    missed = False
    for part in told.parts:
        if part in ("nnunet", "recipes"):
            if told.work is None:
                parser.error(f"{part} needs --work DIR")
            found = nnunet(told.work) if part == "nnunet" else recipes(told.work, told.setups)
        else:
            found = {"init": initialisation, "targets": targets}[part]()
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        # sets of nnU-Net and set-ups may come one by one, each in minutes
        known[part] = known.get(part, {}) | found if part in ("nnunet", "recipes") else found
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(part, side_by_side(known[part]) if part == "recipes" else json.dumps(found, indent=1))
        missed |= part == "nnunet" and not all(one["met"] for one in found.values())
    if missed:
        sys.exit("imported nnU-Nets do not predict as nnU-Net does")


if __name__ == "__main__":
    main()
