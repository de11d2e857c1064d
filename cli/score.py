"""segfleet score PREDICTIONS --truth DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.evaluate import render
from segfleet.cli.options import Json
from segfleet.cli.output import progress, show


def command(
    predictions: Annotated[
        Path, typer.Argument(help="Folder of label files, of whatever tool and known format.")
    ],
    truth: Annotated[Path, typer.Option(help="Folder of the true labels, of the same names.")],
    labels: Annotated[
        str | None,
        typer.Option(
            help="What the values mean: liver=1,tumour=2. By default what dataset.json or "
            "labels.json beside the files says, else black and white masks."
        ),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out cases that have no prediction.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=1e-6, help="Of the normalised surface Dice, mm.")
    ] = 2.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the scores and their report [default: PREDICTIONS/scores]."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at most.")] = None,
    as_json: Json = False,
) -> None:
    """Score any folder of predictions against the truth: the same scores and report as of a run.
    `segfleet compare` takes the folder of scores as it takes a run."""
    from segfleet.core.files import write_atomically
    from segfleet.pipeline.reports.report import CASES_CSV, write_report
    from segfleet.pipeline.reports.score_tables import cases_csv
    from segfleet.pipeline.scoring.predictions import (
        few,
        parse_labels,
        score_predictions,
        write_scores,
    )

    with progress("scoring") as on_progress:
        document = score_predictions(
            predictions,
            truth,
            labels=parse_labels(labels),
            partial=partial,
            tolerance=tolerance,
            workers=workers,
            progress=on_progress,
        )
    for what in ("prediction", "truth"):
        if left_out := document[f"without_{what}"]:
            typer.echo(
                f"segfleet: {len(left_out)} case(s) without a {what} are not scored: "
                f"{few(left_out)}",
                err=True,
            )
    folder = write_scores(out or predictions / "scores", document)
    write_atomically(folder / CASES_CSV, cases_csv(document))
    report = str(write_report(folder))
    show({**document, "report": report}, as_json, lambda shown: (render(shown), typer.echo(report)))
