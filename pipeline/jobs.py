"""What a gang can be asked to do, as plain JSON. Launchers carry the job, every rank runs it.

{"do": "train", "recipe": {...}, "root": "runs"}: train what is missing of every stage, then score it;
    "max_seconds": 3600 stops in order after that time; "score": false leaves the scoring out.
    "stage_to": "$TMPDIR" reads the store from a copy there, variables as the node has them. How data are reached changes no result.
{"do": "score", ...}: only score; "again": true, even if it is scored already.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from segfleet.pipeline import gang as gangs
from segfleet.pipeline.local_store import on_node
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.run import stage_folders
from segfleet.pipeline.score import Scorer
from segfleet.pipeline.stop import StopRequest
from segfleet.pipeline.train import Run, train
from segfleet.preprocess.problems import InputError
from segfleet.preprocess.stores.base import open_store

JOBS = ("train", "score")


def run_job(job: dict[str, Any], gang: gangs.Gang, stop: StopRequest) -> None:
    """Do a job with a gang that has met. Raises InputError, ModelError, Interrupted or a fault."""
    if job["do"] not in JOBS:
        raise InputError(f"job: found '{job['do']}', expected one of: {', '.join(JOBS)}")
    recipe = parse(job["recipe"])
    store = open_store(recipe.data.store)
    folders = stage_folders(Path(job["root"]), recipe, store.manifest)
    stop.watch = folders[-1].path / "stop"
    if job.get("max_seconds"):
        stop.deadline = time.time() + job["max_seconds"]
    near = job.get("stage_to") if job["do"] == "train" and folders[-1].done() is None else None  # scoring reads every case once
    with on_node(store, near, gang, stop, warn) if near else nullcontext(store) as store:
        scorer = Scorer(recipe=recipe, store=store, gang=gang, stop=stop)
        if job["do"] == "train":
            parts = {"folders": folders, "gang": gang, "asked_to_stop": stop.asked, "warn": warn, "validate": scorer.validate}
            train(Run(recipe=recipe, store=store, **parts))
        if job.get("score", True):
            scorer.score(folders, again=job.get("again", False))


def warn(message: str) -> None:
    sys.stderr.write(f"segfleet: {message}\n")
