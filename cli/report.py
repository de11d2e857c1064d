"""segfleet report RUN"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.options import Best, FoldsTogether, Json, Run, Runs, fold_of
from segfleet.cli.output import show


def command(
    run: Run,
    fold: FoldsTogether = None,
    best: Best = False,
    runs: Runs = Path("runs"),
    as_csv: Annotated[
        bool,
        typer.Option("--csv", help="Also RUN/cases.csv: every score of every case and structure."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's report as one HTML file and print its path."""
    from segfleet.core.files import write_atomically
    from segfleet.pipeline.reports.report import CASES_CSV, write_report
    from segfleet.pipeline.reports.score_tables import cases_csv
    from segfleet.pipeline.scoring.folds import find_scored
    from segfleet.pipeline.scoring.scored import evaluation_of

    folder = find_scored(run, runs, fold_of(fold), best)
    written = {"report": str(write_report(folder))}
    if as_csv:
        write_atomically(folder / CASES_CSV, cases_csv(evaluation_of(folder)))
        written["csv"] = str(folder / CASES_CSV)
    show(written, as_json, lambda document: typer.echo("\n".join(document.values())))
