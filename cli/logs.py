"""segfleet logs RUN"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.options import Json, Runs, Submitted
from segfleet.cli.output import show
from segfleet.core.files import read_file, regular


def command(
    run: Submitted,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="One rank; by default all, each line with its rank if there are several."
        ),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Print what the ranks of a submitted run have printed, over all restarts."""
    from segfleet.core.errors import InputError
    from segfleet.slurm.job import jobs_of, look_at_all
    from segfleet.slurm.jobspec import JobSpec
    from segfleet.slurm.poll import Pace
    from segfleet.slurm.submission import find_home

    jobs = jobs_of(find_home(run, runs))
    # legal in the version that submitted it
    count = JobSpec.model_construct(**jobs[-1].submission.spec).ranks
    if rank is not None and rank >= count:
        raise InputError(f"--rank: found {rank}, expected 0 to {count - 1}")
    ranks = range(count) if rank is None else [rank]
    logs = {
        job.label or str(number): job.submission.log(number) for job in jobs for number in ranks
    }
    if as_json:
        show(
            {
                "run": jobs[-1].submission.folder,
                "ranks": {name: text_of(path) for name, path in logs.items()},
            },
            True,
            print,
        )
        return
    tails = [Tail(path, f"{name}: " if len(logs) > 1 else "") for name, path in logs.items()]
    reported, pace, states = False, Pace(), []
    ends = [job.submission.outcome() for job in jobs]
    while True:
        if follow and ends != (ends := [job.submission.outcome() for job in jobs]):
            pace.hurry()
        if follow and pace.is_due():
            states = [status for _, status in look_at_all(jobs, pace.interval / 2)]
            pace.looked(states)
        over = not any(status.open for status in states)
        silent = next((status.reason for status in states if status.state == "unknown"), None)
        if silent and not reported:
            sys.stderr.write(
                f"segfleet: {silent}; whether the job still runs is unknown, waiting\n"
            )
        reported = bool(silent)
        for tail in tails:
            tail.copy(last=over)
        sys.stdout.flush()
        if over:
            return
        time.sleep(1)


def text_of(path: Path) -> str:
    return read_file(path).decode(errors="replace") if path.exists() else ""


class Tail:
    """Copies what was added to a file since the last look, whole lines with a prefix."""

    def __init__(self, path: Path, prefix: str):
        self.path, self.prefix, self.offset = path, prefix, 0

    def copy(self, last: bool) -> None:
        try:
            with open(self.path, "rb", opener=regular) as file:
                file.seek(self.offset)
                new = file.read()
        except (FileNotFoundError, ValueError):
            return
        if not last:
            new = new[: new.rfind(b"\n") + 1]
        self.offset += len(new)
        for line in new.decode(errors="replace").splitlines():
            sys.stdout.write(f"{self.prefix}{line}\n")
