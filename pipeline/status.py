"""Where every run stands, from its own files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segfleet.core.lock import is_locked
from segfleet.pipeline.events import read_events
from segfleet.pipeline.run import LOCK, StageFolder, open_run


def run_status(path: Path) -> dict[str, Any]:
    """State of one run: done, training, stopped or waiting; the stage it is in; loss, speed and
    remaining seconds of that stage."""
    recipe, folders = open_run(path)
    row: dict[str, Any] = {
        "run": path.name,
        "path": str(path),
        "recipe": recipe.name,
        "stages": len(folders),
    }
    stage = next((folder for folder in folders if folder.done() is None), None)
    if stage is None:
        scored = (path / "evaluation.json").exists()
        return {
            **row,
            "state": "done" if scored else "trained",
            "stage": len(folders),
            **_progress(folders[-1]),
        }
    found = _progress(stage)
    state = (
        "training"
        if is_locked(stage.path / LOCK)
        else ("stopped" if found["step"] or stage.index else "waiting")
    )
    return {**row, "state": state, "stage": stage.index + 1, **found}


def _progress(stage: StageFolder) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "step": 0,
        "steps": None,
        "loss": None,
        "samples_per_second": None,
        "remaining_seconds": None,
        "restarts": 0,
    }
    last = None
    for event in read_events(stage.path):
        if event["event"] == "stage_start":
            facts["steps"] = event["steps"]
        elif event["event"] == "resumed":
            facts["restarts"] += 1
        elif event["event"] == "step":
            before, last = last, event
            facts |= {key: event.get(key) for key in ("step", "loss", "samples_per_second")}
            if before and event.get("time", 0) > before.get("time", 0) and facts["steps"]:
                rate = (event["step"] - before["step"]) / (event["time"] - before["time"])
                facts["remaining_seconds"] = round((facts["steps"] - event["step"]) / rate)
    return facts
