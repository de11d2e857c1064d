"""segfleet submit RECIPE [key=value ...]; segfleet submit -- preprocess | evaluate | predict |
sweep ... (submit_words.py)"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.options import Changes, Json, Live
from segfleet.cli.output import show, table
from segfleet.core.files import absolute
from segfleet.slurm.jobspec import JobSpec, make_spec, not_obeyed

TYPED = ("gpus_per_node",)  # a number, or one with a type: a100:4
IN_A_PROFILE = ("gpu_type", "whole_nodes", "fruitless")  # no option of the command line


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to submit, beside the resources of a JobSpec."""

    options: dict[str, Any]  # fields of a JobSpec that the command line gives
    cluster: str | None = None  # a profile
    array: tuple[str, ...] = ()
    engine: str | None = None
    live: bool = False
    dry_run: bool = False
    runs: Path
    as_json: bool = False


def with_resources(function: Callable[..., None]) -> Callable[..., None]:
    """In place of `**resources` an option for every field of a JobSpec, with the field's
    description as its help."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())[:-1]
    options = []
    for name, field in JobSpec.model_fields.items():
        if name in IN_A_PROFILE:
            continue
        kinds = kinds_of(field.annotation)
        number = int in kinds and str not in kinds and name not in TYPED
        kind: Any = list[str] if tuple in kinds else int if number else str
        description = field.description or ""
        help = f"{description[:1].upper()}{description[1:]}."
        options.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, typer.Option(help=help)],
            )
        )
    place = next(i for i, parameter in enumerate(own) if parameter.name == "cluster") + 1
    every = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    function.__signature__ = inspect.Signature([*every[:place], *options, *every[place:]])  # type: ignore[attr-defined]
    function.__annotations__ = {}  # Typer reads the signature
    return function


def kinds_of(annotation: Any) -> set[Any]:
    """int, str, tuple, ... of a field's type, whatever stands around them."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kinds_of(parts[0])
    if origin in (types.UnionType, typing.Union):
        return set().union(*map(kinds_of, parts))
    return {origin or annotation}


@with_resources
def command(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe file or the name of a shipped recipe. Or -- and a command."),
    ],
    changes: Changes = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Profile in ./clusters.yaml or ~/.config/segfleet/clusters.yaml."),
    ] = None,
    after: Annotated[str | None, typer.Option(help="A run that must be done first.")] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(help="One run for each value, as data.fold=0..4; or N jobs of preprocess."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Short for engine.name=...")] = None,
    live: Live = False,
    check: Annotated[
        bool,
        typer.Option(help="Build the network once here, to find mistakes before the job waits."),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the sbatch script and, if there is a controller, ask it."
        ),
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of all runs; all nodes must see it.")] = Path(
        "runs"
    ),
    as_json: Json = False,
    **resources: Any,
) -> None:
    """Submit RECIPE to SLURM. The job saves and comes back by itself after time limits, preemption
    and node failures.

    After --, one of the commands preprocess, evaluate, predict and sweep with all its words: it is
    checked now, and done by SLURM.
    """
    from segfleet.cli import submit_words
    from segfleet.core.errors import InputError

    options = {name: value for name, value in resources.items() if value not in (None, [])}
    if after and "dependency" in options:
        raise InputError("--after and --dependency say the same twice; give one")
    options |= {"dependency": dependency_on(after, absolute(runs))} if after else {}
    if ignored := not_obeyed():
        typer.echo(
            f"segfleet: {', '.join(ignored)} of the environment is not obeyed; give it as "
            "--sbatch=--option=value",
            err=True,
        )
    request = Request(
        options=options, cluster=cluster, array=tuple(array or ()), engine=engine, live=live,
        dry_run=dry_run,
        runs=runs, as_json=as_json,
    )  # fmt: skip
    if recipe in submit_words.COMMANDS:
        submit_words.submit([recipe, *(changes or [])], request)
    else:
        submit_training(recipe, changes or [], request, check)


