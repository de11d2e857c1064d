"""segfleet compare RUN RUN [...]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.options import FoldsTogether, Json, fold_of
from segfleet.cli.output import show, table


def command(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Two or more runs (a folder, the beginning of a uid, or a recipe's name), or "
            "folders that `segfleet score` or `segfleet evaluate --on` wrote. Of a recipe with "
            "several folds the score over all of them."
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric to compare, may be repeated; by default dice, nsd and hd95."),
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Compare the cases that all runs have.")
    ] = False,
    fold: FoldsTogether = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for comparison.json, .csv, .md, .tex and .html."),
    ] = None,
    root: Annotated[Path, typer.Option("--runs", help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare runs on the same cases: paired differences with intervals over patients, sign-flip
    and Wilcoxon tests with Holm's correction, ranks. The difference is the later run minus the
    earlier.
    """
    from segfleet.pipeline.reports.comparison import write_comparison
    from segfleet.pipeline.scoring.compare import DEFAULT, compare, known_metrics
    from segfleet.pipeline.scoring.folds import find_scored

    metrics = known_metrics(metric or DEFAULT)
    folders = [find_scored(text, root, fold_of(fold)) for text in runs]
    document = compare(named(folders), metrics, common)
    if out is not None:
        document["files"] = [str(path) for path in write_comparison(out, document)]
    show(document, as_json, render)


def named(folders: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(name, evaluation) of each folder; names that occur twice get what differs. Raises
    InputError."""
    from segfleet.core.errors import InputError
    from segfleet.core.files import read_json
    from segfleet.pipeline.scoring.scored import evaluation_of

    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise InputError(f"compare: {folder} is named twice; expected different runs")
    documents = [evaluation_of(folder) for folder in folders]
    plain = []
    for folder, document in zip(folders, documents, strict=True):
        recipe = read_json(folder / "recipe.json") or {}
        plain.append(str(recipe.get("name") or document.get("name") or folder.resolve().name))
    labels = [
        name if plain.count(name) == 1 else f"{name} {folder.resolve().name}"
        for name, folder in zip(plain, folders, strict=True)
    ]
    return list(zip(labels, documents, strict=True))


def render(document: dict[str, Any]) -> None:
    from segfleet.pipeline.reports.comparison import HEAD, caption, differences, means

    typer.echo(caption(document))
    table(*means(document), title="Mean (95 % interval over patients); mean rank")
    head, rows, title = HEAD, differences(document), "Paired differences"
    if len(document["runs"]) == 2:  # the same in every row
        first, second = document["runs"]
        head, title = (*HEAD[:2], *HEAD[3:]), f"Paired differences: {second} - {first}"
        rows = [(*row[:2], *row[3:]) for row in rows]
    table(head, rows, title=title)
    for path in document.get("files", ()):
        typer.echo(path)
