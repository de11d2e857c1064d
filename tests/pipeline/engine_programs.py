"""What the ranks of the engine tests do. Each program runs in real processes, started by
`rank_runner.run_in_ranks`.

Starting DeepSpeed costs seconds, so a program does all it can in one start and hands back plain
facts; the tests judge them.
"""

from __future__ import annotations

import importlib.util
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from segfleet.models.checkpointing import activation_checkpointing
from segfleet.models.registry import build_model
from segfleet.pipeline import checkpoint, run
from segfleet.pipeline.engines import pieces
from segfleet.pipeline.engines.base import Engine, Setup, build_engine
from segfleet.pipeline.engines.common import Average, load_weights
from segfleet.pipeline.events import read_events
from segfleet.pipeline.parts import Objective, make_task
from segfleet.pipeline.ranks import ENVIRONMENT, Ranks
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.pipeline.stop import Interrupted
from segfleet.pipeline.training import agreement
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.train import train
from segfleet.preprocess.stores.base import open_store

if importlib.util.find_spec("deepspeed"):
    from segfleet.pipeline.engines import deepspeed as zero
    from segfleet.pipeline.engines.deepspeed import quiet_deepspeed

    quiet_deepspeed(torch.device("cpu"))  # seconds, which the ranks need not spend again
KINDS = {"ddp": {"name": "ddp"}} | {
    f"zero{stage}": {"name": "deepspeed", "options": {"zero": stage}} for stage in range(4)
}
RESENC = {"name": "resenc_unet_3d", "options": {"features": [4, 8, 8], "blocks_per_stage": 1}}
LITE = {"name": "unet_lite_standard", "options": {"width": 4}}  # 2D, with batch normalisation
BATCH, LR = 4, 0.01
AT_ONCE = 2**10  # elements that ZeRO gathers at once where memory is measured


def recipe_of(
    kind: str,
    model: dict = RESENC,
    stage: dict | None = None,
    optimizer: dict | None = None,
    **engine: Any,
) -> Recipe:
    options = KINDS[kind] | {"channels_last": False} | engine
    if "options" in engine and kind != "ddp":
        options["options"] = KINDS[kind]["options"] | engine["options"]
    elif kind == "ddp":
        options["options"] = {}
    return parse(
        {
            "name": kind,
            "model": model,
            "data": {"patch": [8, 8, 8], "batch": BATCH},
            "optimizer": {"clip": 0} | (optimizer or {}),
            "stages": [{"epochs": 1, "lr": LR} | (stage or {})],
            "engine": options,
        }
    )


def make_engine(ranks: Ranks, store: str, recipe: Recipe) -> Engine:
    if recipe.engine.name == "deepspeed":
        from segfleet.pipeline.engines import deepspeed

        deepspeed.PERSISTENT = 0  # these networks are so small that ZeRO 3 would leave them whole
    flat = recipe.model.name == LITE["name"]
    task = make_task(open_store(store).manifest.dataset, recipe.model.head)
    torch.manual_seed(recipe.seed)
    model = build_model(
        recipe.model.name, in_channels=1, num_classes=task.channels, options=recipe.model.options
    )
    if recipe.engine.channels_last:
        model = model.to(memory_format=torch.channels_last if flat else torch.channels_last_3d)
    if recipe.engine.checkpoint_activations:
        model = activation_checkpointing(model)
    return build_engine(
        Setup(
            model=model,
            loss=Objective(recipe, task),
            recipe=recipe,
            stage=recipe.stages[0],
            ranks=ranks,
        )
    )


def micro_batches(ranks: Ranks, step: int, recipe: Recipe, poison: int | None = None):
    """This rank's share of the global batch of a step. `poison`: the sample with an infinite
    voxel."""
    parts = recipe.engine.accumulate
    generator = torch.Generator().manual_seed(step)
    shape = (BATCH, 1, 32, 32) if recipe.model.name == LITE["name"] else (BATCH, 1, 8, 8, 8)
    image = torch.randn(shape, generator=generator)
    label = (image.flip(-1).roll(3, -2)[:, 0] > 0.8).to(torch.uint8)
    image += label[:, None]
    if poison is not None:
        image[poison].flatten()[7] = float("inf")
    share = BATCH // parts // ranks.size
    for part in range(parts):
        first = (part * ranks.size + ranks.rank) * share
        yield image[first : first + share], label[first : first + share]


