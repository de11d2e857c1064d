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
    from segfleet.pipeline.status import finished, standing
    from segfleet.preprocess.stores.manifest import load_manifest

    if max_time is not None and not max_time > 0:
        raise InputError(
            f"--max-time: found {max_time:g}, expected more than 0 hours; leave it out for no limit"
        )
    chosen = with_absolute_store(load_recipe(recipe, changes))
    manifest = load_manifest(Path(chosen.data.store))
    folders = stage_folders(runs.resolve(), chosen, manifest)
    leaf = folders[-1].path
    typer.echo(f"segfleet: {standing(chosen, manifest, folders)}", err=True)
    with progress("training") as tick:
        totals = [
            stage.epochs * steps
            for stage, steps in zip(chosen.stages, stage_steps(chosen, manifest), strict=True)
        ]
        training = TrainingProgress(folders, chosen, totals, tick)
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
        "finished": finished(folders[-1]),
    }
    show(document, as_json, render)


def render(document: dict) -> None:
    dice = document["mean_foreground_dice"]
    typer.echo(
        f"run     {document['run']}\nreport  {document['report']}\nDice    "
        f"{'not defined' if dice is None else f'{dice:.4f}'}"
    )


class TrainingProgress:
    """Reads the run's own files, as any other shell could, and moves the bar of the present phase:
    training of one stage, validation, scoring, report."""

    def __init__(self, folders, recipe, totals, tick):
        from segfleet.core.progress import EventFollower

        self.folders, self.tick, self.shown = folders, tick, None
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
            self.tick(*now)

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
        facts = [f"epoch {event['epoch'] + 1}/{stage.epochs}"] if "epoch" in event else []
        facts += [f"loss {event['loss']:.3f}"] if "loss" in event else []
        phase = f"training {where}".strip()
        return event["step"], self.totals[number], ", ".join([phase, *facts])
