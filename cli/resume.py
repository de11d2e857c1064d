"""segfleet resume RUN"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segfleet.cli.options import Json, Live, Run, Runs
from segfleet.cli.output import show

if TYPE_CHECKING:
    from segfleet.pipeline.launch.job import Score, Train


def command(
    run: Run,
    time: Annotated[str | None, typer.Option(help="Another time limit.")] = None,
    partition: Annotated[str | None, typer.Option(help="Another partition.")] = None,
    memory: Annotated[str | None, typer.Option(help="Another amount of memory.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes that must not be used.")] = None,
    live: Live = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Submit a run once more, with the recipe and resources it had and the code as it is now. It
    resumes from its latest checkpoint."""
    changes = {
        "time": time,
        "partition": partition,
        "memory": memory,
        "exclude": exclude,
        "dependency": None,
    }
    from segfleet.cli.submit import render, row
    from segfleet.core.errors import InputError
    from segfleet.pipeline.launch.job import Predict, Score, Train
    from segfleet.pipeline.recipe import parse
    from segfleet.pipeline.run import DONE
    from segfleet.slurm import cluster, prepare
    from segfleet.slurm.job import attach, refuse_if_active
    from segfleet.slurm.jobspec import make_spec
    from segfleet.slurm.submission import find_home
    from segfleet.slurm.submitit_launcher import SlurmLauncher, job_name, without_bad_nodes

    folder = find_home(run, runs)
    last = attach(folder)
    before, job = last.submission, last.submission.job()
    if not isinstance(job, Train | Score | Predict):
        raise InputError(
            "resume: give the same `segfleet submit ... -- preprocess ...` again; it goes on "
            "where it stopped"
        )
    if isinstance(job, Train):  # a stage inside a sweep is not scored
        whole = job.score and prepare.finished(folder, parse(job.recipe))
        over = whole or (not job.score and (folder / DONE).exists())
    else:
        over = before.outcome()[0] == "done"
    if over:
        document = row(folder, None)
    else:
        refuse_if_active(folder)
        if not isinstance(job, Predict):
            refuse_if_another(folder, job, before.code)
        earlier = {
            name: value
            for name, value in before.spec.items()
            if value is not None and name != "dependency"
        }
        spec = make_spec(
            {**earlier, **{name: value for name, value in changes.items() if value is not None}},
            places=(),
        )
        launcher, root = SlurmLauncher(live=live), job.root
        cluster.check(without_bad_nodes(spec, root))
        # not that of the array it was in
        name = job_name([folder]) if isinstance(job, Train) else before.name
        sweep = before.settings().sweep  # a sweep knows the job of its stage by it
        accepted = launcher.submit_jobs([(folder, job)], root, spec, name, folder, sweep=sweep)
        document = row(folder, accepted[0])
    show(document, as_json, lambda document: render([document]))


def refuse_if_another(run: Path, job: Train | Score, code: str | None) -> None:
    """What is resumed is the run that was named. Raises InputError if this version of the code, or
    the store as it is now, would make another run of its recipe."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.recipe import parse, resolve
    from segfleet.pipeline.run import root_of, stage_folders
    from segfleet.preprocess.stores.manifest import load_manifest

    recipe = resolve(parse(job.recipe))
    manifest = load_manifest(Path(recipe.data.store))
    there = stage_folders(job.root, recipe, manifest)[-1].path
    if there.name != run.name:
        hint = f" It is kept in {code}: put that first on PYTHONPATH." if code else ""
        raise InputError(
            f"resume: {run.name} was begun by another version of segfleet or on another store, and "
            f"would be trained from the beginning as {there.name}, with other results. Resume it "
            f"with the version that began it.{hint} Or submit its recipe again"
        )
    if there.resolve() != run.resolve():
        raise InputError(
            f"resume: {run.name} was submitted in {job.root} and lies in {run} now; submit its "
            f"recipe again with --runs {root_of(run, recipe)}: it goes on from its latest "
            "checkpoint"
        )
