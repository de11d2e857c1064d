"""A recipe for CPUs: a small U-Net, and the largest patch with which the budget holds enough
steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from segfleet.core.errors import InputError
from segfleet.models.nnunet.topology import doubling_features, topology_from_plan
from segfleet.pipeline.parts import patch_of
from segfleet.pipeline.planning import timing
from segfleet.pipeline.planning.choices import (
    SHARE,
    USUAL_GB,
    base,
    dims_of,
    low_first,
    network_plan,
    notes_on,
    shared,
)
from segfleet.pipeline.planning.planned import Planned
from segfleet.pipeline.planning.target import Device, in_words
from segfleet.pipeline.planning.timing import Measured
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.preprocess.stores.manifest import Manifest

ENOUGH = 2500  # steps in which a small network learns a data set
SIZES = (
    USUAL_GB,
    4.0,
    2.0,
    1.0,
    0.5,
    0.25,
    0.125,
    0.0625,
)  # GB that patches for a CPU are planned with
CPU_BATCH = {2: 8, 3: 4}
CPU_STAGES = {2: 5, 3: 4}
SURELY = 4.0  # times longer than wanted: a first step that takes more is not repeated


def for_cpu(
    manifest: Manifest, store: Path, target: Device, seconds: float, measure_steps: int
) -> Planned:
    """A small U-Net and the largest patch with which the budget holds enough steps."""
    document, reasons = base(manifest, store, seconds, target)
    dims, limit = dims_of(manifest)[0], seconds * SHARE / ENOUGH
    batch, cases = CPU_BATCH[dims], len(manifest.fold(document["data"]["split"], 0)["train"])
    batch = max(2, min(batch, cases))
    patches = list(dict.fromkeys(network_plan(manifest, dims, memory)[0] for memory in SIZES))

    def timed(patch: tuple[int, int, int], enough: float) -> tuple[Recipe, Measured] | None:
        """None: too small a patch for the network."""
        try:
            recipe = parse(_cpu_document(document, manifest, patch, batch), "plan")
            return recipe, timing.measure(
                recipe, manifest, torch.device("cpu"), measure_steps, enough
            )
        except (InputError, ValueError):
            return None

    tried, skipped, guess = None, [], 0.0
    for patch in patches:  # the largest first
        if guess * math.prod(patch) > limit:
            skipped.append(patch)
            continue
        if (fitting := timed(patch, SURELY * limit)) is None:
            break
        tried, measured = fitting, fitting[1]
        fits = measured.gigabytes is None or measured.gigabytes < 0.8 * target.memory_gb
        if measured.seconds <= limit and fits:
            break
        # a step per voxel may well be faster, above all than one that was not repeated
        guess = measured.seconds / math.prod(patch) / (SURELY if measured.rough else 1.5)
    else:  # none is fast enough: the smallest
        small = (fitting for patch in reversed(skipped) if (fitting := timed(patch, math.inf)))
        tried = next(small, tried)
    if not tried:
        raise InputError(f"plan: no patch of {manifest.dataset.name} is large enough for a network")
    recipe, measured = tried
    if measured.rough:
        measured = timing.measure(recipe, manifest, torch.device("cpu"), measure_steps)
    precision, measured = _precision(recipe, manifest, measured, measure_steps)
    patch = patch_of(recipe, manifest)
    total = max(20, int(seconds * SHARE / measured.seconds))
    steps = max(10, min(60, total // 10))
    epochs = max(1, total // steps)
    features = recipe.model.options["features"]
    document["data"] |= {"patch": list(patch)[3 - dims :], "batch": batch} | shared(reasons)
    document["model"]["options"] = {"features": features, "deep_supervision": False}
    document["loss"] = {"name": "auto"}
    warmup = min(50, max(1, total // 20))
    document["optimizer"] = {"name": "adamw", "weight_decay": 0.01}
    document["stages"] = [
        {"name": "train", "epochs": epochs, "steps": steps, "lr": 1e-3, "schedule": "constant",
         "warmup": warmup}
    ]  # fmt: skip
    document["engine"] = {
        "precision": precision,
        "channels_last": "auto",
        "ema": 0.998 if total > 1000 else 0.99,
    }
    document["evaluation"] = {"overlap": 0.5, "mirror": []}
    many = " x ".join(map(str, patch))
    reasons |= {
        "data.patch": f"{many} voxels (z y x): the largest of the plan's patches with which "
        f"{ENOUGH} steps fit into the budget, or the smallest if none does.",
        "data.batch": f"{batch}, which keeps the cores busy.",
        "model.options.features": "Half of nnU-Net's features: a CPU trains four times as many "
        "steps.",
        "model.options.deep_supervision": "Small patches have no use for more outputs.",
        "optimizer.name": "AdamW learns in few steps.",
        "optimizer.weight_decay": "The usual one.",
        "stages.0.epochs": f"{epochs * steps} steps at {measured.seconds:.3g} s, measured here, "
        f"take {in_words(epochs * steps * measured.seconds)}: {SHARE:.0%} of the budget; the rest "
        "is for reading and scoring.",
        "stages.0.steps": "Steps of an epoch.",
        "stages.0.lr": "1e-3 suits AdamW and networks with instance normalisation.",
        "stages.0.schedule": "A constant rate: the averaged weights below do what a falling one "
        "would.",
        "stages.0.warmup": "Steps of linear warm-up.",
        "engine.precision": f"{precision} was the faster here."
        if precision != "fp32"
        else "bf16 was not faster here.",
        "engine.channels_last": "Where it is the faster one.",
        "engine.ema": "A running average of the weights is what is scored.",
        "evaluation.overlap": "Half a tile, as nnU-Net.",
        "evaluation.mirror": "No mirrored copies: each doubles the time of scoring.",
    }
    notes = notes_on(manifest, target, seconds) + low_first(document, reasons, manifest, patch)
    if measured.gigabytes is not None:
        notes.append(f"A step held {measured.gigabytes:.2g} GB here.")
    if measured.clock:
        notes.append(
            f"This machine was busy: a step took {measured.clock:.3g} s by the clock, of which "
            f"{measured.seconds:.3g} s were its own. The budget holds on cores that are free."
        )
    if total < ENOUGH:
        notes.append(
            f"The budget holds {total} steps only, and {ENOUGH} are usual: expect more of a "
            "longer one."
        )
    return Planned(document=document, reasons=reasons, notes=tuple(notes))


def _cpu_document(
    document: dict[str, Any], manifest: Manifest, patch: tuple[int, ...], batch: int
) -> dict[str, Any]:
    dims = 2 if patch[0] == 1 else 3
    spacing = [s or 1.0 for s in manifest.plan.target_spacing][3 - dims :]
    stages = len(topology_from_plan(patch[3 - dims :], spacing).strides)
    features = list(doubling_features(min(stages, CPU_STAGES[dims]), dims, first=16))
    return {
        **document,
        "data": {**document["data"], "patch": list(patch)[3 - dims :], "batch": batch},
        "model": {
            **document["model"],
            "options": {"features": features, "deep_supervision": False},
        },
        "stages": [{"epochs": 1, "lr": 1e-3}],
    }


def _precision(
    recipe: Recipe, manifest: Manifest, fp32: Measured, steps: int
) -> tuple[str, Measured]:
    """bf16 where the CPU is faster with it."""
    half = recipe.model_copy(
        update={"engine": recipe.engine.model_copy(update={"precision": "bf16"})}
    )
    # some CPUs compute bf16 many times slower
    faster = timing.measure(half, manifest, torch.device("cpu"), steps, SURELY * fp32.seconds)
    return ("bf16", faster) if faster.seconds < 0.9 * fp32.seconds else ("fp32", fp32)
