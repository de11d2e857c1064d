"""segfleet train RECIPE [key=value ...]"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segfleet.cli.options import Changes, Json, Runs
from segfleet.cli.output import progress, show, table
from segfleet.core.files import absolute

if TYPE_CHECKING:
    from segfleet.pipeline.launch.job import Train
    from segfleet.pipeline.recipe import Recipe
    from segfleet.preprocess.stores.manifest import Manifest


AUTO = "auto"


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe file, the name of a shipped recipe, or auto: planned for data.store=..."
        ),
    ],
    changes: Changes = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that train together.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads per rank; by default the cores are shared out."),
    ] = None,
    runs: Runs = Path("runs"),
    max_time: Annotated[
        float | None,
        typer.Option(min=0, help="Hours after which it stops in order; the same command goes on."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="auto: time of one run with its score: 30min, 8h, 2d; see segfleet plan."
        ),
    ] = None,
    stage_to: Annotated[
        str | None,
        typer.Option(help="Read the store from a copy on a local disk: a folder, or '$TMPDIR'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every stage of RECIPE that is not finished, score it and write its report. The same
    command continues or does nothing."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.launch.job import Train
    from segfleet.pipeline.recipe import load_recipe, with_absolute_store
    from segfleet.pipeline.scoring.folds import ALL, chosen_folds
    from segfleet.preprocess.stores.manifest import load_manifest

    if max_time is not None and not max_time > 0:
        raise InputError(
            f"--max-time: found {max_time:g}, expected more than 0 hours; leave it out for no limit"
        )
    if budget is not None and recipe != AUTO:
        raise InputError(
            f"--budget: is for `segfleet train {AUTO}`; a recipe says its epochs itself"
        )
    if recipe == AUTO and not Path(AUTO).exists():
        from segfleet.cli.plan import frozen_plan

        recipe, changes = frozen_plan(changes or [], budget, runs)
    chosen = with_absolute_store(load_recipe(recipe, changes))
    manifest = load_manifest(Path(chosen.data.store))
    end = time.monotonic() + 3600 * max_time if max_time else None
    documents = []
    for fold_recipe in chosen_folds(chosen, manifest):
        job = Train(
            recipe=fold_recipe.model_dump(mode="json"),
            root=absolute(runs),
            waits="SLURM_JOB_ID" in os.environ,  # members of an array start together
            stage_to=stage_to,
            max_seconds=None if end is None else max(end - time.monotonic(), 1.0),
        )
        documents.append(train_run(fold_recipe, manifest, job, ranks, threads))
    if chosen.data.fold == ALL:
        show(all_folds(absolute(runs), chosen, manifest, documents), as_json, render_folds)
    else:
        show(documents[0], as_json, render)


def train_run(
    recipe: Recipe, manifest: Manifest, job: Train, ranks: int, threads: int | None
) -> dict[str, Any]:
    """Train and score one run; what is said of it."""
    from segfleet.pipeline.launch.local import run_ranks
    from segfleet.pipeline.reports.status import finished, standing
    from segfleet.pipeline.run import stage_folders
    from segfleet.pipeline.scoring.scored import own_evaluation
    from segfleet.pipeline.stage_data import stage_steps

    folders = stage_folders(job.root, recipe, manifest)
    leaf = folders[-1].path
    fold = f"fold {recipe.data.fold}: " if len(manifest.folds(recipe.data.split)) > 1 else ""
    typer.echo(f"segfleet: {fold}{standing(recipe, manifest, folders)}", err=True)
    with progress("training") as on_progress:
        totals = [
            stage.epochs * steps
            for stage, steps in zip(recipe.stages, stage_steps(recipe, manifest), strict=True)
        ]
        training = TrainingProgress(folders, recipe, totals, on_progress)
        run_ranks(job, ranks, training.poll, threads)
    rebuilt = recipe.task == "reconstruct"  # which is not scored
    return {
        "run": str(leaf),
        "fold": recipe.data.fold,
        "stages": [str(folder.path) for folder in folders],
        "report": None if rebuilt else str(leaf / "report.html"),
        "mean_foreground_dice": None
        if rebuilt
        else own_evaluation(leaf, recipe, manifest)["summary"]["mean_foreground_dice"],
        "finished": finished(folders[-1]),
    }


def all_folds(
    root: Path, recipe: Recipe, manifest: Manifest, documents: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is said of all folds together. The score is of every case by the network that was not
    trained on it; without one (folds that validate on the same cases) it is missing."""
    from segfleet.pipeline.reports.report import write_report
    from segfleet.pipeline.scoring.folds import score_folds
    from segfleet.pipeline.scoring.scored import evaluation_of

    folder = score_folds(root, recipe, manifest, write_report)
    summary = evaluation_of(folder)["summary"] if folder else {}
    return {
        "folds": documents,
        "cases": summary.get("cases"),
        "mean_foreground_dice": summary.get("mean_foreground_dice"),
        "mean_foreground_dice_ci95": summary.get("mean_foreground_dice_ci95"),
        "report": str(folder / "report.html") if folder else None,
    }


