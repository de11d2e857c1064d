"""The stages of a run on disk: which of them are to be trained, and that one run does so."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.core.lock import Lock
from segfleet.core.partial import remove_partial
from segfleet.pipeline import checkpoint
from segfleet.pipeline.run import ADVICE, DONE, RECIPE, StageFolder, lock_stage
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.stop import Interrupted
from segfleet.pipeline.training.context import Context

LOOK = 1.0  # seconds between looks at a lock that is waited for


def missing(context: Context) -> list[int]:
    """Stages to be trained: those that are not finished, and finished ones whose checkpoint is
    needed for what follows but is damaged."""
    indices, needed = [], True
    for folder in reversed(context.folders):
        needed = folder.done() is None or (needed and bool(damaged(context, folder)))
        if needed:
            indices.append(folder.index)
    return indices[::-1]


def damaged(context: Context, folder: StageFolder) -> dict[str, str]:
    """Checkpoint (its folder's name) -> what is wrong with it, of those that a finished stage must
    have."""
    done = folder.done()
    names = {done["checkpoint"]}
    if folder is context.folders[-1]:
        names.add(checkpoint.folder_name(scored.chosen_step(context.recipe, done)))
    return {
        name: fault
        for name in sorted(names)
        if (fault := checkpoint.damage(folder.checkpoints / name))
    }


def reopened(context: Context, folder: StageFolder) -> bool:
    """Whether a stage is to be trained, now that its lock is held. A finished one that is damaged
    is no longer finished then."""
    if folder.done() is None:
        return True
    if not (faults := damaged(context, folder)):
        return False  # another process has trained it meanwhile
    first, fault = next(iter(faults.items()))
    (folder.path / DONE).unlink()
    if folder is context.folders[-1]:
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
    context.warn(f"{where}; stage {folder.index + 1} is trained again from {start}")
    return True


def noted(context: Context) -> bool:
    """Whether the run's folder holds its recipe as it is now."""
    return read_json(context.folders[-1].path / RECIPE) == context.recipe.model_dump(mode="json")


def note_recipe(context: Context) -> None:
    """Only under a lock: a process that is refused must not change the recipe of the one that
    trains."""
    if context.ranks.rank == 0 and not noted(context):
        context.folders[-1].path.mkdir(parents=True, exist_ok=True)
        write_json(context.folders[-1].path / RECIPE, context.recipe.model_dump(mode="json"))


@contextmanager
def locked(context: Context, folder: StageFolder) -> Iterator[None]:
    """Rank 0 holds the stage's lock. If another process has it, all ranks fail together, or wait
    together if the run waits for such."""
    ranks, reported = context.ranks, False
    while True:
        lock, refusal = _taken(context, folder) if ranks.rank == 0 else (None, None)
        if not (refusal := ranks.share(refusal)):
            break
        if ranks.any(context.asked_to_stop()):
            stage = f"stage {folder.index + 1}, which another run is training"
            raise Interrupted(
                f"stopped while waiting for {stage}; nothing is lost. Run the same command again "
                "to go on."
            )
        if not _waits(context, folder, refusal):
            raise InputError(refusal)
        if ranks.rank == 0 and not reported:
            context.warn(f"{refusal.removesuffix(ADVICE)}; waiting for it")
        reported = True
        time.sleep(LOOK)
    try:
        yield
    finally:
        if lock:
            lock.release()


def _taken(context: Context, folder: StageFolder) -> tuple[Lock | None, str | None]:
    """The lock, or who has it."""
    try:
        lock = lock_stage(folder.path, context.asked_to_stop)
    except InputError as error:
        return None, str(error)
    checkpoint.clean(folder.checkpoints)
    remove_partial(folder.path, alone=True)
    return lock, None


def _waits(context: Context, folder: StageFolder, refusal: str) -> bool:
    """For a stage that another run, which shares it, trains; and for an earlier start of this very
    job, whose node SLURM gave up while it lives on: it stops when it sees this one, and a lock on a
    shared disk ends with its node's lease."""
    if not context.waits:
        return False
    job = os.environ.get("SLURM_JOB_ID")
    earlier = bool(job) and f" of job {job}{ADVICE}" in refusal
    return earlier or folder is not context.folders[-1]
