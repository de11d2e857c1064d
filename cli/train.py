"""segfleet train RECIPE [key=value ...]"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.output import Json, progress, show


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a shipped recipe.")],
    changes: Annotated[list[str] | None, typer.Argument(help="Changes of the recipe, key.path=value.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine that train together.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per rank; by default the cores are shared out.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train every stage of RECIPE that is not finished, score it and write its report. The same command continues or does nothing."""
    from segfleet.pipeline.recipe import load_recipe
    from segfleet.pipeline.run import stage_folders
    from segfleet.preprocess.manifest import load_manifest
    from segfleet.preprocess.problems import InputError
    from segfleet.slurm.local import run_ranks

    chosen = load_recipe(recipe, changes)
    if not chosen.data.store:
        raise InputError("data.store: missing; name the folder of a store, for example data.store=stores/hippocampus")
    store = Path(chosen.data.store).resolve()
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"store": str(store)})})
    folders = stage_folders(runs.resolve(), chosen, load_manifest(store))
    leaf = folders[-1].path
    with progress("training") as tick:
        follow = Follower(folders, tick)
        run_ranks({"do": "train", "recipe": chosen.model_dump(mode="json"), "root": str(runs.resolve())}, ranks, follow.poll, threads)
    scores = json.loads((leaf / "evaluation.json").read_text(encoding="utf-8"))["summary"]
    document = {
        "run": str(leaf),
        "stages": [str(folder.path) for folder in folders],
        "report": str(leaf / "report.html"),
        "mean_foreground_dice": scores["mean_foreground_dice"],
    }
    show(document, as_json, render)


def render(document: dict) -> None:
    dice = document["mean_foreground_dice"]
    typer.echo(f"run     {document['run']}\nreport  {document['report']}\nDice    {'not defined' if dice is None else f'{dice:.4f}'}")


class Follower:
    """Reads the run's own event files, as any other shell could, and moves the bar."""

    def __init__(self, folders, tick):
        self.folders, self.tick = folders, tick
        self.offsets, self.steps, self.totals = {}, {}, {}

    def poll(self) -> None:
        for folder in self.folders:
            path = folder.path / "events.jsonl"
            if not path.exists():
                continue
            with open(path, encoding="utf-8") as file:
                if path.stat().st_size < self.offsets.get(path, 0):  # cut back by a resume
                    self.offsets[path] = 0
                file.seek(self.offsets.get(path, 0))
                for line in file:
                    if not line.endswith("\n"):
                        break
                    self.offsets[path] = self.offsets.get(path, 0) + len(line.encode())
                    event = json.loads(line)
                    if event["event"] == "stage_start":
                        self.totals[path] = event["steps"]
                    self.steps[path] = max(self.steps.get(path, 0), event.get("step", 0))
        if self.totals:
            self.tick(sum(self.steps.values()), sum(self.totals.values()))
