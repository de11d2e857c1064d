"""segfleet train RECIPE [key=value ...]"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.output import Json, progress, show


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a shipped recipe.")],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes of the recipe, key.path=value.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that train together.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads per rank; by default the cores are shared out."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    max_time: Annotated[
        float | None,
        typer.Option(min=0, help="Hours after which it stops in order; the same command goes on."),
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
    from segfleet.pipeline.launch.local import run_ranks
    from segfleet.pipeline.recipe import load_recipe, with_absolute_store
    from segfleet.pipeline.run import stage_folders, stage_steps
    from segfleet.pipeline.scoring.scored import evaluation_of
    from segfleet.preprocess.stores.manifest import load_manifest

    if max_time is not None and not max_time > 0:
        raise InputError(
            f"--max-time: found {max_time:g}, expected more than 0 hours; leave it out for no limit"
        )
    chosen = with_absolute_store(load_recipe(recipe, changes))
    manifest = load_manifest(Path(chosen.data.store))
    folders = stage_folders(runs.resolve(), chosen, manifest)
    leaf = folders[-1].path
    with progress("training") as tick:
        totals = [
            stage.epochs * steps
            for stage, steps in zip(chosen.stages, stage_steps(chosen, manifest), strict=True)
        ]
        training = TrainingProgress(folders, totals, tick)
        job = {"do": "train", "recipe": chosen.model_dump(mode="json"), "root": str(runs.resolve())}
        if "SLURM_JOB_ID" in os.environ:  # members of an array start together
            job["waits"] = True
        job |= ({"max_seconds": 3600 * max_time} if max_time else {}) | (
            {"stage_to": stage_to} if stage_to else {}
        )
        run_ranks(job, ranks, training.poll, threads)
    scores = evaluation_of(leaf)["summary"]
    document = {
        "run": str(leaf),
        "stages": [str(folder.path) for folder in folders],
        "report": str(leaf / "report.html"),
        "mean_foreground_dice": scores["mean_foreground_dice"],
    }
    show(document, as_json, render)


def render(document: dict) -> None:
    dice = document["mean_foreground_dice"]
    typer.echo(
        f"run     {document['run']}\nreport  {document['report']}\nDice    "
        f"{'not defined' if dice is None else f'{dice:.4f}'}"
    )


class TrainingProgress:
    """Reads the run's own files, as any other shell could, and moves the bar: steps of all stages,
    then the cases being scored."""

    def __init__(self, folders, totals, report):
        from segfleet.core.progress import EventFollower

        self.total, self.report, self.shown = sum(totals), report, None
        self.scoring = folders[-1].path / "scoring.json"
        self.steps = [
            total if folder.done() else 0 for folder, total in zip(folders, totals, strict=True)
        ]
        self.followers = [EventFollower(folder.path) for folder in folders]

    def poll(self) -> None:
        for index, follower in enumerate(self.followers):
            new = max((event.get("step", 0) for event in follower.new()), default=0)
            self.steps[index] = max(self.steps[index], new)
        now = (sum(self.steps), self.total)
        if now[0] == now[1]:
            with suppress(FileNotFoundError, json.JSONDecodeError):
                done, cases = json.loads(self.scoring.read_text())
                now = (self.total + done, self.total + cases)
        if now != self.shown:
            self.shown = now
            self.report(*now)
