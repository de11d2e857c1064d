"""The jobs of ranks, done. What each kind means says launch/job.py."""

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
from segfleet.pipeline.inference.postprocess import AUTO
from segfleet.pipeline.inference.predict import Wishes, predict_files
from segfleet.pipeline.launch.job import Predict, Score, ScoreOn, Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe, members, parse, resolve
from segfleet.pipeline.reports.board import publish
from segfleet.pipeline.reports.overlays import picture, save_overlays, save_prediction
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.run import data_of, note_data, open_run, stage_folders
from segfleet.pipeline.scoring.external import TestSet
from segfleet.pipeline.scoring.folds import score_folds
from segfleet.pipeline.scoring.score import Scorer
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.trained.loading import open_model
from segfleet.pipeline.trained.out_of_fold import decided
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.train import train
from segfleet.pipeline.training.window import Diverged
from segfleet.preprocess.stores.base import ShardStore, open_store
from segfleet.preprocess.stores.manifest import Manifest


def run_job(job: Train | Score | ScoreOn | Predict, ranks: Ranks, stop: StopRequest) -> None:
    """Do a job with ranks that have joined. Raises InputError, ModelError, Interrupted or a
    fault."""
    if isinstance(job, Predict):
        run_prediction(job, ranks, stop)
    elif isinstance(job, ScoreOn):
        score_on(job, ranks, stop)
    else:
        train_and_score(job, ranks, stop)


def train_and_score(job: Train | Score, ranks: Ranks, stop: StopRequest) -> None:
    """What is missing of a run. A file `stop` in its folder stops it in order. Raises InputError,
    ModelError, Interrupted."""
    recipe = resolve(parse(job.recipe))
    stores = Stores()
    folders = stage_folders(job.root, recipe, stores.manifest)
    check_same_run(job, folders[-1].path)
    stop.watch = folders[-1].path / "stop"
    training = job if isinstance(job, Train) else None
    if training and training.max_seconds:
        end = time.time() + training.max_seconds
        stop.deadline = min(stop.deadline or end, end)
    try:
        with ExitStack() as copies:
            if training and (place := training.stage_to):
                for folder in folders:  # scoring reads every case once
                    own = resolve(recipe, folder.index)
                    for needed in members(own) if folder.done() is None else ():
                        stores.bring(
                            needed,
                            lambda far: copies.enter_context(
                                on_node(far, place, ranks, stop, warn)
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
            if training:
                context = Context(
                    recipe=recipe,
                    stores=stores,
                    folders=folders,
                    ranks=ranks,
                    asked_to_stop=stop.asked,
                    warn=warn,
                    validate=lambda engine, settings: replace(
                        scorer, recipe=settings, store=stores(settings)
                    ).validate(engine),
                    waits=training.waits,
                    listen=Lines(print_line) if training.lines else None,
                    pause_at=training.pause_at,
                )
                train(context)
            if ranks.rank == 0:
                note_data(folders[-1].path, store.manifest)
            if recipe.task == "segment" and (training is None or training.score):
                scorer.score(folders, again=isinstance(job, Score) and job.again)
                if ranks.rank == 0:
                    score_folds(job.root, recipe, store.manifest, write_report)
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


def score_on(job: ScoreOn, ranks: Ranks, stop: StopRequest) -> Path:
    """Score a run on another store; the folder of what came out. Raises InputError, Interrupted."""
    recipe, store = parse(job.recipe), open_store(job.store)
    _, folders = open_run(job.run)
    scorer = Scorer(
        recipe=recipe, store=store, ranks=ranks, stop=stop, draw=save_overlays, report=write_report
    )
    test = TestSet(split=job.split, fold=job.fold)
    return scorer.score_on(folders, test, data_of(job.run, recipe))


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


def check_same_run(job: Train | Score, path: Path) -> None:
    """What a job continues is the run it names. Raises InputError."""
    if job.run and job.run.name != path.name:
        raise InputError(
            f"run: {job.run.name} is another run for this version of segfleet (it would be "
            f"{path.name} and begin anew): its results would differ. Go on with the version that "
            "began it, or train the recipe again"
        )


def predict(
    job: Predict,
    ranks: Ranks,
    progress: Callable[[int, int], None],
    deciding: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The answer of `predict_files` for a prediction's images; with `postprocess: auto` also what
    that does to each structure, None where nothing. `deciding`: progress of that. Raises
    InputError."""
    model = open_model(job.models, ranks.device)
    model.check()
    model.check_stores(job.images)
    auto = job.postprocess == AUTO
    rules = decided(model, ranks, deciding) if auto else model.rules(job.postprocess or None)
    with Apart() as apart:
        answer = predict_files(
            model.members(),
            model.dataset,
            job.images,
            job.out,
            device=ranks.device,
            made_by=model.made_by,
            wishes=Wishes(
                probabilities=job.probabilities,
                rules=rules,
                draw=save_prediction if job.overlays else None,
                read=lambda case: case.read_apart(apart),
                format=job.format,
                layout=job.layout,
            ),
            ranks=ranks,
            progress=progress,
        )
    if auto:
        texts = {name: rule.text for name, rule in (rules or {}).items()}
        answer["postprocess"] = {name: texts.get(name) for name in model.task.names}
    return answer


def run_prediction(job: Predict, ranks: Ranks, stop: StopRequest) -> None:
    """Raises InputError with every image that could not be segmented, when all others are."""

    def tick(done: int, total: int) -> None:
        if job.answer is None:
            print_line(f"{done} of {total} images\n")
        if stop.asked() and done < total:
            share = f"rank {ranks.rank}'s {total}" if ranks.size > 1 else total
            raise Interrupted(f"stopped after {done} of {share} images; the same command goes on")

    def deciding(done: int, total: int) -> None:
        if job.answer is None:
            print_line(f"{done} of {total} cases not trained on, for --postprocess auto\n")
        if stop.asked():
            raise Interrupted(
                f"stopped after {done} of {total} cases that decide the post-processing; the same "
                "command begins with them"
            )

    answer = predict(job, ranks, tick, deciding)
    if job.answer:  # the command that waits for it prints what came out
        if ranks.rank == 0:
            write_atomically(job.answer, json.dumps(answer))
        return
    if ranks.rank == 0:
        written, present, failed = (len(answer[key]) for key in ("done", "kept", "failed"))
        sys.stdout.write(
            f"{written} written, {present} already there, {failed} failed: {job.out}\n"
        )
    if answer["failed"]:
        lines = "\n".join(f"{failure['id']}: {failure['problem']}" for failure in answer["failed"])
        raise InputError(
            f"predict: {len(answer['failed'])} image(s) could not be segmented; all others "
            f"are\n{lines}"
        )


def print_line(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def warn(message: str) -> None:
    sys.stderr.write(f"segfleet: {message}\n")
