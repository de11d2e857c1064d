"""The training loop. Reading order is execution order: `train` walks the stages, `train_stage` the
steps of one."""

from __future__ import annotations

import faulthandler
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.core.machine import cpus_of_a_rank
from segfleet.core.partial import remove_partial
from segfleet.pipeline import checkpoint, run
from segfleet.pipeline.data import loader
from segfleet.pipeline.data.sampler import MixedSampler, PatchSampler
from segfleet.pipeline.devices import numerics, out_of_memory
from segfleet.pipeline.engines.base import Engine
from segfleet.pipeline.events import EventLog
from segfleet.pipeline.parts import (
    augments_on_device,
    channels_last,
    check_recipe,
    doubts,
    patch_of,
)
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe, resolve
from segfleet.pipeline.reports.trackers import check_trackers, open_trackers
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.stop import Interrupted, Paused
from segfleet.pipeline.training.agreement import Agreement
from segfleet.pipeline.training.begin import build
from segfleet.pipeline.training.hardware import Energy, hardware
from segfleet.pipeline.training.pulse import Pulse
from segfleet.pipeline.training.schedule import learning_rate
from segfleet.pipeline.training.window import Hunger, Stream, Window
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import Manifest

LOG_EVERY = 10  # steps between fetches of the losses: between them nothing waits for the device
LOOK = 1.0  # seconds between looks at a lock that is waited for
KEEP = 2  # newest checkpoints kept besides the best ones
# what the best checkpoint may have, each kept: 1 the highest, -1 the lowest
MEASURES = {"dice": 1, "iou_pooled": 1, "loss": -1}

# (engine, resolved recipe) -> scores while training: {"dice": ..., ...}, the same on every rank
Validate = Callable[[Engine, Recipe], dict[str, Any]]


