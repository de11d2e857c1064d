"""A complete recipe for a store, a device and a budget of time, with a sentence beside every
choice.

Spacing and patch are the preprocessing planner's (nnU-Net's rules, `preprocess/planning/plan.py`),
the network's stages those of `models/nnunet/topology.py`. What cannot be known from the data is
measured: a few steps on the device say how long a step takes and what it holds.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segfleet.core.errors import InputError
from segfleet.core.files import absolute
from segfleet.core.machine import cpus, memory_budget
from segfleet.models.nnunet.topology import doubling_features, topology_from_plan
from segfleet.pipeline.data.augment import flat
from segfleet.pipeline.engines.base import autocast
from segfleet.pipeline.parts import Objective, build_network, check_recipe, patch_of, task_of
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.preprocess.planning.plan import outputs, plan_network
from segfleet.preprocess.stores.manifest import Manifest, load_manifest

SHARE = 0.7  # of the budget for training steps; the rest reads, validates, scores and starts up
ENOUGH = 2500  # steps in which a small network learns a data set
SIZES = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)  # GB that patches for a CPU are planned with
CPU_BATCH = {2: 8, 3: 4}
CPU_STAGES = {2: 5, 3: 4}
GPU_STEP = 0.35  # seconds of an nnU-Net step at 8 GB on a data centre's GPU, where none is here
LOW = 0.25  # share of the median case that a patch should see, as for nnU-Net
LOW_GAIN = 2.0  # times fewer voxels that a low resolution must have to be worth it, as for nnU-Net
LOW_SHARE = 1 / 3  # of the epochs
SURELY = 4.0  # times longer than wanted: a first step that takes more is not repeated
BUSY = 1.6  # times its own computing that a step takes by the clock on cores that others use, too
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What is planned for. `here`: steps can be measured."""

    kind: str  # cpu | cuda
    memory_gb: float
    here: bool
    name: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One optimizer step. `clock`: seconds by the clock, where others kept the cores busy and
    `seconds` is what the step's own computing takes of them."""

    seconds: float
    gigabytes: float | None  # None: not measured
    clock: float | None = None
    rough: bool = False  # of the first step alone, which was far too slow


def parse_budget(text: str) -> float:
    """Seconds of `30min`, `2d`, `1.5h`, `90s`. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if not match or not float(match[1]):
        raise InputError(f"budget: found '{text}', expected a time such as 30min, 8h or 2d")
    return float(match[1]) * UNITS[match[2]]


def parse_device(text: str | None) -> Device:
    """`cpu`, `cuda`, or with the memory of one that is elsewhere `cuda:80G`; None: what is here.
    Raises InputError."""
    has_gpu = torch.cuda.is_available() and os.environ.get("SEGFLEET_DEVICE", "cuda") == "cuda"
    text = text or ("cuda" if has_gpu else "cpu")
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+(?:\.\d+)?)G)?", text)
    if not match:
        raise InputError(f"device: found '{text}', expected cpu, cuda or cuda:80G")
    kind, memory = match[1], float(match[2]) if match[2] else None
    if kind == "cpu":
        return Device(
            kind="cpu",
            memory_gb=memory or memory_budget() / 1e9,
            here=True,
            name=f"{cpus()} CPU core(s)",
        )
    if memory is None and not has_gpu:
        raise InputError("device: no GPU is here; say its memory, as cuda:80G, or plan for cpu")
    if memory is None:
        facts = torch.cuda.get_device_properties(0)
        return Device(kind="cuda", memory_gb=facts.total_memory / 1e9, here=True, name=facts.name)
    return Device(kind="cuda", memory_gb=memory, here=False, name=f"a GPU of {memory:g} GB")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A recipe as a document, and why: {key path: sentence}."""

    document: dict[str, Any]
    reasons: dict[str, str]
    notes: tuple[str, ...]  # what holds for the whole

    def recipe(self) -> Recipe:
        return parse(self.document, "plan")

    def yaml(self) -> str:
        """The recipe as YAML, each choice below its sentence."""
        head = [f"# {note}" for note in self.notes]
        return "\n".join([*head, *_lines(self.document, self.reasons, ""), ""])


