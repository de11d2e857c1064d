"""segfleet status [RUNS]"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import duration, show, table

if TYPE_CHECKING:
    from segfleet.pipeline.reports.status import Row


def command(
    runs: Annotated[
        Path,
        typer.Argument(
            help="Folder of all runs; or a store or predictions whose jobs were submitted."
        ),
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show every run under RUNS: state, stage, step, loss, speed, remaining time, restarts; for
    submitted ones job, node and reason."""
    from segfleet.slurm.status import jobs, status
    from segfleet.slurm.submission import home_of

    if (home_of(runs) / "slurm").is_dir():
        show(jobs(home_of(runs)), as_json, render_jobs)
    else:
        rows = status(runs)
        show([asdict(row) for row in rows], as_json, lambda _: render(rows))


def render_jobs(rows: list[dict]) -> None:
    table(
        ("what", "job", "state", "node", "starts"),
        [(r["name"], r["job"], r["state"], r["node"] or "-", r["starts"]) for r in rows],
    )
    report_unknown([row["reason"] for row in rows if row["queue"] == "unknown"])
    for row in rows:
        if row["reason"] and row["queue"] != "unknown":
            typer.echo(f"\n{row['name']} is {row['state']}: {row['reason'].strip()}")


def report_unknown(reasons: list[str]) -> None:
    """SLURM's silence is reported once for all."""
    if reasons:
        typer.echo(f"\nwhat became of {len(reasons)} job(s) is unknown: {reasons[0].strip()}")


def render(rows: list[Row]) -> None:
    if not rows:
        typer.echo("no runs here; `segfleet train RECIPE` makes one")
        return
    from segfleet.pipeline.reports.status import families

    grouped = families(rows)
    together = {group["family"] for group in grouped}
    columns = ("run", "recipe", "fold", "state", "stage", "Dice", "date")
    whole = ("run", "fold", "state", "stage", "date")
    if alone := [row for row in rows if row.family not in together]:
        table(columns, [cells(row) for row in alone], whole=whole)
    if grouped:
        if alone:
            typer.echo()
        columns = ("runs", "recipe", "folds", "Dice", "of each fold")
        table(columns, [fold_cells(group) for group in grouped], whole=("runs", "folds", "Dice"))
    if going := [row for row in rows if row.state not in ("done", "trained", "unreadable")]:
        typer.echo()
        columns = ("run", "step", "loss", "samples/s", "left", "restarts")
        table(columns, [progress_cells(row) for row in going])
    if jobs := [row for row in rows if row.job]:
        typer.echo()
        table(
            ("run", "job", "queue", "node"),
            [(short(row), row.job, row.queue or "-", row.node or "-") for row in jobs],
        )
    report_unknown([row.reason or "" for row in rows if row.queue == "unknown"])
    for row in rows:
        if row.reason and row.queue != "unknown":
            # a traceback is whole in --json and in `segfleet logs`
            lines = row.reason.strip().splitlines()
            typer.echo(
                f"\n{row.run} is {row.state}: {' '.join(dict.fromkeys((lines[0], lines[-1])))}"
            )


def short(row: Row) -> str:
    """The beginning of a uid, which every command takes."""
    return row.run[:8]


def cells(row: Row) -> tuple:
    fold = "-" if row.fold is None else str(row.fold)
    score = "-" if row.score is None else f"{row.score:.4f}"
    stage = f"{row.stage}/{row.stages}"
    date = row.date[len("2026-") :] if row.date else "-"  # with the year in --json
    return short(row), row.recipe, fold, row.state, stage, score, date


def fold_cells(group: dict) -> tuple:
    """One line for the folds of a recipe."""
    done = sum(state == "done" for state in group["states"])
    first, count = group["runs"][0][:8], len(group["folds"])
    score = "-" if group["score"] is None else f"{group['score']:.4f}"
    folds = " ".join("-" if dice is None else f"{dice:.3f}" for dice in group["scores"])
    return f"{first} +{count - 1}", group["recipe"], f"{done}/{count} done", score, folds


def progress_cells(row: Row) -> tuple:
    loss = "-" if row.loss is None else f"{row.loss:.4f}"
    estimated = row.remaining_seconds is not None and row.state == "training"
    left = duration(row.remaining_seconds) if estimated else "-"
    steps = f"{row.step}/{row.steps or '?'}"
    return short(row), steps, loss, str(row.samples_per_second or "-"), left, row.restarts
