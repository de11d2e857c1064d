"""What is chosen by the data alone, whatever the device."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

from segfleet.pipeline.data.augment import flat
from segfleet.pipeline.planning.target import Device, in_words
from segfleet.preprocess.planning.plan import outputs, plan_network
from segfleet.preprocess.stores.manifest import Manifest

USUAL_GB = 8.0  # of memory that nnU-Net plans a patch for
SHARE = 0.7  # of the budget for training steps; the rest reads, validates, scores and starts up
LOW = 0.25  # share of the median case that a patch should see, as for nnU-Net
LOW_GAIN = 2.0  # times fewer voxels that a low resolution must have to be worth it, as for nnU-Net
LOW_SHARE = 1 / 3  # of the epochs


def median_case(manifest: Manifest) -> tuple[int, int, int]:
    """Voxels (z, y, x) of the stored cases, the median per axis."""
    z, y, x = (
        int(statistics.median(sizes)) for sizes in zip(*manifest.cases.grids("shape"), strict=True)
    )
    return z, y, x


def dims_of(manifest: Manifest) -> tuple[int, str]:
    plan, dataset = manifest.plan, manifest.dataset
    if dataset.dims == 2:
        return 2, "The images are 2D."
    if plan.patch[0] == 1:
        return 2, "The store was made for slices, so a 2D network."
    return 3, "The cases are volumes, whose neighbouring slices help: a 3D network."


def base(manifest: Manifest, store: Path, seconds: float, target: Device) -> tuple[dict, dict]:
    dims, why = dims_of(manifest)
    split = "kfold" if "kfold" in manifest.splits else next(iter(manifest.splits))
    folds = len(manifest.folds(split))
    document: dict[str, Any] = {
        "name": f"auto_{re.sub(r'[^A-Za-z0-9_-]', '_', manifest.dataset.name).lower()}",
        "seed": 0,
        "data": {"store": str(store), "split": split, "fold": 0},
        "model": {"name": f"plain_unet_{dims}d", "options": {}},
    }
    reasons = {
        "seed": "Any number: of weights, samples and augmentation.",
        "data.split": f"{folds} fold(s) by patient.",
        "data.fold": "data.fold=all trains every fold and scores all cases.",
        "model.name": f"{why} nnU-Net's plain U-Net, which few networks beat.",
    }
    return document, reasons


def notes_on(manifest: Manifest, target: Device, seconds: float) -> list[str]:
    median, plan = median_case(manifest), manifest.plan
    spacing = " x ".join(f"{s:g}" for s in plan.target_spacing)
    notes = [
        f"Planned by segfleet for {manifest.dataset.name}: {len(manifest.cases)} cases, median "
        f"{' x '.join(map(str, median))} voxels of {spacing} mm (z y x), labels "
        f"{', '.join(name for name, value in manifest.dataset.labels.items() if value)}.",
        f"Device: {target.name}. Budget: {in_words(seconds)} for one run.",
    ]
    return notes


def low_first(
    document: dict[str, Any], reasons: dict[str, str], manifest: Manifest, patch: tuple[int, ...]
) -> list[str]:
    """Make the one stage two, the first at a low resolution, where a patch of a volume sees too
    little: the same patch over a larger field of view of the same store, so that folds stay as
    they are. Where nnU-Net would plan `3d_lowres`, and as coarse; its cascade also shows the second
    network what the first one said, here the second stage goes on with the first one's weights.
    The note on it."""
    share = math.prod(patch) / max(1, math.prod(median_case(manifest)))
    stage = document["stages"][0]
    if patch[0] == 1 or LOW / share < LOW_GAIN or stage["epochs"] < 3:
        return []
    spacing = tuple(step or 1.0 for step in manifest.plan.target_spacing)
    factor = (LOW / share) ** (1 / 2 if flat(patch, spacing) else 1 / 3)
    first = max(1, round(stage["epochs"] * LOW_SHARE))
    wide = [round(factor * 0.85, 3), round(factor * 1.15, 3)]
    augment = {"augment": {"scale": 1.0, "scale_range": wide}}
    low = {**stage, "name": "low_resolution", "epochs": first, "data": augment}
    document["stages"] = [low, {**stage, "epochs": stage["epochs"] - first}]
    for key in [key for key in reasons if key.startswith("stages.0.")]:
        reasons[key.replace("stages.0.", "stages.1.")] = reasons[key]
    reasons["stages.0.epochs"] = (
        f"A third of all epochs at a low resolution; of both: {reasons['stages.1.epochs']}"
    )
    reasons["stages.0.data"] = (
        f"Fields of view {factor:.3g} times as wide as the patch, so that it sees {LOW:.0%} of the "
        "median case, by which nnU-Net chooses its low resolution."
    )
    reasons["stages.1.epochs"] = "The others at the full resolution, from the weights before."
    return [
        f"A patch sees {share:.1%} of the median case, so a stage at a low resolution comes first. "
        "Whether it helps on these data is for `segfleet compare` to say: without it, give its "
        "epochs to the other stage."
    ]


def shared(reasons: dict[str, str]) -> dict[str, Any]:
    reasons["data.foreground"] = "A third of a batch is centred on foreground, as nnU-Net does."
    reasons["data.augment"] = (
        "The default augmentation, mirrored along all axes. Where left and right (or front and "
        "back) are different labels, name the axes that may be mirrored: augment: {flip: [0]}."
    )
    reasons["data.workers"] = "What the cores allow; it changes no result."
    reasons["loss.name"] = "Cross entropy with Dice, by the head: softmax or one sigmoid a region."
    return {"foreground": 1 / 3, "augment": {}, "workers": "auto"}


def network_plan(
    manifest: Manifest, dims: int, memory_gb: float
) -> tuple[tuple[int, int, int], int]:
    """Patch and batch by the preprocessing planner for this much memory."""
    plan = manifest.plan
    spacing = [step or 1.0 for step in plan.target_spacing]
    median = median_case(manifest)
    return plan_network(
        median,
        spacing,
        dims,
        outputs(manifest.dataset),
        memory_gb,
        voxels=math.prod(median) * len(manifest.cases),
        patch=(1, *plan.size[1:]) if plan.size and memory_gb >= USUAL_GB else None,
    )