def submit_training(recipe: str, changes: list[str], request: Request, check: bool) -> None:
    """One run, or an array of several; `check`: build their networks once. Raises InputError."""
    from segfleet.slurm import prepare
    from segfleet.slurm.cluster import fed, settled
    from segfleet.slurm.job import refuse_if_active
    from segfleet.slurm.submitit_launcher import SlurmLauncher

    root, spec = absolute(request.runs), settled(make_spec(request.options, request.cluster))
    changes = [*changes, *([f"engine.name={request.engine}"] if request.engine else [])]
    chosen, open_ones = {}, {}
    for member in prepare.members(list(request.array)):
        for member_recipe, run in prepare.prepare(recipe, [*changes, *member], root):
            chosen[run] = prepare.describe(member_recipe)
            if not prepare.finished(run, member_recipe):
                open_ones[run] = chosen[run]
    spec = fed(spec, [description["data"]["workers"] for description in chosen.values()])
    if not request.dry_run:
        refuse_if_active(*open_ones)
    if check and open_ones:
        from segfleet.slurm.preflight import check_recipes

        for sentence in check_recipes(list(open_ones.values()), spec.ranks):
            typer.echo(f"segfleet: {sentence}", err=True)
    launcher = SlurmLauncher(live=request.live)
    if request.dry_run:
        document = rehearse(launcher, list(open_ones or chosen), root, spec)
        show(document, request.as_json, render_script)
        return
    jobs = (
        {job.run: job for job in launcher.submit_array(list(open_ones.items()), root, spec)}
        if open_ones
        else {}
    )
    rows = [row(run, jobs.get(run)) for run in chosen]
    several = request.array or len(rows) > 1
    show(rows if several else rows[0], request.as_json, lambda _: render(rows))


def row(run: Path, job: Any) -> dict[str, Any]:
    if job is None:
        return {
            "run": str(run),
            "state": "done",
            "job": None,
            "log": None,
            "code": None,
            "commit": None,
        }
    submission = job.submission
    return {
        "run": str(run),
        "state": "queued",
        "job": job.id,
        "log": str(submission.log(0)),
        "code": submission.code,
        "commit": submission.commit,
    }


def render(rows: list[dict]) -> None:
    table(
        ("run", "state", "job"),
        [(Path(row["run"]).name, row["state"], row["job"] or "-") for row in rows],
    )
    if first := next((row for row in rows if row["job"]), None):
        typer.echo(
            f"`segfleet status` shows all runs, `segfleet logs {Path(first['run']).name} -f` what "
            "this one prints"
        )


def render_script(document: dict) -> None:
    typer.echo("\n".join([document["script"], *(f"# {line}" for line in document["controller"])]))


def dependency_on(after: str, root: Path) -> str | None:
    """SLURM's words for: when that run is done. None if it is."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.run import find_run, open_run
    from segfleet.slurm import poll, prepare
    from segfleet.slurm.job import attach, look_at_all

    run = find_run(after, root)
    if prepare.finished(run, open_run(run)[0]):
        return None
    job = attach(run)
    [(_, status)] = look_at_all([job], poll.moment())
    if (state := status.state) == "unknown":
        raise InputError(
            f"--after: whether run {run.name} will be done is unknown; {status.reason}"
        )
    if state not in ("queued", "running"):
        raise InputError(
            f"--after: run {run.name} is {state}, so it would never be done; `segfleet resume "
            f"{run.name}` first"
        )
    return f"afterok:{job.id}"


def rehearse(launcher, chosen: list[Path], root: Path, spec) -> dict[str, Any]:
    """The script, and what the controller says to it."""
    from segfleet.slurm import cluster

    script = launcher.script(chosen[0], root, spec, len(chosen))
    if cluster.there_is_one():
        cluster.check(spec)
    return {
        "script": script,
        "controller": cluster.ask(script),
        "runs": [str(run) for run in chosen],
    }
