"""What a group of ranks can be asked to do, as plain JSON. Launchers carry the job, every rank runs
it.

{"do": "train", "recipe": {...}, "root": "runs"}: train what is missing of every stage, then score
it;
    "max_seconds": 3600 stops in order after that time, a file `stop` in the run folder at once;
    "score": false leaves the scoring out; "lines": true prints steps and validations; "waits": true
    waits for a stage that another run trains, since members of an array start together and nobody
    starts a refused one again. "stage_to": "$TMPDIR" reads the store from a copy there,
    variables as the node has them. How data are reached changes no result.
{"do": "score", ...}: only score; "again": true, even if it is scored already.
{"do": "score on", "recipe": {...}, "run": "runs/...", "store": "stores/...", "split": null,
"fold": 0}: score a finished run on the cases of another store.
{"do": "predict", "models": ["runs/...", ...], "images": [...], "out": "predictions"}: segment images
with a finished run, several as an ensemble, or a model file; "probabilities": true keeps these,
"postprocess": auto, largest or min-size=N; "layout": {"name", "options"} of images that are raw
data sets. "answer": a file for what came out, said by nobody else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import write_atomically
from segfleet.core.parallel import Apart
from segfleet.pipeline.data.staged_store import on_node
from segfleet.pipeline.events import Lines
from segfleet.pipeline.folds import score_folds
from segfleet.pipeline.inference.postprocess import AUTO
from segfleet.pipeline.inference.predict import Wishes, predict_files
from segfleet.pipeline.loading import open_model
from segfleet.pipeline.out_of_fold import decided
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe, members, parse, resolve
from segfleet.pipeline.reports.board import publish
from segfleet.pipeline.reports.overlays import picture, save_overlays, save_prediction
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.run import data_of, note_data, open_run, stage_folders
from segfleet.pipeline.scoring.external import TestSet
from segfleet.pipeline.scoring.score import Scorer
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.training.train import Run, train
from segfleet.pipeline.training.window import Diverged
from segfleet.preprocess.stores.base import ShardStore, open_store
from segfleet.preprocess.stores.manifest import Manifest

JOBS = ("train", "score", "score on", "predict")


def run_job(job: dict[str, Any], ranks: Ranks, stop: StopRequest) -> None:
    """Do a job with ranks that have joined. Raises InputError, ModelError, Interrupted or a
    fault."""
    if job["do"] not in JOBS:
        raise InputError(f"job: found '{job['do']}', expected one of: {', '.join(JOBS)}")
    if job["do"] == "predict":
        run_prediction(job, ranks, stop)
        return
    if job["do"] == "score on":
        score_on(job, ranks, stop)
        return
    recipe = resolve(parse(job["recipe"]))
    stores = Stores()
    folders = stage_folders(Path(job["root"]), recipe, stores.manifest)
    check_same_run(job, folders[-1].path)
    stop.watch = folders[-1].path / "stop"
    if job.get("max_seconds"):
        end = time.time() + job["max_seconds"]
        stop.deadline = min(stop.deadline or end, end)
    try:
        with ExitStack() as copies:
            if job["do"] == "train" and job.get("stage_to"):
                for folder in folders:  # scoring reads every case once
                    own = resolve(recipe, folder.index)
                    for one in members(own) if folder.done() is None else ():
                        stores.bring(
                            one,
                            lambda far: copies.enter_context(
                                on_node(far, job["stage_to"], ranks, stop, warn)
                            ),
                        )
            store = stores(recipe)
            scorer = Scorer(
                recipe=recipe,
                store=store,
                ranks=ranks,
                stop=stop,
                draw=save_overlays,
                report=publish_all,
                picture=picture,
                leaf=folders[-1].path,
            )
            if job["do"] == "train":
                parts = {
                    "folders": folders,
                    "ranks": ranks,
                    "asked_to_stop": stop.asked,
                    "warn": warn,
                    "validate": lambda engine, settings: replace(
                        scorer, recipe=settings, store=stores(settings)
                    ).validate(engine),
                    "listen": Lines(say) if job.get("lines") else None,
                    "pause_at": job.get("pause_at"),
                }
                train(Run(recipe=recipe, stores=stores, waits=job.get("waits", False), **parts))
            if ranks.rank == 0:
                note_data(folders[-1].path, store.manifest)
            if job.get("score", True) and recipe.task == "segment":
                scorer.score(folders, again=job.get("again", False))
                if ranks.rank == 0:
                    score_folds(Path(job["root"]), recipe, store.manifest)
                ranks.barrier()
    except Interrupted as stopped:  # on all ranks
        if file := ranks.share(stop.obeyed() if ranks.rank == 0 else None):
            raise Interrupted(
                f"{str(stopped).rstrip('.')}. It was asked to by the file {file}, which is "
                "removed now."
            ) from None
        raise
    except FloatingPointError as error:
        # of a whole case: what the network says of it is not finite
        raise Diverged(
            f"{error}. Lower stages.lr, or set optimizer.clip=1 or engine.precision=fp32, and "
            "train again."
        ) from None


def publish_all(run: Path) -> None:
    """What people look at of a scored run."""
    write_report(run)
    publish(run, warn)


def score_on(job: dict[str, Any], ranks: Ranks, stop: StopRequest) -> Path:
    """Score a run on another store; the folder of what came out. Raises InputError, Interrupted."""
    run, recipe, store = Path(job["run"]), parse(job["recipe"]), open_store(job["store"])
    _, folders = open_run(run)
    scorer = Scorer(
        recipe=recipe, store=store, ranks=ranks, stop=stop, draw=save_overlays, report=write_report
    )
    test = TestSet(split=job["split"], fold=job["fold"])
    return scorer.score_on(folders, test, data_of(run, recipe))


class Stores:
    """The stores of a run's stages, each opened once."""

    def __init__(self) -> None:
        self.opened: dict[str, ShardStore] = {}

    def __call__(self, settings: Recipe) -> ShardStore:
        name = settings.data.store
        if name not in self.opened:
            self.opened[name] = open_store(name)
        return self.opened[name]

    def manifest(self, settings: Recipe) -> Manifest:
        return self(settings).manifest

    def bring(self, settings: Recipe, nearer: Callable[[ShardStore], ShardStore]) -> None:
        """From now on read a copy instead."""
        far = self(settings)
        if far.root == Path(settings.data.store):
            self.opened[settings.data.store] = nearer(far)


