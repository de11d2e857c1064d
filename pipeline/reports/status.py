"""Where every run stands, from its own files alone."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.core.files import read_json
from segfleet.core.lock import is_locked
from segfleet.core.progress import EVENTS, FAR
from segfleet.pipeline.events import comes_to_file, ended, recent_events
from segfleet.pipeline.identity import IDENTITY, differences
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.run import DONE, LOCK, StageFolder, open_run
from segfleet.pipeline.scoring.folds import family_of, folder_of
from segfleet.pipeline.scoring.scored import is_scored, read_evaluation
from segfleet.preprocess.stores.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where one run stands. None: not known, or there is none."""

    run: str  # name of its folder, the uid
    path: str
    recipe: str = "?"
    fold: int | str | None = None
    family: str | None = None  # of the runs that differ in their fold alone
    stages: int = 0
    score: float | None = None  # mean Dice of the foreground
    date: str | None = None  # of its end or its last event, "2026-11-29 07:12" local time
    state: str  # done, trained, training, stopped, waiting, unreadable; of a job also SLURM's
    stage: int = 0  # the one it is in, from 1
    step: int = 0  # of that stage, as the following
    steps: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    remaining_seconds: int | None = None
    restarts: int = 0
    job: str | None = None  # SLURM's number
    queue: str | None = None  # SLURM's own word for its state
    reason: str | None = None  # why it waits, or what went wrong
    node: str | None = None


def run_status(path: Path) -> Row:
    """Where a run stands by its own files."""
    recipe, folders = open_run(path)
    stage = next((folder for folder in folders if folder.done() is None), None)
    progress = _progress(stage or folders[-1])
    if stage is None:
        state = "trained" if read_evaluation(path) is None else "done"
    elif is_locked(stage.path / LOCK):
        state = "training"
    else:
        state = "stopped" if progress["step"] or stage.index else "waiting"
        if ended(stage.path):
            sys.stderr.write(
                f"segfleet: {stage.path / DONE} is missing, though its events say that the stage "
                "was trained to its end; the same command makes it again\n"
            )
    return Row(
        run=path.name,
        path=str(path),
        recipe=recipe.name,
        fold=recipe.data.fold,
        family=family_of(recipe),
        stages=len(folders),
        score=score(path),
        date=_date(path, folders),
        state=state,
        stage=stage.index + 1 if stage else len(folders),
        **progress,
    )


def families(rows: list[Row]) -> list[dict[str, Any]]:
    """Runs of one recipe that differ in their fold alone, of at least two folds: {"recipe", "runs",
    "folds", "scores", "score": over all their cases, each by the network not trained on it}."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.family:
            grouped.setdefault(row.family, []).append(row)
    groups = []
    for members in grouped.values():
        members = sorted(members, key=lambda row: row.fold)
        if len({row.fold for row in members}) < max(2, len(members)):
            continue
        first = members[0]
        root = Path(first.path).parents[first.stages - 1]
        runs = [row.run for row in members]
        groups.append(
            {
                "recipe": first.recipe,
                "family": first.family,
                "runs": runs,
                "folds": [row.fold for row in members],
                "states": [row.state for row in members],
                "scores": [row.score for row in members],
                "score": score(folder_of(root, runs)),
            }
        )
    return groups


def score(run: Path) -> float | None:
    """Mean Dice of the foreground of a run's evaluation, if there is one."""
    try:
        return (read_evaluation(run) or {})["summary"]["mean_foreground_dice"]
    except (KeyError, TypeError):
        return None


def _date(run: Path, folders: list[StageFolder]) -> str | None:
    """When a run was finished, or last wrote an event: "2026-11-29 07:12", local time."""
    files = [folder.path / name for folder in folders for name in (DONE, EVENTS)]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(max(times))) if times else None


def finished(folder: StageFolder) -> str | None:
    """When a stage was finished, "2026-11-29 07:12" local time, or None."""
    if folder.done() is None:
        return None
    return time.strftime("%Y-%m-%d %H:%M", time.localtime((folder.path / DONE).stat().st_mtime))


def standing(recipe: Recipe, manifest: Manifest, folders: list[StageFolder]) -> str:
    """What training is about to do with a run, in one sentence: nothing, resume, or begin, and then
    why nothing that is there already will do."""
    stage = next((folder for folder in folders if folder.done() is None), None)
    if stage is None:
        done = finished(folders[-1])
        if is_scored(folders[-1].path, recipe, manifest):
            return f"nothing to do: finished on {done}"
        return f"training was finished on {done}; it remains to be scored"
    where = f"stage {stage.index + 1} of {len(folders)}"
    if (stage.path / IDENTITY).exists():
        step = _saved(stage)
        return f"going on with {where}" + (f" after step {step}" if step else "")
    closest = None
    for path in sorted(stage.path.parent.glob(f"*/{IDENTITY}")):
        differing = differences(recipe, manifest, stage.index, path.parent)
        same_name = differing and (read_json(path) or {}).get("name") == recipe.name
        if same_name and (closest is None or len(differing) < len(closest[1])):
            closest = (path.parent.name, differing)
    if closest is None:
        return f"a new run, beginning with {where}" if stage.index == 0 else f"beginning {where}"
    name, differing = closest
    rest = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"{where} is new: it differs from {name} in {', '.join(differing[:3])}{rest}"


def _reached(stage: StageFolder, last: int) -> int:
    """The step that a stage stands at: the end of one that is done; else at least that of its
    latest checkpoint and the `last` that it spoke of."""
    end = (stage.done() or {}).get("steps")
    if isinstance(end, int) and 0 < end < FAR:
        return end
    return max(last, _saved(stage))


def _saved(stage: StageFolder) -> int:
    """The step of a stage's latest checkpoint; 0 without one."""
    # not by checkpoint.py, which needs torch: status would wait for its import
    saved = (path.name.removeprefix("step-") for path in stage.checkpoints.glob("step-*"))
    return max((int(step) for step in saved if step.isdecimal()), default=0)


def _progress(stage: StageFolder) -> dict[str, Any]:
    progress: dict[str, Any] = {
        "step": 0,
        "steps": None,
        "loss": None,
        "samples_per_second": None,
        "remaining_seconds": None,
        "restarts": 0,
    }
    begun, progress["restarts"], steps = recent_events(stage.path)
    if begun:
        progress["steps"] = begun["steps"]
    *before, last = steps or [{"step": 0}]
    if last["step"] != (end := _reached(stage, last["step"])):
        if comes_to_file(last["step"], end):
            file = stage.path / EVENTS
            sys.stderr.write(f"segfleet: {file} is missing or lacks its end and is left out\n")
            last = {}
        last = {**last, "step": end}
    progress |= {key: last.get(key) for key in ("step", "loss", "samples_per_second")}
    seconds = last.get("time", 0) - before[0].get("time", 0) if before else 0
    ahead = last["step"] - before[0]["step"] if before else 0
    if seconds > 0 and ahead > 0 and progress["steps"]:
        progress["remaining_seconds"] = round((progress["steps"] - last["step"]) * seconds / ahead)
    return progress