def number(dice: float | None) -> str:
    return "not defined" if dice is None else f"{dice:.4f}"


def render(document: dict) -> None:
    typer.echo(f"run     {document['run']}")
    if document["report"] is None:
        typer.echo("It ends with a reconstruction, which is not scored.")
    else:
        typer.echo(
            f"report  {document['report']}\nDice    {number(document['mean_foreground_dice'])}"
        )


def render_folds(document: dict) -> None:
    rows = [
        (str(fold["fold"]), Path(fold["run"]).name, number(fold["mean_foreground_dice"]))
        for fold in document["folds"]
    ]
    table(("fold", "run", "Dice"), rows)
    if document["report"] is None:
        typer.echo("no score over all folds: they are fewer than two, or share cases they score")
        return
    typer.echo(
        f"report  {document['report']}\n"
        f"Dice    {number(document['mean_foreground_dice'])}, all {document['cases']} cases, each "
        "by the network that was not trained on it"
    )


class TrainingProgress:
    """Reads the run's own files, as any other shell could, and moves the bar of the present phase:
    training of one stage, validation, scoring, report."""

    def __init__(self, folders, recipe, totals, on_progress):
        from segfleet.core.progress import EventFollower

        self.folders, self.on_progress, self.shown = folders, on_progress, None
        self.stages, self.totals = recipe.stages, totals
        # of stages that were finished before, nothing is shown
        self.followers = {
            number: EventFollower(folder.path)
            for number, folder in enumerate(folders)
            if not folder.done()
        }
        self.last: dict[int, dict] = {}
        self.note = folders[-1].path / "scoring.json"
        self.stale = self._written()  # left by a process that was killed

    def poll(self) -> None:
        now = self._phase() or self._training()
        if now and now != self.shown:
            self.shown = now
            self.on_progress(*now)

    def _phase(self) -> tuple[int, int, str] | None:
        """Validation, scoring and report, which rank 0 notes while they last."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            note = json.loads(self.note.read_text(encoding="utf-8"))
            if self._written() != self.stale:
                return note["done"], note["total"], note["phase"]
        return None

    def _written(self) -> int | None:
        return self.note.stat().st_mtime_ns if self.note.exists() else None

    def _training(self) -> tuple[int, int, str] | None:
        """The latest stage in which steps were logged."""
        for number, follower in self.followers.items():
            for event in follower.new():
                if event["event"] in ("stage_start", "step"):
                    self.last[number] = event
        if not self.last:
            return None
        number = max(self.last)
        event, stage = self.last[number], self.stages[number]
        where = f"stage {number + 1}/{len(self.folders)}" if len(self.folders) > 1 else ""
        details = [f"epoch {event['epoch'] + 1}/{stage.epochs}"] if "epoch" in event else []
        details += [f"loss {event['loss']:.3f}"] if "loss" in event else []
        phase = f"training {where}".strip()
        return event["step"], self.totals[number], ", ".join([phase, *details])