def check_same_run(job: dict[str, Any], path: Path) -> None:
    """What a job continues is the run it names. Raises InputError."""
    if "run" in job and Path(job["run"]).name != path.name:
        raise InputError(
            f"run: {Path(job['run']).name} is another run for this version of segfleet (it would be "
            f"{path.name} and begin anew): its results would differ. Go on with the version that "
            "began it, or train the recipe again"
        )


def predict(
    job: dict[str, Any], ranks: Ranks, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The answer of `predict_files` for a prediction's images. Raises InputError."""
    model = open_model([Path(path) for path in job["models"]], ranks.device)
    model.check()
    model.check_stores(job["images"])
    text = job.get("postprocess")
    rules = decided(model, ranks) if text == AUTO else model.rules(text or None)
    with Apart() as apart:
        return predict_files(
            model.members(),
            model.dataset,
            job["images"],
            job["out"],
            device=ranks.device,
            made_by=model.made_by,
            wishes=Wishes(
                probabilities=job.get("probabilities", False),
                rules=rules,
                draw=save_prediction if job.get("overlays") else None,
                read=lambda one: one.read_apart(apart),
                format=job.get("format", ""),
                layout=job.get("layout"),
            ),
            ranks=ranks,
            progress=progress,
        )


def run_prediction(job: dict[str, Any], ranks: Ranks, stop: StopRequest) -> None:
    """Raises InputError with every image that could not be segmented, when all others are."""

    quiet = "answer" in job

    def tick(done: int, total: int) -> None:
        if not quiet:
            say(f"{done} of {total} images\n")
        if stop.asked() and done < total:
            raise Interrupted(f"stopped after {done} of {total} images; the same command goes on")

    answer = predict(job, ranks, tick)
    if quiet:  # whoever waits for it says what came out
        if ranks.rank == 0:
            write_atomically(Path(job["answer"]), json.dumps(answer))
        return
    if ranks.rank == 0:
        written, kept, failed = (len(answer[key]) for key in ("done", "kept", "failed"))
        sys.stdout.write(
            f"{written} written, {kept} already there, {failed} failed: {job['out']}\n"
        )
    if answer["failed"]:
        lines = "\n".join(f"{one['id']}: {one['problem']}" for one in answer["failed"])
        raise InputError(
            f"predict: {len(answer['failed'])} image(s) could not be segmented; all others "
            f"are\n{lines}"
        )


def say(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def warn(message: str) -> None:
    sys.stderr.write(f"segfleet: {message}\n")
