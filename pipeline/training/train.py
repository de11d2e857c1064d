"""The training loop. Reading order is execution order: `train` walks the stages, `train_stage` the
steps of one."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import torch

from segfleet.core.errors import InputError
from segfleet.core.machine import cpus_of_a_rank
from segfleet.pipeline import checkpoint
from segfleet.pipeline.data import loader
from segfleet.pipeline.devices import numerics, out_of_memory
from segfleet.pipeline.engines.base import Engine
from segfleet.pipeline.events import EventLog
from segfleet.pipeline.identity import note_identity
from segfleet.pipeline.parts import channels_last, check_recipe, doubts, patch_of
from segfleet.pipeline.recipe import Recipe, resolve
from segfleet.pipeline.reports.trackers import check_trackers
from segfleet.pipeline.stage_data import named, stage_steps
from segfleet.pipeline.stop import Interrupted, Paused
from segfleet.pipeline.training.agreement import Agreement
from segfleet.pipeline.training.begin import begin_log, build
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.hardware import Energy
from segfleet.pipeline.training.progress import Progress
from segfleet.pipeline.training.pulse import Pulse
from segfleet.pipeline.training.saves import Saves
from segfleet.pipeline.training.schedule import learning_rate
from segfleet.pipeline.training.stages import locked, missing, note_recipe, noted, reopened
from segfleet.pipeline.training.stream import Stream, patches_of
from segfleet.pipeline.training.window import Hunger, Window

LOG_EVERY = 10  # steps between fetches of the losses: between them nothing waits for the device


def train(context: Context) -> Path:
    """Train every stage that is not finished yet; the folder of the last one. Raises Interrupted
    after an agreed stop."""
    recipe, ranks, folders = context.recipe, context.ranks, context.folders
    check_recipe(recipe, context.manifests)
    for sentence in doubts(recipe, context.manifests) if ranks.rank == 0 else ():
        context.warn(sentence)
    check_batches(recipe, ranks.size)
    check_trackers(recipe.trackers)
    for index in ranks.share(missing(context) if ranks.rank == 0 else None):
        with locked(context, folders[index]):
            if ranks.share(reopened(context, folders[index]) if ranks.rank == 0 else None):
                note_recipe(context)
                if ranks.rank == 0:
                    note_identity(folders[index].path, recipe, context.manifests, index)
                own = resolve(recipe, index)
                patch = patch_of(own, context.manifests(own))
                words = out_of_memory.training_words(own, patch, ranks.size)
                with out_of_memory.named(ranks.device, words):
                    train_stage(context, index)
    if ranks.share(ranks.rank == 0 and not noted(context)):
        with locked(context, folders[-1]):
            note_recipe(context)
    return folders[-1].path


def check_batches(recipe: Recipe, ranks: int) -> None:
    """Whether the ranks can share the batches of every stage. Raises InputError."""
    for index, stage in enumerate(recipe.stages):
        own = resolve(recipe, index)
        try:
            loader.check_shares(own.data.batch, ranks, own.engine.accumulate)
        except InputError as error:
            raise InputError(named(error, own is not recipe, index, stage)) from None


def train_stage(context: Context, index: int) -> None:
    """Train one stage from where its folder stands to its end."""
    recipe, ranks = resolve(context.recipe, index), context.ranks
    folder, stage = context.folders[index], recipe.stages[index]
    steps = stage_steps(recipe, context.manifests)[index]  # of an epoch
    total, thaw = stage.epochs * steps, (stage.unfreeze_at or 0) * steps
    pause = context.pause_at if folder is context.folders[-1] else None
    patches = patches_of(context, index, steps)

    engine, saved = build(context, index)
    progress = Progress.of(saved) if saved else Progress()
    begin = progress.step
    log = begin_log(context, index, begin, total) if ranks.rank == 0 else None
    energy = Energy(ranks.device)
    workers = loader.worker_count(recipe.data.workers, ranks.device.type, cpus_of_a_rank())
    shares = (recipe.data.batch, recipe.engine.accumulate, ranks.rank, ranks.size)
    schedule = loader.Schedule(begin, stage.epochs, steps, *shares)
    stream = Stream(
        loader.batches(patches, schedule, workers),
        ranks.device,
        channels_last(recipe, ranks.device, flat=patches.sampler.patch[0] == 1),
    )
    window = Window(stream, recipe.data.batch, Hunger(workers, context.warn))
    # a stage that trains nothing keeps its beginning
    saves = Saves(folder, recipe, ranks, step=begin if total else -1)
    agreement = Agreement(ranks, context.asked_to_stop, saves.due)
    pulse = Pulse(ranks, context.warn)
    try:
        while True:
            pulse.beat(progress.step)
            stopping, by_clock = agreement.answers()
            stopping &= progress.step < total
            due = by_clock or ends_period(progress.step, recipe.save_every)
            if stopping or due or ends_period(progress.step, LOG_EVERY, steps):
                window.report(progress, ranks, log)

            if not stopping and progress.validation_due(recipe, steps):
                pulse.rest()
                try:
                    validate(context, recipe, engine, progress, progress.step // steps - 1, log)
                except Interrupted:  # on all ranks; it is done again when the run resumes
                    stopping = True
            pausing = pause is not None and pause <= progress.step < total
            stopping |= pausing
            ended = not stopping and (
                progress.step == total or 0 < stage.patience <= progress.stale
            )
            thawing = begin < progress.step == thaw

            due = due or stopping or ended or thawing or progress.step in progress.best_steps
            if due:
                pulse.rest()
                if log:
                    log.check_place()
                saves.save(engine, progress)
            saves.publish(progress, wait=stopping or ended or thawing)
            if log and (stopping or ended):
                end = {"stage": index, "at_step": progress.step, "joules": energy.joules()}
                log.write("finished" if ended else "stopped", **end)
            if ended:
                break
            if stopping:
                where = f"step {progress.step} of {total} of stage {index + 1}"
                raise (Paused if pausing else Interrupted)(
                    f"stopped after {where}; all saved. Run the same command again to go on."
                )
            if thawing:  # as a run that was stopped here resumes: from the checkpoint just saved
                del engine
                engine, saved = build(context, index)
                progress = Progress.of(saved)

            pulse.beat(progress.step)
            # dropout and the like
            torch.manual_seed(step_seed(recipe.seed, index, progress.step, ranks.rank))
            lr = learning_rate(stage, progress.step, total)
            with numerics.step_of(recipe, ranks.device):
                loss, norm = engine.step(stream, lr)
            window.add(loss, norm, progress.step // steps, lr)
            progress.step += 1
    except BaseException:
        # a save under way is published if it can be; the first error is what the user must see
        with suppress(Exception):
            saves.saver.wait()
        raise
    finally:
        pulse.close()
        if log:
            log.close()
    agreement.close()
    ranks.barrier()
    if ranks.rank == 0:
        name = checkpoint.folder_name(progress.step)
        folder.finish(name, steps=progress.step, best=progress.best, skipped=progress.skipped)
        saves.prune(progress, keep=1)
    ranks.barrier()


def ends_period(step: int, *periods: int | None) -> bool:
    return any(period and step % period == 0 for period in periods)


def validate(
    context: Context,
    recipe: Recipe,
    engine: Engine,
    progress: Progress,
    epoch: int,
    log: EventLog | None,
) -> None:
    """Score the network as it stands and remember whether it is the best so far."""
    scores = context.validate(engine, recipe)
    pictures = scores.pop("pictures", {})
    progress.note(scores, recipe.evaluation.select)
    if log:
        log.write("validation", step=progress.step, epoch=epoch, **scores)
        log.pictures(pictures, progress.step)


def step_seed(*place: int) -> int:
    """A 63-bit seed from a place in the run."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest()) >> 1
