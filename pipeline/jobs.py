"""What a gang can be asked to do, as plain JSON. Launchers carry the job, every rank runs it.

{"do": "train", "recipe": {...}, "root": "runs"}: train what is missing of every stage, then score it;
    "max_seconds": 3600 stops in order after that time, a file `stop` in the run folder at once; "score": false leaves the scoring out.
    "stage_to": "$TMPDIR" reads the store from a copy there, variables as the node has them. How data are reached changes no result.
{"do": "score", ...}: only score; "again": true, even if it is scored already.
{"do": "predict", "run": "runs/...", "images": [...], "out": "predictions"}: segment images with a finished run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from segfleet.pipeline import gang as gangs
from segfleet.pipeline.local_store import on_node
from segfleet.pipeline.parts import patch_of
from segfleet.pipeline.predict import predict_files
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.run import open_run, stage_folders
from segfleet.pipeline.score import Scorer, forward_of, load_network
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.train import Diverged, Run, train
from segfleet.preprocess.manifest import load_manifest
from segfleet.preprocess.problems import InputError
from segfleet.preprocess.stores.base import open_store

JOBS = ("train", "score", "predict")


def run_job(job: dict[str, Any], gang: gangs.Gang, stop: StopRequest) -> None:
    """Do a job with a gang that has met. Raises InputError, ModelError, Interrupted or a fault."""
    if job["do"] not in JOBS:
        raise InputError(f"job: found '{job['do']}', expected one of: {', '.join(JOBS)}")
    if job["do"] == "predict":
        run_prediction(job, gang, stop)
        return
    recipe = parse(job["recipe"])
    store = open_store(recipe.data.store)
    folders = stage_folders(Path(job["root"]), recipe, store.manifest)
    stop.watch = folders[-1].path / "stop"
    if job.get("max_seconds"):
        end = time.time() + job["max_seconds"]
        stop.deadline = min(stop.deadline or end, end)
    near = job.get("stage_to") if job["do"] == "train" and folders[-1].done() is None else None  # scoring reads every case once
    try:
        with on_node(store, near, gang, stop, warn) if near else nullcontext(store) as store:
            scorer = Scorer(recipe=recipe, store=store, gang=gang, stop=stop)
            if job["do"] == "train":
                parts = {"folders": folders, "gang": gang, "asked_to_stop": stop.asked, "warn": warn, "validate": scorer.validate}
                # Members of an array start together; nobody is there to start a refused one again.
                train(Run(recipe=recipe, store=store, waits="SLURM_JOB_ID" in os.environ, **parts))
            if job.get("score", True):
                scorer.score(folders, again=job.get("again", False))
    except Interrupted as stopped:  # on all ranks
        if file := gang.share(stop.obeyed() if gang.rank == 0 else None):
            raise Interrupted(f"{str(stopped).rstrip('.')}. It was asked to by the file {file}, which is removed now.") from None
        raise
    except FloatingPointError as error:  # of a whole case: what the network says of it is not finite
        raise Diverged(f"{error}. Lower stages.lr, or set optimizer.clip=1 or engine.precision=fp32, and train again.") from None


def predict(job: dict[str, Any], gang: gangs.Gang, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The answer of `predict_files` for a prediction's images. Raises InputError."""
    recipe, folders = open_run(Path(job["run"]))
    manifest = load_manifest(Path(recipe.data.store))
    model, task, name = load_network(recipe, manifest, folders, gang.device)
    return predict_files(
        forward_of(model, task, recipe, gang.device),
        manifest.plan,
        manifest.dataset,
        task,
        job["images"],
        job["out"],
        patch=patch_of(recipe, manifest),
        overlap=recipe.evaluation.overlap,
        mirror_axes=recipe.evaluation.mirror,
        batch=recipe.evaluation.batch,
        device=gang.device,
        made_by=f"{folders[-1].path.name} {name}",
        gang=gang,
        progress=progress,
    )


def run_prediction(job: dict[str, Any], gang: gangs.Gang, stop: StopRequest) -> None:
    """Raises InputError with every image that could not be segmented, when all others are."""

    def tick(done: int, total: int) -> None:
        sys.stdout.write(f"{done} of {total} images\n")
        sys.stdout.flush()
        if stop.asked() and done < total:
            raise Interrupted(f"stopped after {done} of {total} images; the same command goes on")

    answer = predict(job, gang, tick)
    if gang.rank == 0:
        written, kept, failed = (len(answer[key]) for key in ("done", "kept", "failed"))
        sys.stdout.write(f"{written} written, {kept} already there, {failed} failed: {job['out']}\n")
    if answer["failed"]:
        lines = "\n".join(f"{one['id']}: {one['problem']}" for one in answer["failed"])
        raise InputError(f"predict: {len(answer['failed'])} image(s) could not be segmented; all others are\n{lines}")


def warn(message: str) -> None:
    sys.stderr.write(f"segfleet: {message}\n")
