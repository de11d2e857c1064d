"""segfleet cancel RUN"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.output import Json, show


def command(
    run: Annotated[str, typer.Argument(help="A run folder, the beginning of its uid, or its recipe's name.")],
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Cancel a submitted run. Its ranks save first, so `segfleet resume` goes on where it stopped."""
    from segfleet.pipeline.run import find_run
    from segfleet.slurm.slurm_job import attach

    job = attach(find_run(run, runs))
    before = job.state()
    job.cancel()
    document = {"run": str(job.run), "job": job.id, "before": before, "cancelled": before in ("queued", "running")}
    show(document, as_json, render)


def render(document: dict) -> None:
    name = Path(document["run"]).name
    if document["cancelled"]:
        typer.echo(f"job {document['job']} of run {name} was {document['before']} and is cancelled; `segfleet resume {name}` goes on")
    else:
        typer.echo(f"run {name} is {document['before']}; nothing to cancel")
