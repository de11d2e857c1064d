"""What ranks can be asked to do. Launchers carry the job as JSON, every rank does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from segfleet.core.errors import InputError
from segfleet.core.job import Job
from segfleet.preprocess.building.request import Preprocess, Survey, Write
from segfleet.preprocess.readers.base import Layout


class Train(Job):
    """Train what is missing of every stage, then score it. How data are reached changes no
    result."""

    do: Literal["train"] = "train"
    recipe: dict[str, Any]
    root: Path
    run: Path | None = None  # the run that is continued: nothing else is
    score: bool = True
    max_seconds: float | None = None  # stop in order after that time
    pause_at: int | None = None  # the step of the last stage after which it pauses
    waits: bool = False  # for a stage that another run trains: a refused job is not started again
    lines: bool = False  # print steps and validations
    stage_to: str | None = None  # read the store from a copy there; variables as the node has them


class Score(Job):
    """Only score; `again`: even if that is done."""

    do: Literal["score"] = "score"
    recipe: dict[str, Any]
    root: Path
    run: Path | None = None
    again: bool = False


class ScoreOn(Job):
    """Score a finished run on the cases of another store; split None: all of them."""

    do: Literal["score on"] = "score on"
    recipe: dict[str, Any]
    run: Path
    store: Path
    split: str | None = None
    fold: int = 0


class Predict(Job):
    """Segment images with a finished run, several as an ensemble, or a model file."""

    do: Literal["predict"] = "predict"
    models: tuple[Path, ...]
    images: tuple[Path, ...]
    out: Path
    format: str = ""
    layout: Layout | None = None  # of images that are raw data sets
    overlays: bool = False
    probabilities: bool = False
    postprocess: str | None = None  # auto | largest | min-size=N
    answer: Path | None = None  # a file for what came out, written by this job alone


class Command(Job):
    """A segfleet command as a job of one process; `ray`: on a Ray cluster of the job's nodes."""

    do: Literal["command"] = "command"
    words: tuple[str, ...]
    ray: bool = False


OF_A_STORE = (Preprocess, Survey, Write)  # done by one process without torch
KINDS: dict[str, type[Job]] = {
    kind.model_fields["do"].default: kind
    for kind in (Train, Score, ScoreOn, Predict, Command, *OF_A_STORE)
}


def parse_job(document: dict[str, Any]) -> Job:
    """The job of plain JSON. Raises InputError."""
    if (do := document.get("do")) not in KINDS:
        raise InputError(f"job: found {do!r}, expected one of: {', '.join(KINDS)}")
    try:
        return KINDS[do].model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"job: {where}: {first['msg']}; another version wrote it") from None