def _lines(node: dict[str, Any], reasons: dict[str, str], path: str) -> Iterator[str]:
    indent = "  " * path.count(".")
    for key, value in node.items():
        own = f"{path}{key}"
        if own in reasons:
            yield f"{indent}# {reasons[own]}"
        if isinstance(value, dict) and any(name.startswith(f"{own}.") for name in reasons):
            yield f"{indent}{key}:"
            yield from _lines(value, reasons, f"{own}.")
        elif key == "stages":
            yield f"{indent}{key}:"
            for index, stage in enumerate(value):
                lines = list(_lines(stage, reasons, f"{own}.{index}."))
                bullet = next(
                    n for n, line in enumerate(lines) if not line.lstrip().startswith("#")
                )
                lines[bullet] = lines[bullet][:2] + "- " + lines[bullet][4:]
                yield from lines
        else:
            yield f"{indent}{key}: {json.dumps(value)}"


def plan_recipe(
    store: Path, device: str | None = None, budget: str | None = None, measure_steps: int = 3
) -> Planned:
    """A recipe for the store. `budget`: of one run, with its score; by default 30 min on CPUs and a
    day on a GPU. Raises InputError for what cannot be planned."""
    manifest, target = load_manifest(Path(store)), parse_device(device)
    seconds = parse_budget(budget or ("30min" if target.kind == "cpu" else "1d"))
    if not manifest.cases:
        raise InputError(f"plan: {store} holds no case")
    make = _for_cpu if target.kind == "cpu" else _for_gpu
    planned = make(manifest, absolute(store), target, seconds, measure_steps)
    check_recipe(planned.recipe(), manifest)
    return planned


def median_case(manifest: Manifest) -> tuple[int, int, int]:
    """Voxels (z, y, x) of the stored cases, the median per axis."""
    return tuple(
        int(statistics.median(sizes)) for sizes in zip(*manifest.cases.grids("shape"), strict=True)
    )


def _dims(manifest: Manifest) -> tuple[int, str]:
    plan, dataset = manifest.plan, manifest.dataset
    if dataset.dims == 2:
        return 2, "The images are 2D."
    if plan.patch[0] == 1:
        return 2, "The store was made for slices, so a 2D network."
    return 3, "The cases are volumes, whose neighbouring slices help: a 3D network."


def _base(manifest: Manifest, store: Path, seconds: float, target: Device) -> tuple[dict, dict]:
    dims, why = _dims(manifest)
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


def _notes(manifest: Manifest, target: Device, seconds: float) -> list[str]:
    median, plan = median_case(manifest), manifest.plan
    spacing = " x ".join(f"{s:g}" for s in plan.target_spacing)
    notes = [
        f"Planned by segfleet for {manifest.dataset.name}: {len(manifest.cases)} cases, median "
        f"{' x '.join(map(str, median))} voxels of {spacing} mm (z y x), labels "
        f"{', '.join(name for name, value in manifest.dataset.labels.items() if value)}.",
        f"Device: {target.name}. Budget: {in_words(seconds)} for one run.",
    ]
    return notes


def _low_first(
    document: dict[str, Any], reasons: dict[str, str], manifest: Manifest, patch: tuple[int, ...]
) -> list[str]:
    """Make the one stage two, the first at a low resolution, where a patch of a volume sees too
    little: the same patch over a larger field of view of the same store, so that folds stay as
    they are. Where nnU-Net would plan `3d_lowres`, and as coarse; its cascade also shows the second
    network what the first one said, here the second stage goes on with the first one's weights.
    The note on it."""
    seen = math.prod(patch) / max(1, math.prod(median_case(manifest)))
    stage = document["stages"][0]
    if patch[0] == 1 or LOW / seen < LOW_GAIN or stage["epochs"] < 3:
        return []
    spacing = tuple(step or 1.0 for step in manifest.plan.target_spacing)
    factor = (LOW / seen) ** (1 / 2 if flat(patch, spacing) else 1 / 3)
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
        f"A patch sees {seen:.1%} of the median case, so a stage at a low resolution comes first. "
        "Whether it helps on these data is for `segfleet compare` to say: without it, give its "
        "epochs to the other stage."
    ]


def in_words(seconds: float) -> str:
    for unit in ("d", "h", "min"):
        if seconds >= UNITS[unit]:
            return f"{seconds / UNITS[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def _shared(reasons: dict[str, str]) -> dict[str, Any]:
    reasons["data.foreground"] = "A third of a batch is centred on foreground, as nnU-Net does."
    reasons["data.augment"] = (
        "The default augmentation, mirrored along all axes. Where left and right (or front and "
        "back) are different labels, name the axes that may be mirrored: augment: {flip: [0]}."
    )
    reasons["data.workers"] = "What the cores allow; it changes no result."
    reasons["loss.name"] = "Cross entropy with Dice, by the head: softmax or one sigmoid a region."
    return {"foreground": 1 / 3, "augment": {}, "workers": "auto"}