def run_steps(
    ranks: Ranks, engine: Engine, recipe: Recipe, steps: range, lr: float = LR, **options: Any
) -> list[list[float]]:
    """[mean loss over the ranks, norm] of every step."""
    told = []
    for step in steps:
        loss, norm = engine.step(micro_batches(ranks, step, recipe, **options), lr)
        told.append([float(ranks.sum(loss.clone()) / ranks.size), float(norm)])
    return told


def tensors_of(ranks: Ranks, engine: Engine) -> checkpoint.Tensors:
    """Copies of what a checkpoint would hold, on every rank: its own, or where it has none, those
    of rank 0, but for its own buffers: nothing here makes batch normalisation see all ranks."""
    own = checkpoint.copies(engine.tensors())
    if ranks.size == 1:
        return own
    first = [own]
    dist.broadcast_object_list(first)
    found = first[0] | {group: named for group, named in own.items() if named}
    if not own["weights"]:
        found["weights"] |= {name: b.detach().clone() for name, b in engine.model.named_buffers()}
    return found


def save(ranks: Ranks, engine: Engine, root: Path, step: int) -> None:
    tensors = engine.tensors()
    if ranks.rank == 0:
        checkpoint.save(root, step, checkpoint.copies(tensors), {})
    ranks.barrier()


