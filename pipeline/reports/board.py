"""What a scored run came to, for those who watch it elsewhere: final scores, hyperparameters and
the pictures of its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from segfleet.core.files import read_json
from segfleet.pipeline.reports.drawn import FOLDER, drawn
from segfleet.pipeline.reports.overlays import pixels
from segfleet.pipeline.reports.trackers import flat, open_trackers
from segfleet.pipeline.run import RECIPE
from segfleet.pipeline.scoring.scored import read_evaluation

SETTINGS = ("seed", "data", "model", "loss", "optimizer", "stages", "engine")


def publish(run: Path, warn: Callable[[str], Any]) -> None:
    """Tell the recipe's trackers of a run's score; nothing if it has none."""
    document, recipe = read_evaluation(run, whole=True), read_json(run / RECIPE)
    if not document or not recipe:
        return
    step = int(str(document.get("checkpoint", "0")).rpartition("-")[2] or 0)
    names = tuple(recipe.get("trackers", ()))
    trackers = open_trackers(names, run, recipe["name"], warn, step)
    trackers.outcome(flat({key: recipe[key] for key in SETTINGS}), final_scores(document), step)
    for entry in drawn(run):
        png = (run / FOLDER / entry["file"]).read_bytes()
        trackers.picture(f"final/{entry['role']}", pixels(png), step)
    trackers.close()


def final_scores(document: dict[str, Any]) -> dict[str, float]:
    """The mean foreground Dice, and of every structure the mean of each metric that is known."""
    summary = document["summary"]
    by_name = {"final/mean_foreground_dice": summary["mean_foreground_dice"]}
    for name, scores in summary["structures"].items():
        for metric, value in scores.items():
            if isinstance(value, dict) and "mean" in value:
                by_name[f"final/{metric}/{name}"] = value["mean"]
    return {name: float(value) for name, value in by_name.items() if value is not None}