# CPUs


def _for_cpu(
    manifest: Manifest, store: Path, target: Device, seconds: float, measure_steps: int
) -> Planned:
    """A small U-Net and the largest patch with which the budget holds enough steps."""
    document, reasons = _base(manifest, store, seconds, target)
    dims, limit = _dims(manifest)[0], seconds * SHARE / ENOUGH
    batch, cases = CPU_BATCH[dims], len(manifest.fold(document["data"]["split"], 0)["train"])
    batch = max(2, min(batch, cases))
    patches = list(dict.fromkeys(_network_plan(manifest, dims, memory)[0] for memory in SIZES))

    def timed(patch: tuple[int, int, int], enough: float) -> tuple[Recipe, Measured] | None:
        """None: too small a patch for the network."""
        try:
            recipe = parse(_cpu_document(document, manifest, patch, batch), "plan")
            return recipe, measure(recipe, manifest, torch.device("cpu"), measure_steps, enough)
        except (InputError, ValueError):
            return None

    tried, skipped, guess = None, [], 0.0
    for patch in patches:  # the largest first
        if guess * math.prod(patch) > limit:
            skipped.append(patch)
            continue
        if (found := timed(patch, SURELY * limit)) is None:
            break
        tried, measured = found, found[1]
        fits = measured.gigabytes is None or measured.gigabytes < 0.8 * target.memory_gb
        if measured.seconds <= limit and fits:
            break
        # a step per voxel may well be faster, above all than one that was not repeated
        guess = measured.seconds / math.prod(patch) / (SURELY if measured.rough else 1.5)
    else:  # none is fast enough: the smallest
        small = (found for patch in reversed(skipped) if (found := timed(patch, math.inf)))
        tried = next(small, tried)
    if not tried:
        raise InputError(f"plan: no patch of {manifest.dataset.name} is large enough for a network")
    recipe, measured = tried
    if measured.rough:
        measured = measure(recipe, manifest, torch.device("cpu"), measure_steps)
    precision, measured = _precision(recipe, manifest, measured, measure_steps)
    patch = patch_of(recipe, manifest)
    total = max(20, int(seconds * SHARE / measured.seconds))
    steps = max(10, min(60, total // 10))
    epochs = max(1, total // steps)
    features = recipe.model.options["features"]
    document["data"] |= {"patch": list(patch)[3 - dims :], "batch": batch} | _shared(reasons)
    document["model"]["options"] = {"features": features, "deep_supervision": False}
    document["loss"] = {"name": "auto"}
    warmup = min(50, max(1, total // 20))
    document["optimizer"] = {"name": "adamw", "weight_decay": 0.01}
    document["stages"] = [
        {"name": "train", "epochs": epochs, "steps": steps, "lr": 1e-3, "schedule": "constant", "warmup": warmup}
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
        "model.options.features": "Half of nnU-Net's features: a CPU trains four times as many steps.",
        "model.options.deep_supervision": "Small patches have no use for more outputs.",
        "optimizer.name": "AdamW learns in few steps.",
        "optimizer.weight_decay": "The usual one.",
        "stages.0.epochs": f"{epochs * steps} steps at {measured.seconds:.3g} s, measured here, take "
        f"{in_words(epochs * steps * measured.seconds)}: {SHARE:.0%} of the budget; the rest is for reading and scoring.",
        "stages.0.steps": "Steps of an epoch.",
        "stages.0.lr": "1e-3 suits AdamW and networks with instance normalisation.",
        "stages.0.schedule": "A constant rate: the averaged weights below do what a falling one would.",
        "stages.0.warmup": "Steps of linear warm-up.",
        "engine.precision": f"{precision} was the faster here."
        if precision != "fp32"
        else "bf16 was not faster here.",
        "engine.channels_last": "Where it is the faster one.",
        "engine.ema": "A running average of the weights is what is scored.",
        "evaluation.overlap": "Half a tile, as nnU-Net.",
        "evaluation.mirror": "No mirrored copies: each doubles the time of scoring.",
    }
    notes = _notes(manifest, target, seconds) + _low_first(document, reasons, manifest, patch)
    if measured.gigabytes is not None:
        notes.append(f"A step held {measured.gigabytes:.2g} GB here.")
    if measured.clock:
        notes.append(
            f"This machine was busy: a step took {measured.clock:.3g} s by the clock, of which "
            f"{measured.seconds:.3g} s were its own. The budget holds on cores that are free."
        )
    if total < ENOUGH:
        notes.append(
            f"The budget holds {total} steps only, and {ENOUGH} are usual: expect more of a longer one."
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
    found = measure(half, manifest, torch.device("cpu"), steps, SURELY * fp32.seconds)
    return ("bf16", found) if found.seconds < 0.9 * fp32.seconds else ("fp32", fp32)


# GPUs


def _for_gpu(
    manifest: Manifest, store: Path, target: Device, seconds: float, measure_steps: int
) -> Planned:
    """nnU-Net's set-up with the patch and the batch that the memory holds."""
    document, reasons = _base(manifest, store, seconds, target)
    dims = _dims(manifest)[0]
    room = 0.8 * target.memory_gb  # the rest is the library's and the other process's
    patch, batch = _network_plan(manifest, dims, room)
    residual = target.memory_gb >= 20
    document["model"]["name"] = f"{'resenc' if residual else 'plain'}_unet_{dims}d"
    document["data"] |= {"patch": list(patch)[3 - dims :], "batch": batch} | _shared(reasons)
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
            measured = measure(
                parse(document, "plan"), manifest, torch.device("cuda"), measure_steps
            )
            if measured.gigabytes <= room or document["data"]["batch"] <= 2:
                break
            document["data"]["batch"] -= 1
        batch = document["data"]["batch"]
        step, how = measured.seconds, f"{measured.seconds:.3g} s a step, measured here"
        held = f" A step held {measured.gigabytes:.3g} GB here."
    else:
        step = GPU_STEP * room / 8
        how = f"{step:.2g} s a step, assumed: {GPU_STEP} s at 8 GB; no such GPU is here"
    epochs = max(1, min(1000, int(seconds * SHARE / (step * 250))))
    document["stages"][0]["epochs"] = epochs
    reasons |= {
        "model.name": f"{_dims(manifest)[1]} "
        + (
            "nnU-Net's residual encoder, its best, which needs the memory of this GPU."
            if residual
            else "nnU-Net's plain U-Net."
        ),
        "data.patch": f"{' x '.join(map(str, patch))} voxels (z y x): nnU-Net's planner for "
        f"{room:.3g} GB.",
        "data.batch": f"As many patches as that memory holds, at most a twentieth of the data.{held}",
        "optimizer.name": "nnU-Net's: SGD with Nesterov's momentum.",
        "optimizer.weight_decay": "nnU-Net's.",
        "stages.0.epochs": f"{epochs * 250} steps, {how}: "
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
            _notes(manifest, target, seconds) + _low_first(document, reasons, manifest, patch)
        ),
    )


def _network_plan(
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
        patch=(1, *plan.size[1:]) if plan.size and memory_gb >= SIZES[0] else None,
    )


def measure(
    recipe: Recipe,
    manifest: Manifest,
    device: torch.device,
    steps: int,
    enough: float = math.inf,
) -> Measured:
    """The fastest of a few optimizer steps on random patches, after one to warm up, unless that
    took more than `enough` seconds of computing: then it alone, so that planning for a small budget
    does not take longer than the budget; and the memory they held (of CPUs the growth of this
    process, or None if it did not grow). On CPUs that others use, too, its computing time over the
    threads: a plan outlives the hour in which it is made."""
    import psutil

    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    task = task_of(recipe, manifest)
    network = build_network(recipe, manifest, task).to(device).train()
    objective = Objective(recipe, task)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    patch = patch_of(recipe, manifest)
    size = (recipe.data.batch, *(patch[1:] if patch[0] == 1 else patch))
    generator = torch.Generator().manual_seed(0)
    channels = len(manifest.dataset.channels)
    image = torch.randn(size[0], channels, *size[1:], generator=generator).to(device)
    values = torch.tensor(sorted(manifest.dataset.labels.values()), dtype=torch.uint8)
    label = values[torch.randint(len(values), size, generator=generator)].to(device)
    times, shares, held = [], [], 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps + 1):
        begin, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        with autocast(recipe.engine.precision, device):
            output = network(image)
        loss = objective(output, label)
        held = max(held, process.memory_info().rss - before)  # all that backward needs
        loss.backward()
        optimizer.step()
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - begin)
        shares.append((time.process_time() - used) / torch.get_num_threads())
        if shares[0] > enough:
            break
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    rough = len(times) < steps + 1
    seconds, own, gigabytes = min(times[1:] or times), min(shares[1:] or shares), held / 1e9 or None
    if device.type == "cpu" and seconds > BUSY * own:
        return Measured(seconds=own, gigabytes=gigabytes, clock=seconds, rough=rough)
    return Measured(seconds=seconds, gigabytes=gigabytes, rough=rough)
