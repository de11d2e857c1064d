"""segfleet cancel RUN"""

from __future__ import annotations

from pathlib import Path

import typer

from segfleet.cli.options import Json, Runs, Submitted
from segfleet.cli.output import show


def command(
    run: Submitted,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Cancel a submitted run. Its ranks save first, so `segfleet resume` goes on where it
    stopped. A sweep stops all its stages."""
    from segfleet.pipeline.launch.job import Command
    from segfleet.slurm import job as slurm_job
    from segfleet.slurm.submission import find_home

    home = find_home(run, runs)
    looked = slurm_job.look_at_all(slurm_job.jobs_of(home))
    job, last = looked[-1]
    if isinstance(job.submission.job(), Command) and last.state == "running":
        # it is asked, not killed: only it knows the jobs of its stages
        home.with_name(home.name.removesuffix(".jobs")).joinpath("stop").touch()
        active = [job.id]
    else:
        active = slurm_job.cancel(looked)
    before = "running" if any(status.state == "running" for _, status in looked) else last.state
    document = {
        "run": str(home),
        "job": job.id,
        "before": before,
        "cancelled": bool(active),
        "jobs": active,
    }
    show(document, as_json, render)


def render(document: dict) -> None:
    name = Path(document["run"]).name
    jobs, again = document["jobs"], f"`segfleet resume {name}`"
    if name.endswith(".jobs"):
        name, again = name.removesuffix(".jobs"), "the same submission"
    if document["cancelled"]:
        typer.echo(
            f"job {', '.join(jobs)} of {name} was {document['before']} and is cancelled; {again} "
            "goes on"
        )
    else:
        typer.echo(f"{name} is {document['before']}; nothing to cancel")