@dataclass
class Progress:
    """What a checkpoint remembers of a stage besides tensors."""

    step: int = 0
    skipped: int = 0  # steps with a non-finite gradient; they changed nothing
    skipped_in_a_row: int = 0
    validated: int = 0  # step of the last validation
    # measure of a validation -> {"value", "step"} of the best one so far
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    stale: int = 0  # validations since the best one by `evaluation.select`

    def state(self, recipe: Recipe, index: int) -> dict[str, Any]:
        facts = {
            "stage": index,
            "recipe": recipe.model_dump(mode="json"),
            "versions": checkpoint.versions(),
        }
        return {**facts, "progress": asdict(self)}

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> Progress:
        return cls(**saved.state["progress"])


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run works with; the same on every rank."""

    recipe: Recipe
    stores: Callable[[Recipe], ShardStore]  # of a recipe that is resolved for its stage
    folders: list[run.StageFolder]
    ranks: Ranks
    asked_to_stop: Callable[[], bool]
    warn: Callable[[str], None]
    validate: Validate
    # for a stage that another run, which shares it, is training; never for the last one, which is
    # this very run's
    waits: bool = False
    listen: Callable[[dict[str, Any]], None] | None = None  # hears every event, on rank 0
    pause_at: int | None = None  # step of the last stage at which it stops, saved

    def manifests(self, settings: Recipe) -> Manifest:
        return self.stores(settings).manifest


def train(this: Run) -> Path:
    """Train every stage that is not finished yet; the folder of the last one. Raises Interrupted
    after an agreed stop."""
    recipe, ranks, last = this.recipe, this.ranks, this.folders[-1].path
    check_recipe(recipe, this.manifests)
    for sentence in doubts(recipe, this.manifests) if ranks.rank == 0 else ():
        this.warn(sentence)
    check_batches(recipe, ranks.size)
    check_trackers(recipe.trackers)
    for index in ranks.share(missing(this) if ranks.rank == 0 else None):
        with locked(this, this.folders[index]):
            if ranks.share(reopened(this, this.folders[index]) if ranks.rank == 0 else None):
                note_recipe(this)
                if ranks.rank == 0:
                    run.note_identity(this.folders[index], recipe, this.manifests)
                own = resolve(recipe, index)
                patch = patch_of(own, this.manifests(own))
                words = out_of_memory.training_words(own, patch, ranks.size)
                with out_of_memory.named(ranks.device, words):
                    train_stage(this, index)
    if ranks.share(ranks.rank == 0 and not noted(this)):
        with locked(this, this.folders[-1]):
            note_recipe(this)
    return last


def check_batches(recipe: Recipe, ranks: int) -> None:
    """Whether the ranks can share the batches of every stage. Raises InputError."""
    for index, stage in enumerate(recipe.stages):
        own = resolve(recipe, index)
        try:
            loader.check_shares(own.data.batch, ranks, own.engine.accumulate)
        except InputError as error:
            raise InputError(run.named(error, own is not recipe, index, stage)) from None


def missing(this: Run) -> list[int]:
    """Stages to be trained: those that are not finished, and finished ones whose checkpoint is
    needed for what follows but is damaged."""
    found, needed = [], True
    for folder in reversed(this.folders):
        needed = folder.done() is None or (needed and bool(damaged(this, folder)))
        if needed:
            found.append(folder.index)
    return found[::-1]


def damaged(this: Run, folder: run.StageFolder) -> dict[str, str]:
    """Checkpoint (its folder's name) -> what is wrong with it, of those that a finished stage must
    have."""
    done = folder.done()
    names = {done["checkpoint"]}
    if folder is this.folders[-1]:
        names.add(checkpoint.folder_name(scored.chosen_step(this.recipe, done)))
    return {
        name: fault
        for name in sorted(names)
        if (fault := checkpoint.damage(folder.checkpoints / name))
    }


def reopened(this: Run, folder: run.StageFolder) -> bool:
    """Whether a stage is to be trained, now that its lock is held. A finished one that is damaged
    is no longer finished then."""
    if folder.done() is None:
        return True
    if not (faults := damaged(this, folder)):
        return False  # another process has trained it meanwhile
    first, fault = next(iter(faults.items()))
    (folder.path / run.DONE).unlink()
    if folder is this.folders[-1]:
        # on a GPU the last bits may come out differently
        (folder.path / scored.EVALUATION).unlink(missing_ok=True)
    for path in checkpoint.steps(folder.checkpoints):
        if path.name >= first:
            shutil.rmtree(path)
    start = (
        "the checkpoint before it"
        if checkpoint.steps(folder.checkpoints)
        else "its beginning, for no other is left"
    )
    where = f"checkpoint: {folder.checkpoints / first} of a finished stage is damaged: {fault}"
    this.warn(f"{where}; stage {folder.index + 1} is trained again from {start}")
    return True


def noted(this: Run) -> bool:
    """Whether the run's folder holds its recipe as it is now."""
    return read_json(this.folders[-1].path / run.RECIPE) == this.recipe.model_dump(mode="json")


def note_recipe(this: Run) -> None:
    """Only under a lock: a process that is refused must not change the recipe of the one that
    trains."""
    if this.ranks.rank == 0 and not noted(this):
        this.folders[-1].path.mkdir(parents=True, exist_ok=True)
        write_json(this.folders[-1].path / run.RECIPE, this.recipe.model_dump(mode="json"))


class locked:
    """Rank 0 holds the stage's lock. If somebody else has it, all ranks fail together, or wait
    together if the run waits for such."""

    def __init__(self, this: Run, folder: run.StageFolder):
        self.this, self.folder, self.ranks, self.lock = this, folder, this.ranks, None

    def __enter__(self) -> None:
        told = False
        while refusal := self.ranks.share(self._taken() if self.ranks.rank == 0 else None):
            if not self._waits(refusal):
                raise InputError(refusal)
            if self.ranks.rank == 0 and not told:
                self.this.warn(f"{refusal.removesuffix(run.ADVICE)}; waiting for it")
            told = True
            if self.ranks.any(self.this.asked_to_stop()):
                stage = f"stage {self.folder.index + 1}, which another run is training"
                raise Interrupted(
                    f"stopped while waiting for {stage}; nothing is lost. Run the same command "
                    "again to go on."
                )
            time.sleep(LOOK)

    def _waits(self, refusal: str) -> bool:
        """For a stage that another run, which shares it, trains; and for an earlier start of this
        very job, whose node SLURM gave up while it lives on: it stops when it sees this one, and a
        lock on a shared disk ends with its node's lease."""
        if not self.this.waits:
            return False
        job = os.environ.get("SLURM_JOB_ID")
        earlier = bool(job) and f" of job {job}{run.ADVICE}" in refusal
        return earlier or self.folder is not self.this.folders[-1]

    def _taken(self) -> str | None:
        """Take the lock, or say who has it."""
        try:
            self.lock = run.lock_stage(self.folder.path)
        except InputError as error:
            return str(error)
        checkpoint.clean(self.folder.checkpoints)
        remove_partial(self.folder.path, alone=True)
        return None

    def __exit__(self, *_) -> None:
        if self.lock is not None:
            self.lock.release()


def train_stage(this: Run, index: int) -> None:
    """Train one stage from where its folder stands to its end."""
    recipe, ranks = resolve(this.recipe, index), this.ranks
    folder, stage = this.folders[index], recipe.stages[index]
    stores, sampler = sampler_of(this, recipe)
    steps = run.stage_steps(recipe, this.manifests)[index]
    total = stage.epochs * steps
    pause = this.pause_at if folder is this.folders[-1] else None

    thaws = steps * (stage.unfreeze_at or 0)
    engine, before = build(this, index)
    progress = Progress.of(before) if before else Progress()
    frozen = progress.step < thaws
    log = begin_log(this, index, progress.step, total) if ranks.rank == 0 else None
    energy = Energy(ranks.device)
    saver = checkpoint.Saver(folder.checkpoints)
    place = loader.Place(stage=index, epoch=progress.step // steps, step=progress.step % steps)
    schedule = loader.Schedule(
        place,
        stage.epochs,
        steps,
        recipe.data.batch,
        recipe.engine.accumulate,
        ranks.rank,
        ranks.size,
    )
    parts = (stores, sampler, index, steps, recipe.data.augment, ranks.device.type != "cpu")
    patches = (
        loader.MaskedPatches(*parts, mask=recipe.data.mask)
        if recipe.task == "reconstruct"
        else loader.Patches(*parts, on_device=augments_on_device(recipe, ranks.device))
    )
    workers = loader.worker_count(recipe.data.workers, ranks.device.type, cpus_of_a_rank())
    stream = Stream(
        loader.batches(patches, schedule, workers),
        ranks.device,
        channels_last(recipe, ranks.device, flat=sampler.patch[0] == 1),
    )
    window = Window(stream, recipe.data.batch, Hunger(workers, this.warn))

    saved = progress.step if total else -1  # a stage that trains nothing keeps its beginning
    clock = SaveClock(recipe.save_minutes, ranks)
    agreement = Agreement(ranks, this.asked_to_stop, clock.due)
    pulse, dump = Pulse(ranks, this.warn), HangDump()
    periods = [period for period in (LOG_EVERY, steps, recipe.save_every) if period]
    try:
        while True:
            dump.rearm()
            pulse.beat(progress.step)
            stopping, by_clock = agreement.answers()
            stopping &= progress.step < total
            if (
                stopping
                or progress.step == total
                or by_clock
                or ends_period(progress.step, periods)
            ):
                window.report(progress, ranks, log)
            if not stopping and validation_due(recipe, progress, steps):
                pulse.rest()
                try:
                    validate(this, recipe, engine, progress, progress.step // steps - 1, log)
                except Interrupted:  # on all ranks; it is done again when the run goes on
                    stopping = True
            pausing = pause is not None and pause <= progress.step < total
            stopping |= pausing
            ended = not stopping and (
                progress.step == total or 0 < stage.patience <= progress.stale
            )
            due = (
                ended
                or stopping
                or by_clock
                or (recipe.save_every and progress.step % recipe.save_every == 0)
                or progress.step in best_steps(progress)
                or (frozen and progress.step == thaws)
            )
            if due and progress.step > saved:
                pulse.rest()
                save(engine, saver, progress, recipe, index, ranks)
                saved = progress.step
                clock.start()
            if ended or stopping:
                pulse.rest()
            if (saver.wait() if ended or stopping else saver.poll()) and ranks.rank == 0:
                checkpoint.prune(folder.checkpoints, KEEP, protected(progress))
            if ended:
                if log:
                    end = {"stage": index, "at_step": progress.step}
                    log.write("finished", **end, joules=energy.joules())
                break
            if stopping:
                stopped(log, index, progress.step, energy)
                where = f"step {progress.step} of {total} of stage {index + 1}"
                raise (Paused if pausing else Interrupted)(
                    f"stopped after {where}; all saved. Run the same command again to go on."
                )

            if frozen and progress.step == thaws:
                # as a run that was stopped here goes on: from the checkpoint just saved
                pulse.rest()
                saver.wait()
                del engine
                engine, before = build(this, index)
                progress = Progress.of(before)
                frozen = False

            pulse.beat(progress.step)
            epoch, lr = progress.step // steps, learning_rate(stage, progress.step, total)
            # dropout and the like
            torch.manual_seed(step_seed(recipe.seed, index, progress.step, ranks.rank))
            with numerics.step_of(recipe, ranks.device):
                loss, norm = engine.step(stream, lr)
            window.add(loss, norm, epoch, lr)
            progress.step += 1
    except BaseException:
        # a save under way is published if it can be; the first error is what the user must see
        with suppress(Exception):
            saver.wait()
        raise
    finally:
        dump.close()
        pulse.close()
        if log:
            log.close()
    agreement.close()
    ranks.barrier()
    if ranks.rank == 0:
        last = checkpoint.folder_name(progress.step)
        folder.finish(last, steps=progress.step, best=progress.best, skipped=progress.skipped)
        checkpoint.prune(folder.checkpoints, 1, protected(progress))
    ranks.barrier()


def sampler_of(this: Run, recipe: Recipe) -> tuple[list[ShardStore], PatchSampler | MixedSampler]:
    """The stores of a stage, whose recipe is resolved, and what is drawn from them."""
    patch, stores, samplers, weights = patch_of(recipe, this.manifests(recipe)), [], [], []
    for one, manifest, weight in run.shares_of(recipe, this.manifests):
        samplers.append(
            PatchSampler(
                cases=manifest.cases.among(set(run.training_ids(one, manifest))),
                patch=patch,
                batch=recipe.data.batch,
                foreground=recipe.data.foreground,
                seed=recipe.seed,
            )
        )
        stores.append(this.stores(one))
        weights.append(weight)
    if len(samplers) == 1:
        return stores, samplers[0]
    return stores, MixedSampler(parts=tuple(samplers), weights=tuple(weights))


def begin_log(this: Run, index: int, step: int, total: int) -> EventLog:
    """The stage's log, opened at a step, with what begins there."""
    folder = this.folders[index].path
    trackers = open_trackers(this.recipe.trackers, folder, this.recipe.name, this.warn, step)
    log = EventLog(folder, step, this.listen, trackers)
    begin = {"stage": index, "steps": total, "ranks": this.ranks.size}
    begin["of"] = this.folders[index].path.name
    begin["hardware"] = hardware(this.ranks.device, this.ranks.size)
    if step == 0:
        log.write("stage_start", step=0, name=this.recipe.stages[index].name, **begin)
    else:
        log.write("resumed", from_step=step, **begin)
    return log


def stopped(log: EventLog | None, index: int, step: int, energy: Energy) -> None:
    if log:
        log.write("stopped", stage=index, at_step=step, joules=energy.joules())


def ends_period(step: int, periods: list[int]) -> bool:
    return any(step % period == 0 for period in periods)


class SaveClock:
    """Rank 0's: whether the last checkpoint is old enough for a new one."""

    def __init__(self, minutes: float, ranks: Ranks):
        self.seconds, self.rank = 60 * minutes, ranks.rank
        self.start()

    def start(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return self.rank == 0 and time.monotonic() - self.since >= self.seconds


class HangDump:
    """Writes every thread's stack to stderr when the loop has not come round for a time."""

    def __init__(self) -> None:
        self.seconds = float(os.environ.get("SEGFLEET_WATCHDOG", "900"))
        self.armed = -math.inf

    def rearm(self) -> None:
        """From now on, or from up to a hundredth of the time ago: to arm starts a thread, which
        costs a millisecond and more, and a step may take no longer."""
        now = time.monotonic()
        if now - self.armed >= self.seconds / 100:
            faulthandler.dump_traceback_later(self.seconds, repeat=True)
            self.armed = now

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def validation_due(recipe: Recipe, progress: Progress, steps: int) -> bool:
    """Whether an epoch that is to be validated ended with the last step and has not been validated
    yet, here or before a stop."""
    every = recipe.evaluation.every * steps if recipe.task == "segment" else 0
    return bool(every) and progress.step > progress.validated and progress.step % every == 0


def validate(
    this: Run,
    recipe: Recipe,
    engine: Engine,
    progress: Progress,
    epoch: int,
    log: EventLog | None,
) -> None:
    """Score the network as it stands and remember whether it is the best so far."""
    scores = this.validate(engine, recipe)
    pictures = scores.pop("pictures", {})
    progress.validated = progress.step
    for measure, sign in MEASURES.items():
        # not defined or not finite: it says neither better nor worse
        value = scores.get(measure)
        if value is None or not math.isfinite(value):
            continue
        known = progress.best.get(measure)
        better = known is None or sign * value > sign * known["value"]
        if better:
            progress.best[measure] = {"value": value, "step": progress.step}
        if measure == recipe.evaluation.select:
            progress.stale = 0 if better else progress.stale + 1
    if log:
        log.write("validation", step=progress.step, epoch=epoch, **scores)
        log.pictures(pictures, progress.step)


def save(
    engine: Engine,
    saver: checkpoint.Saver,
    progress: Progress,
    recipe: Recipe,
    index: int,
    ranks: Ranks,
) -> None:
    """Every rank takes part in gathering the tensors; rank 0 writes them."""
    tensors = engine.tensors()
    if ranks.rank == 0:
        saver.save(progress.step, tensors, progress.state(recipe, index))


def protected(progress: Progress) -> set[str]:
    return {checkpoint.folder_name(step) for step in best_steps(progress)}


def best_steps(progress: Progress) -> set[int]:
    return {best["step"] for best in progress.best.values()}


def step_seed(*place: int) -> int:
    """A 63-bit seed from a place in the run."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest()) >> 1