def saved(root: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(root / checkpoint.folder_name(step))


def difference(found: checkpoint.Tensors, wanted: checkpoint.Tensors) -> str:
    """Empty if the same groups hold the same names with the same bits; else the worst."""
    worst = ""
    for group in sorted(found.keys() | wanted.keys()):
        here, there = found.get(group, {}), wanted.get(group, {})
        if names := sorted(here.keys() ^ there.keys()):
            return f"{group}: {len(names)} names differ: {names[:3]}"
        for name, value in here.items():
            if value.shape != there[name].shape or value.dtype != there[name].dtype:
                return (
                    f"{group}: {name} {tuple(value.shape)} {value.dtype}, expected "
                    f"{tuple(there[name].shape)} {there[name].dtype}"
                )
            if not torch.equal(value.cpu(), there[name]):
                worst = (
                    worst
                    or f"{group}: {name} differs by "
                    f"{float((value.cpu() - there[name]).abs().max()):.2e}"
                )
    return worst


def groups_of(found: checkpoint.Checkpoint) -> checkpoint.Tensors:
    return {
        group: named
        for group in ("weights", "optimizer", "ema", "average")
        if (named := found.tensors(group))
    }


# --------------------------------------------------------------------------------------------------
# programs


def train_all(ranks: Ranks, store: str, root: str) -> dict[str, Any]:
    """Every kind: 20 steps without a stop, checkpoints after 10 and 20. -> kind -> [loss, norm] of
    every step."""
    told = {}
    for kind in KINDS:
        recipe = recipe_of(kind, ema=0.9)
        engine = make_engine(ranks, store, recipe)
        first = run_steps(ranks, engine, recipe, range(10))
        save(ranks, engine, Path(root, kind), 10)
        told[kind] = first + run_steps(ranks, engine, recipe, range(10, 20))
        save(ranks, engine, Path(root, kind), 20)
    return told


def go_on(
    ranks: Ranks, store: str, root: str, kinds: list[str], writers: list[str]
) -> dict[str, Any]:
    """New processes. Every kind reads step 10 of every writer; those of its own, of ddp's and those
    ddp reads are continued."""
    if ranks.size == 1:  # as in a process that no launcher started
        for name in ENVIRONMENT:
            del os.environ[name]
    resumed, read, losses = {}, {}, {}
    for kind in kinds:
        for writer in writers:
            recipe = recipe_of(kind, ema=0.9)
            engine = make_engine(ranks, store, recipe)
            engine.load(saved(Path(root, writer), 10))
            read[f"{writer} read by {kind}"] = difference(
                tensors_of(ranks, engine), groups_of(saved(Path(root, writer), 10))
            )
            if writer == kind and ranks.size == 2:
                losses[f"{writer} {kind}"] = run_steps(ranks, engine, recipe, range(10, 20))
                resumed[kind] = difference(
                    tensors_of(ranks, engine), groups_of(saved(Path(root, kind), 20))
                )
            elif BATCH % ranks.size == 0:
                losses[f"{writer} {kind}"] = run_steps(ranks, engine, recipe, range(10, 11))
    return {"resumed": resumed, "read": read, "losses": losses, "size": ranks.size}


def all_sorts(ranks: Ranks, store: str, flat_store: str, root: str) -> dict[str, Any]:
    """The three programs below in one start."""
    return {
        "variants": {
            f"{variant} {kind}": vary(ranks, store, kind, changes)
            for variant, changes in VARIANTS.items()
            for kind in KINDS
        },
        "careful": {kind: be_careful(ranks, store, kind) for kind in KINDS},
        "loop": change_engines(ranks, flat_store, Path(root)),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {"optimizer": {"clip": 0.1}},
    "accumulated": {"accumulate": 2},
    "sgd": {"optimizer": {"name": "sgd"}},
    "frozen": {"stage": {"freeze": ["encoder"]}},
    "batch-norm": {"model": LITE},
    "bf16": {"precision": "bf16"},
    "channels-last": {"channels_last": True},
    "offloaded": {"options": {"offload": "cpu"}, "optimizer": {"clip": 0.1}},
    "recomputed": {"checkpoint_activations": True},
}


def vary(ranks: Ranks, store: str, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """3 steps of a recipe with something changed, and what a checkpoint would hold."""
    if kind == "zero0" and "options" in changes:
        kind = "ddp"  # ZeRO 0 has nothing to offload
    recipe = recipe_of(kind, **changes)
    engine = make_engine(ranks, store, recipe)
    start = tensors_of(ranks, engine)["weights"]
    steps = run_steps(ranks, engine, recipe, range(3))
    tensors = tensors_of(ranks, engine)
    return {
        "steps": steps,
        "moments": sorted(tensors["optimizer"]),
        "moved": sorted(
            name
            for name, value in tensors["weights"].items()
            if not torch.equal(value, start[name])
        ),
        "running": {
            name: value
            for name, value in tensors["weights"].items()
            if "running" in name or "batches" in name
        },
    }


def be_careful(ranks: Ranks, store: str, kind: str) -> dict[str, Any]:
    """Steps that must change nothing, evaluation, learning rate, parameters that thaw."""
    facts: dict[str, Any] = {}
    recipe = recipe_of(kind, ema=0.5, accumulate=2)
    engine = make_engine(ranks, store, recipe)
    run_steps(ranks, engine, recipe, range(2))
    before = tensors_of(ranks, engine)
    # an infinite voxel in the first micro-batch of rank 0, then in the last one of rank 1
    facts["norms"] = [
        run_steps(ranks, engine, recipe, range(2, 3), poison=sample)[0][1] for sample in (0, 3)
    ]
    facts["skipped"] = difference(tensors_of(ranks, engine), before)
    image, _ = next(micro_batches(ranks, 9, recipe))
    with torch.no_grad(), engine.evaluation() as model:
        facts["in eval mode"] = not any(module.training for module in model.modules())
        facts["evaluated"] = difference(
            {"ema": dict(model.named_parameters())}, {"ema": before["ema"]}
        )
        if ranks.rank == 0:  # tiles are shared unevenly: a rank must be able to work alone
            facts["output"] = model(image)
    facts["restored"] = difference(tensors_of(ranks, engine), before)
    again = run_steps(ranks, engine, recipe, range(2, 4))
    undisturbed = make_engine(ranks, store, recipe)
    straight = run_steps(ranks, undisturbed, recipe, range(4))
    facts["same losses after"] = straight[2:] == again
    facts["after"] = difference(tensors_of(ranks, engine), tensors_of(ranks, undisturbed))
    settled = tensors_of(ranks, engine)["weights"]
    run_steps(ranks, engine, recipe, range(5, 6), lr=0.0)
    facts["lr 0"] = difference(
        {"weights": tensors_of(ranks, engine)["weights"]}, {"weights": settled}
    )
    facts["thawed"], facts["counters"] = thaw(ranks, store, kind)
    facts["after a bad first step"] = bad_first_step(ranks, store, kind)
    return facts


def bad_first_step(ranks: Ranks, store: str, kind: str) -> str:
    """SGD with momentum whose first step is not finite, two more after it; against an engine that
    took only these two."""
    recipe = recipe_of(kind, optimizer={"name": "sgd"})
    engine, undisturbed = make_engine(ranks, store, recipe), make_engine(ranks, store, recipe)
    run_steps(ranks, engine, recipe, range(1), poison=0)
    run_steps(ranks, engine, recipe, range(1, 3))
    run_steps(ranks, undisturbed, recipe, range(1, 3))
    return difference(tensors_of(ranks, engine), tensors_of(ranks, undisturbed))


def thaw(ranks: Ranks, store: str, kind: str) -> tuple[list[list[float]], dict[str, float]]:
    """Stage 2 trains what stage 1 froze and inherits the moments of the rest: counters differ
    within one network."""
    recipe = recipe_of(kind, stage={"freeze": ["encoder", "heads"]})
    engine = make_engine(ranks, store, recipe)
    run_steps(ranks, engine, recipe, range(3))
    tensors = tensors_of(ranks, engine)
    recipe = recipe_of(kind)
    engine = make_engine(ranks, store, recipe)
    load_weights(engine.model, tensors["weights"], "memory")
    engine.inherit(tensors["optimizer"])
    told = run_steps(ranks, engine, recipe, range(3, 6))
    return told, {
        name: float(value)
        for name, value in tensors_of(ranks, engine)["optimizer"].items()
        if name.endswith(".step")
    }


def finetune(ranks: Ranks, store: str, kind: str) -> list[Any]:
    """[losses and norms of three steps, worst difference from ddp] with rates by layer and part, a
    frozen part and anchors."""
    found = []
    for one in (kind, "ddp"):
        recipe = recipe_of(one)
        model = make_engine(ranks, store, recipe).model
        stage = recipe.stages[0].model_copy(
            update={"layer_decay": 0.5, "rates": {"head": 2.0}, "freeze": ("stem",), "anchor": 5.0}
        )
        anchors = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
        loss = Objective(recipe, make_task(open_store(store).manifest.dataset))
        engine = build_engine(
            Setup(model=model, loss=loss, recipe=recipe, stage=stage, ranks=ranks, anchors=anchors)
        )
        told = run_steps(ranks, engine, recipe, range(3))
        found.append((told, tensors_of(ranks, engine)["weights"]))
    (told, mine), (plain, theirs) = found
    worst = max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)
    return [told, plain, worst]


def finetune_all(ranks: Ranks, store: str) -> dict[str, list[Any]]:
    return {kind: finetune(ranks, store, kind) for kind in ("zero0", "zero1", "zero2")}


def change_engines(ranks: Ranks, store: str, root: Path) -> dict[str, Any]:
    """The real loop over two stages: once straight through with ddp, once stopped in each stage and
    continued with another engine."""
    document = {
        "name": "test",
        "data": {"store": store, "batch": 2},
        "model": LITE,
        "stages": [
            {"epochs": 2, "steps": 3, "lr": 1e-2},
            {
                "epochs": 2,
                "steps": 2,
                "lr": 1e-3,
                "schedule": "poly",
                "inherit": "weights+optimizer",
            },
        ],
        "save_every": 1,
    }

    def go(folder: str, kind: str, stop_after: int = 10**9) -> list[run.StageFolder]:
        recipe, opened = parse(document | {"engine": KINDS[kind]}), open_store(store)
        folders, asked = (
            run.stage_folders(root / folder, recipe, opened.manifest),
            iter(range(10**9)),
        )
        with suppress(Interrupted):
            train(
                Context(
                    recipe=recipe,
                    stores=lambda settings: opened,
                    folders=folders,
                    ranks=ranks,
                    asked_to_stop=lambda: next(asked) >= stop_after - 2,
                    warn=lambda message: None,
                    validate=lambda engine, settings: {},
                )
            )
        return folders

    agreement.SECONDS = 0.0  # asked in every step, answered in the next
    go("changed", "ddp", 2)
    go("changed", "zero3", 3)
    go("changed", "zero1", 3)
    folders = {"changed": go("changed", "zero2"), "straight": go("straight", "ddp")}
    steps = {
        name: [
            event
            for folder in both
            for event in read_events(folder.path)
            if event["event"] == "step"
        ]
        for name, both in folders.items()
    }
    ends = {name: groups_of(both[-1].final()) for name, both in folders.items()}
    return {
        "ends": ends,
        "lr": {name: [event["lr"] for event in told] for name, told in steps.items()},
    }


# --------------------------------------------------------------------------------------------------
# memory of ZeRO 3


class Made(TorchDispatchMode):
    """Bytes of the tensors that are made inside and are still there: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def note(self, things: Any, made: bool) -> None:
        for value in tree_leaves(things):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                there = self.known.get(storage._cdata)
                if there is None or there[0].expired():
                    size = storage.nbytes() if made else 0
                    self.known[storage._cdata] = (StorageWeakRef(storage), size)

    def now(self) -> int:
        return sum(size for reference, size in self.known.values() if not reference.expired())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note((args, kwargs), made=False)
        out = function(*args, **(kwargs or {}))
        self.note(out, made=True)
        if self.now() > self.peak:
            time.sleep(0.02)  # gloo's thread lets go of what it sent a moment later
            self.peak = max(self.peak, self.now())
        return out


@contextmanager
def hosts_left_out():
    """What ZeRO's pieces become in host memory is not counted: here the device is the host, too."""

    def on_host(count, piece):
        return torch.from_numpy(np.empty((count, piece.numel()), np.float32))

    def joined(*arguments):
        with _disable_current_modes():
            return pieces.join(*arguments)

    with mock.patch.object(pieces, "on_host", on_host), mock.patch.object(zero, "join", joined):
        yield


def memory(ranks: Ranks, store: str) -> dict[str, Any]:
    """ZeRO 3 of a network and of one with the same tensors, many times."""
    return {blocks: memory_of(ranks, store, blocks) for blocks in (1, 5)}


def gathered_at_once(engine: Engine) -> checkpoint.Tensors:
    """Weights and moments, all of them whole on every rank, as DeepSpeed gathers them."""
    with engine.library.zero.GatheredParameters(list(engine.model.parameters())):
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    moments = {}
    for names, flat in engine._flats():
        for key, value in engine.optimizer.state[flat].items():
            every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            if value.ndim:
                dist.all_gather(every, value)
                found = pieces.join(torch.stack(every), [engine.shapes[n] for n in names], 3)
            else:
                found = [value] * len(names)
            moments |= {f"{n}.{key}": one for n, one in zip(names, found, strict=True)}
    groups = {"weights": weights, "optimizer": moments}
    return groups | {k: v for k, v in tensors_of(engine.ranks, engine).items() if k not in groups}


def memory_of(ranks: Ranks, store: str, blocks: int) -> dict[str, Any]:
    pieces.AT_ONCE = AT_ONCE
    model = {"name": RESENC["name"], "options": RESENC["options"] | {"blocks_per_stage": blocks}}
    recipe = recipe_of("zero3", model, ema=0.9)
    engine = make_engine(ranks, store, recipe)
    sizes = [p.numel() * p.element_size() for p in engine.model.parameters()]
    start = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    expected = Average(engine.model, 0.9, start)
    for step in range(3):
        _, norm = engine.step(micro_batches(ranks, step, recipe), LR)
        whole = tensors_of(ranks, engine)
        for name, value in expected.weights.items():
            value.copy_(whole["weights"][name])
        expected.update(norm)
    facts: dict[str, Any] = {
        "at once": 4 * AT_ONCE,
        "whole": sum(sizes),
        "largest": max(sizes),
        "averaged": sum(value.nbytes for value in engine.average.values.values()),
        "ema": difference({"ema": whole["ema"]}, {"ema": expected.values}),
        "gathered": difference(gathered_at_once(engine), whole),
        "blank": all(p.is_meta for p in engine.twin.network.parameters()),
    }
    with hosts_left_out(), Made() as made:
        engine.tensors()
    facts["saving"] = made.peak
    with Made() as made:
        engine.average.update(norm)
    facts["averaging"] = made.peak
    with Made() as made:
        with engine.evaluation() as network:
            facts["evaluated"] = sum(p.nbytes for p in network.parameters())
        del network
    facts["evaluation"], facts["kept"] = made.peak, made.now()
    return facts
