"""segfleet status [RUNS]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.output import Json, show, table


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
        show(status(runs), as_json, render)


def render_jobs(rows: list[dict]) -> None:
    table(
        ("what", "job", "state", "node", "starts"),
        [(r["name"], r["job"], r["state"], r["node"] or "-", r["starts"]) for r in rows],
    )
    tell_unknown(rows)
    for row in rows:
        if row["reason"] and row["queue"] != "unknown":
            typer.echo(f"\n{row['name']} is {row['state']}: {row['reason'].strip()}")


def tell_unknown(rows: list[dict]) -> None:
    """SLURM's silence is told once for all."""
    if unknown := [row for row in rows if row["queue"] == "unknown"]:
        typer.echo(
            f"\nwhat became of {len(unknown)} job(s) is unknown: {unknown[0]['reason'].strip()}"
        )


def render(rows: list[dict]) -> None:
    if not rows:
        typer.echo("no runs here; `segfleet train RECIPE` makes one")
        return
    columns = ("run", "recipe", "state", "stage", "step", "loss", "samples/s", "left", "restarts")
    table(columns, [cells(row) for row in rows])
    if jobs := [row for row in rows if row["job"]]:
        typer.echo()
        table(
            ("run", "job", "queue", "node"),
            [(row["run"], row["job"], row["queue"] or "-", row["node"] or "-") for row in jobs],
        )
    tell_unknown(rows)
    for row in rows:
        if row["reason"] and row["queue"] != "unknown":
            # a traceback is whole in --json and in `segfleet logs`
            lines = row["reason"].strip().splitlines()
            typer.echo(
                f"\n{row['run']} is {row['state']}: "
                f"{' '.join(dict.fromkeys((lines[0], lines[-1])))}"
            )


def cells(row: dict) -> tuple:
    loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
    left = (
        "-"
        if row["remaining_seconds"] is None or row["state"] != "training"
        else f"{row['remaining_seconds']} s"
    )
    steps = f"{row['step']}/{row['steps'] or '?'}"
    speed = row["samples_per_second"] or "-"
    return (
        row["run"],
        row["recipe"],
        row["state"],
        f"{row['stage']}/{row['stages']}",
        steps,
        loss,
        speed,
        left,
        row["restarts"],
    )
