"""A recipe for a GPU: nnU-Net's set-up with the patch and the batch that the memory holds."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from segfleet.pipeline.planning import timing
from segfleet.pipeline.planning.choices import (
    SHARE,
    base,
    dims_of,
    low_first,
    network_plan,
    notes_on,
    shared,
)
from segfleet.pipeline.planning.planned import Planned
from segfleet.pipeline.planning.target import Device, in_words
from segfleet.pipeline.recipe import parse
from segfleet.preprocess.stores.manifest import Manifest

GPU_STEP = 0.35  # seconds of an nnU-Net step at 8 GB on a data centre's GPU, where none is here
# Voxels of a batch that nnU-Net plans for these 8 GB where the data set is large enough, and what a
# step takes at least, however small it is.
GPU_VOXELS = {2: 12 * 512**2, 3: 2 * 128**3}
GPU_LEAST = 0.05


def for_gpu(
    manifest: Manifest, store: Path, target: Device, seconds: float, measure_steps: int
) -> Planned:
    """nnU-Net's set-up with the patch and the batch that the memory holds."""
    document, reasons = base(manifest, store, seconds, target)
    dims = dims_of(manifest)[0]
    room = 0.8 * target.memory_gb  # the rest is the library's and the other process's
    patch, batch = network_plan(manifest, dims, room)
    residual = target.memory_gb >= 20
    document["model"]["name"] = f"{'resenc' if residual else 'plain'}_unet_{dims}d"
    document["data"] |= {"patch": list(patch)[3 - dims :], "batch": batch} | shared(reasons)
    document["loss"] = {"name": "auto"}
    document["optimizer"] = {
        "name": "sgd",
        "weight_decay": 3e-5,
        "momentum": 0.99,
        "nesterov": True,
    }
    document["engine"] = {"precision": "bf16", "channels_last": "auto"}
    mirror = [1, 2] if dims == 2 else [0, 1, 2]
    document["evaluation"] = {"overlap": 0.5, "mirror": mirror, "average": "logits"}
    document["stages"] = [
        {"name": "train", "epochs": 1, "steps": 250, "lr": 1e-2, "schedule": "poly", "power": 0.9}
    ]
    held = ""
    if target.here:
        while True:
            measured = timing.measure(
                parse(document, "plan"), manifest, torch.device("cuda"), measure_steps
            )
            # a GPU always says what it held
            if (measured.gigabytes or 0.0) <= room or document["data"]["batch"] <= 2:
                break
            document["data"]["batch"] -= 1
        batch = document["data"]["batch"]
        step, source = measured.seconds, f"{measured.seconds:.3g} s a step, measured here"
        held = f" A step held {measured.gigabytes:.3g} GB here."
    else:
        share = min(room / 8, math.prod(patch) * batch / GPU_VOXELS[dims])
        step = max(GPU_LEAST, GPU_STEP * share)
        source = (
            f"{step:.2g} s a step, assumed: {GPU_STEP} s for a batch of {GPU_VOXELS[dims]:,} "
            "voxels; no such GPU is here"
        )
    epochs = max(1, min(1000, int(seconds * SHARE / (step * 250))))
    document["stages"][0]["epochs"] = epochs
    reasons |= {
        "model.name": f"{dims_of(manifest)[1]} "
        + (
            "nnU-Net's residual encoder, its best, which needs the memory of this GPU."
            if residual
            else "nnU-Net's plain U-Net."
        ),
        "data.patch": f"{' x '.join(map(str, patch))} voxels (z y x): nnU-Net's planner for "
        f"{room:.3g} GB.",
        "data.batch": f"As many patches as that memory holds, at most a twentieth of the "
        f"data.{held}",
        "optimizer.name": "nnU-Net's: SGD with Nesterov's momentum.",
        "optimizer.weight_decay": "nnU-Net's.",
        "stages.0.epochs": f"{epochs * 250} steps, {source}: "
        f"{in_words(epochs * 250 * step)} of {in_words(seconds)}; never more than nnU-Net's 1000.",
        "stages.0.steps": "nnU-Net's 250 steps an epoch.",
        "stages.0.lr": "nnU-Net's, falling to 0 by the poly schedule.",
        "engine.precision": "bf16: the range of fp32 at half the memory.",
        "engine.channels_last": "Where it is the faster one.",
        "evaluation.overlap": "Half a tile, as nnU-Net.",
        "evaluation.mirror": "All mirrored copies, as nnU-Net; [] is faster.",
        "evaluation.average": "Tiles and copies are averaged before the softmax, as nnU-Net does.",
    }
    return Planned(
        document=document,
        reasons=reasons,
        notes=tuple(
            notes_on(manifest, target, seconds) + low_first(document, reasons, manifest, patch)
        ),
    )
