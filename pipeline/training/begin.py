"""How a stage begins: its network with the right weights in it, the engine around it, its log."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from segfleet.models import registry
from segfleet.pipeline import checkpoint
from segfleet.pipeline.devices import compiler, numerics
from segfleet.pipeline.engines.base import Engine, Setup, build_engine
from segfleet.pipeline.engines.lora import adapt
from segfleet.pipeline.events import EventLog
from segfleet.pipeline.parts import Objective, build_network, in_layout, task_of, transfer_of
from segfleet.pipeline.recipe import resolve
from segfleet.pipeline.reports.trackers import open_trackers
from segfleet.pipeline.stage_data import stage_steps
from segfleet.pipeline.training import precision as bf16
from segfleet.pipeline.training import sync_norm
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.hardware import hardware
from segfleet.pipeline.training.transfer import load, write_transfer
from segfleet.pipeline.training.weights import load_foreign


def build(context: Context, index: int) -> tuple[Engine, checkpoint.Checkpoint | None]:
    """The engine of a stage with the right weights in it, the stage's own checkpoint's, its
    parent's, or fresh ones; and the stage's own checkpoint, if there is one."""
    recipe, ranks = resolve(context.recipe, index), context.ranks
    manifest = context.manifests(recipe)
    stage, folder = recipe.stages[index], context.folders[index]
    task = task_of(recipe, manifest)
    model = build_network(recipe, manifest, task)
    if index == 0 and recipe.model.weights:
        load_foreign(model, recipe.model)
    newest = ranks.share(
        str(saved.path)
        if ranks.rank == 0 and (saved := checkpoint.latest(folder.checkpoints, context.warn))
        else None
    )
    saved = checkpoint.read(Path(newest)) if newest else None
    taken, moments = set(model.state_dict()) if index == 0 else set(), {}
    # what is anchored or adapted must know where it began, also in the middle of its stage
    if index and (stage.anchor or stage.lora or not saved):
        taken, moments = inherited(context, index, model, first=not saved)
    if stage.unfreeze_at and saved:
        steps = stage_steps(context.recipe, context.manifests)[index]
        if saved.step >= stage.unfreeze_at * steps:
            stage = stage.model_copy(update={"freeze": ()})
    anchors = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if stage.anchor and name in taken
    }
    if stage.lora:
        adapt(model, stage, registry.spec(recipe.model.name), recipe.seed)
    numerics.arrange(recipe.engine, ranks.device)
    model = model.to(ranks.device)
    compiles = compiler.wanted(recipe.engine, ranks.device)
    if recipe.engine.name == "ddp" and not compiles:
        compiler.load_later()
    else:
        compiler.load_now()
    sync_norm.synchronise(model, ranks, compiles)
    model = in_layout(model, recipe, manifest)
    if recipe.engine.checkpoint_activations:
        from segfleet.models.checkpointing import activation_checkpointing

        activation_checkpointing(model)
    bf16.guard(model, recipe.engine.precision, ranks.device)
    objective = Objective(recipe, task).to(ranks.device)
    engine = build_engine(
        Setup(model=model, loss=objective, recipe=recipe, stage=stage, ranks=ranks, anchors=anchors)
    )
    if saved:
        engine.load(saved)
        return engine, saved
    if moments:
        engine.inherit(moments)
    return engine, None


def inherited(
    context: Context, index: int, model: nn.Module, first: bool
) -> tuple[set[str], dict[str, Tensor]]:
    """Put into a fresh network what its stage takes over from the one before, and `first` note it
    in the stage's folder: the names of that, and the optimizer's moments, if they are to come
    along. Raises InputError or CheckpointError, and then has changed nothing."""
    inherit, before = context.recipe.stages[index].inherit, context.folders[index - 1].final()
    transfer = transfer_of(
        context.recipe, context.manifests, index, model, before.tensors("weights")
    )
    load(model, transfer)
    if first and context.ranks.rank == 0:
        write_transfer(context.folders[index].path, transfer)
        if transfer.document()["changed"] or transfer.new or transfer.left:
            context.warn(transfer.sentence(index))
    moments = before.tensors("optimizer") if inherit.optimizer else {}
    return set(transfer.tensors), {
        name: value for name, value in moments.items() if name.rpartition(".")[0] in transfer.taken
    }


def begin_log(context: Context, index: int, step: int, total: int) -> EventLog:
    """The stage's log, opened at a step, with what begins there."""
    recipe, folder = context.recipe, context.folders[index].path
    trackers = open_trackers(recipe.trackers, folder, recipe.name, context.warn, step)
    log = EventLog(folder, step, context.listen, trackers)
    begin = {"stage": index, "steps": total, "ranks": context.ranks.size, "of": folder.name}
    begin["hardware"] = hardware(context.ranks.device, context.ranks.size)
    if step == 0:
        log.write("stage_start", step=0, name=recipe.stages[index].name, **begin)
    else:
        log.write("resumed", from_step=step, **begin)
    return log
