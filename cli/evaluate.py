"""segfleet evaluate RUN [evaluation.key=value ...]"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segfleet.cli.options import Best, Fold, Json, Run, Runs
from segfleet.cli.output import show, table
from segfleet.core.files import absolute

if TYPE_CHECKING:
    from segfleet.pipeline.launch.job import Score, ScoreOn
    from segfleet.pipeline.scoring.external import TestSet


def command(
    run: Run,
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Changes of the evaluation, such as evaluation.mirror=[1,2]."),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that share the cases.")
    ] = 1,
    on: Annotated[
        Path | None,
        typer.Option(
            help="Score on this store instead, a test set: all its cases, or those that --split "
            "and --fold name. The run's own score stays."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the store --on; its validation cases of --fold are scored."),
    ] = None,
    fold: Fold = None,
    best: Best = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Score a finished run on the whole cases of its validation fold, at their original resolution;
    write its report anew."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.launch.local import run_ranks
    from segfleet.pipeline.recipe import parse
    from segfleet.pipeline.run import find_run
    from segfleet.pipeline.scoring.scored import EXTERNAL, own_evaluation
    from segfleet.preprocess.stores.manifest import load_manifest

    if on is None:
        if split is not None:
            raise InputError("evaluate: --split is of the store that --on names; give both")
        job = job_of(run, changes or [], runs, fold, best)
        run_ranks(job, ranks)
        asked = parse(job.recipe)
        evaluation = own_evaluation(job.run, asked, load_manifest(Path(asked.data.store)))
        show(evaluation, as_json, render)
        return
    own_fold = fold if split is None else None  # which of several runs
    job = job_on(find_run(run, runs, own_fold, best), changes or [], on, split, fold or 0)
    run_ranks(job, ranks)
    test, manifest = job_test(job), load_manifest(on)
    document = own_evaluation(job.run, parse(job.recipe), manifest, test)
    document |= {"report": str(job.run / EXTERNAL / test.folder(manifest) / "report.html")}
    show(
        document, as_json, lambda evaluation: (render(evaluation), typer.echo(evaluation["report"]))
    )


def job_test(job: ScoreOn) -> TestSet:
    from segfleet.pipeline.scoring.external import TestSet

    return TestSet(split=job.split, fold=job.fold)


def job_on(run: Path, changes: list[str], store: Path, split: str | None, fold: int) -> ScoreOn:
    """What the ranks of an evaluation on another store do. Raises InputError if they cannot."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.launch.job import ScoreOn
    from segfleet.pipeline.recipe import override, parse
    from segfleet.pipeline.run import data_of, open_run
    from segfleet.preprocess.stores.manifest import load_manifest

    recipe, folders = open_run(run)
    for stage in folders:
        stage.check_done()
    if other := [text for text in changes if not text.startswith(("evaluation.", "data.workers"))]:
        raise InputError(
            f"evaluate: found the change '{other[0]}', expected evaluation.* or data.workers; what "
            "changes training makes another run"
        )
    changed = parse(override(recipe.model_dump(mode="json"), changes))
    settings = changed.model_dump(mode="json")
    job = ScoreOn(recipe=settings, run=run, store=absolute(store), split=split, fold=fold)
    manifest, test = load_manifest(store), job_test(job)
    test.check(changed, data_of(run, recipe), manifest)
    test.ids(manifest)
    return job


def job_of(
    run: str, changes: list[str], runs: Path, fold: int | None = None, best: bool = False
) -> Score:
    """What the ranks of an evaluation do. Raises InputError if they cannot."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.identity import differences
    from segfleet.pipeline.launch.job import Score
    from segfleet.pipeline.recipe import override, parse, with_absolute_store
    from segfleet.pipeline.run import find_run, open_run, stage_folders
    from segfleet.preprocess.stores.manifest import load_manifest

    folder = find_run(run, runs, fold, best)
    recipe, folders = open_run(folder)
    root = folders[0].path.parent
    changed = with_absolute_store(parse(override(recipe.model_dump(mode="json"), changes), run))
    there = stage_folders(root, changed, load_manifest(Path(changed.data.store)))[-1].path
    if there.resolve() != folder.resolve():
        manifest = load_manifest(Path(changed.data.store))
        for stage in folders:
            differing = differences(recipe, manifest, stage.index, stage.path) or []
            if files := [words for words in differing if words.startswith("the code of ")]:
                raise InputError(
                    f"evaluate: {' and '.join(files)} is not what this run was trained with; put "
                    "it back, or train again"
                )
        raise InputError(
            "evaluate: only evaluation.* and data.workers can be changed here; what changes "
            "training makes another run"
        )
    for stage in folders:
        stage.check_done()
    return Score(recipe=changed.model_dump(mode="json"), root=root, run=folder, again=True)


def render(document: dict) -> None:
    rows = []
    for name, scores in document["summary"]["structures"].items():
        cells = [scores[key]["mean"] for key in ("dice", "iou", "nsd", "hd95")]
        rows.append((name, *("-" if value is None else f"{value:.4f}" for value in cells)))
    table(("structure", "Dice", "IoU", "NSD", f"HD95 ({document.get('unit', 'mm')})"), rows)
    typer.echo(f"{len(document['cases'])} cases; definitions and every case: report.html")
