"""The stores of a sweep that are missing: made here, or as arrays of SLURM jobs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from segfleet.cli.sweep_stores import MEMBERS, lacking, missing, preprocess_words
from segfleet.core.errors import InputError
from segfleet.core.files import absolute

if TYPE_CHECKING:
    from segfleet.preprocess.building.request import BuildRequest
    from segfleet.slurm.job import SlurmJob
    from segfleet.sweeps.space.space import Search

OF_RANKS = ("gpus", "gpu_type", "stage_to", "whole_nodes")  # of a job; preprocessing has none


def prepare(
    search: Search,
    on: str,
    dry_run: bool,
    options: dict[str, Any] | None = None,
    runs: Path = Path("runs"),
) -> None:
    """Make the stores of a space that are missing; with `on` slurm as jobs, and wait for them.
    `options`: of a stage's jobs, see `job_options`. Raises InputError, also if nothing is to be
    written, and Interrupted."""
    from segfleet.cli.preprocess import bars
    from segfleet.preprocess.building.build import build

    if dry_run and (absent := lacking(search)):
        section = search.space.prepare
        lines = "\n".join(
            "  " + preprocess_words(section, out, settings) for out, settings in absent
        )
        raise InputError(
            f"sweep {search.space.name}: prepare: {len(absent)} store(s) are missing. The command "
            f"without --dry-run makes them, with --on slurm as these jobs:\n{lines}"
        )
    requests = missing(search)
    if on == "slurm" and requests:
        from segfleet.sweeps.slurm_backend import await_stores

        name = f"sweep {search.space.name}: prepare"
        await_stores(send_all(requests, options or {}, absolute(runs)), name)
        return
    for request in requests:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        typer.echo(f"segfleet: makes the store {request.out}", err=True)
        with bars({}) as on_progress:
            build(request, progress=on_progress)


def send_all(
    requests: Sequence[BuildRequest], options: dict[str, Any], root: Path
) -> dict[Path, list[SlurmJob]]:
    """The jobs that make every store: those that an earlier command submitted and that have not
    ended, else new ones."""
    from segfleet.cli.submit_words import ONE_PROCESS, send, shares_of
    from segfleet.slurm import cluster
    from segfleet.slurm.job import jobs_of, look_at_all
    from segfleet.slurm.jobspec import make_spec
    from segfleet.slurm.submission import home_of
    from segfleet.slurm.submitit_launcher import SlurmLauncher, without_bad_nodes

    wanted = {
        key: value for key, value in (options.get("spec") or {}).items() if key not in OF_RANKS
    }
    spec = make_spec({**wanted, **ONE_PROCESS}, options.get("cluster"))
    spec = spec.model_copy(update={"cpus": spec.cpus or 1})
    jobs: dict[Path, list[SlurmJob]] = {}
    checked = False
    for request in requests:
        whole = replace(request, raw=absolute(request.raw), out=absolute(request.out))
        home = home_of(whole.out)
        with suppress(InputError):  # none was ever submitted
            earlier = jobs_of(home)
            if any(status.open for _, status in look_at_all(earlier)):
                jobs[whole.out] = earlier
                continue
        if not checked:
            cluster.check(without_bad_nodes(spec, root))
            checked = True
        home.parent.mkdir(parents=True, exist_ok=True)
        send(SlurmLauncher(), shares_of(whole, MEMBERS), home, root, spec)
        jobs[whole.out] = jobs_of(home)
        typer.echo(f"segfleet: submitted the jobs that make the store {request.out}", err=True)
    return jobs
