"""segfleet report RUN"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.output import Best, Fold, Json, show


def command(
    run: Annotated[
        str, typer.Argument(help="A run folder, the beginning of its uid, or its recipe's name.")
    ],
    fold: Fold = None,
    best: Best = False,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write a run's report as one HTML file and print its path."""
    from segfleet.pipeline.reports.report import write_report
    from segfleet.pipeline.run import find_run

    show(
        {"report": str(write_report(find_run(run, runs, fold, best)))},
        as_json,
        lambda document: typer.echo(document["report"]),
    )
