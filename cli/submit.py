"""segfleet submit RECIPE [key=value ...]; segfleet submit -- preprocess | evaluate | predict | sweep ...
(submit_words.py)"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.output import Json, show, table
from segfleet.core.files import absolute


def command(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe file or the name of a shipped recipe. Or -- and a command."),
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes of the recipe, key.path=value.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Profile in ./clusters.yaml or ~/.config/segfleet/clusters.yaml."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.")] = None,
    gpus_per_node: Annotated[
        str | None,
        typer.Option(help="GPUs of every node, 4 or a100:4; one rank for each."),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs of the whole job, 8 or a100:8, on as few nodes as it takes."),
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks of every node, on CPUs.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPU cores per rank.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per node, for example 64G.")] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Time limit: minutes, 12h, 1d6h, 12:00:00, 1-06:00:00; the job comes back."
        ),
    ] = None,
    clusters: Annotated[
        str | None, typer.Option(help="Another cluster behind this login node, as sbatch -M.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features a node must have.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes that must not be used.")] = None,
    nodelist: Annotated[str | None, typer.Option(help="Nodes that must be used.")] = None,
    reservation: Annotated[str | None, typer.Option(help="Reservation.")] = None,
    mail: Annotated[str | None, typer.Option(help="Mail address.")] = None,
    mail_on: Annotated[
        str | None, typer.Option(help="When to write: END,FAIL and others of SLURM's words.")
    ] = None,
    dependency: Annotated[
        str | None, typer.Option(help="SLURM's own words: afterok:123, singleton.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="A run that must be done first.")] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(help="One run for each value, as data.fold=0..4; or N jobs of preprocess."),
    ] = None,
    throttle: Annotated[
        int | None, typer.Option(help="Members of the array that may run at once.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="A further option of sbatch, for example --sbatch=--licenses=x."),
    ] = None,
    srun: Annotated[
        list[str] | None, typer.Option(help="An option of srun, for example --srun=--mpi=none.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="A shell line run before the ranks start.")
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="Command that runs what follows it in a container.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="Python on the nodes.")] = None,
    stage_to: Annotated[
        str | None,
        typer.Option(
            help="Read the store from a copy on every node's disk: a folder, or '$TMPDIR'."
        ),
    ] = None,
    warning: Annotated[
        int | None, typer.Option(help="Seconds before the time limit at which the ranks save.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Short for engine.name=...")] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Run the code as it is when the job starts, not as it is now."),
    ] = False,
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
) -> None:
    """Submit RECIPE to SLURM. The job saves and comes back by itself after time limits, preemption
    and node failures.

    After --, one of the commands preprocess, evaluate, predict and sweep with all its words: it is checked
    now, and done by SLURM.
    """
    given = dict(locals())
    from segfleet.cli import submit_words
    from segfleet.core.errors import InputError
    from segfleet.slurm import prepare
    from segfleet.slurm.cluster import settled
    from segfleet.slurm.job import refuse_if_active
    from segfleet.slurm.jobspec import JobSpec, make_spec, not_obeyed
    from segfleet.slurm.submitit_launcher import SlurmLauncher

    root = absolute(runs)
    options = {
        name: given[name] for name in JobSpec.model_fields if given.get(name) not in (None, [])
    }
    if after and dependency:
        raise InputError("--after and --dependency say the same twice; give one")
    options |= {"dependency": dependency_on(after, root)} if after else {}
    if ignored := not_obeyed():
        typer.echo(
            f"segfleet: {', '.join(ignored)} of the environment is not obeyed; give it as "
            "--sbatch=--option=value",
            err=True,
        )
    if recipe in submit_words.COMMANDS:
        submit_words.submit([recipe, *(changes or [])], options, given)
        return
    spec = settled(make_spec(options, cluster))
    changes = [*(changes or []), *([f"engine.name={engine}"] if engine else [])]
    chosen, open_ones = {}, {}
    for more in prepare.members(array or []):
        for made, run in prepare.prepare(recipe, [*changes, *more], root):
            chosen[run] = prepare.describe(made)
            if not prepare.finished(run, made):
                open_ones[run] = chosen[run]
    if not dry_run:
        refuse_if_active(*open_ones)
    if check and open_ones:
        from segfleet.slurm.preflight import check_recipes

        for sentence in check_recipes(list(open_ones.values()), spec.ranks):
            typer.echo(f"segfleet: {sentence}", err=True)
    launcher = SlurmLauncher(live=live)
    if dry_run:
        document = rehearse(launcher, list(open_ones or chosen), root, spec)
        show(document, as_json, render_script)
        return
    jobs = (
        {job.run: job for job in launcher.submit_array(list(open_ones.items()), root, spec)}
        if open_ones
        else {}
    )
    rows = [row(run, jobs.get(run)) for run in chosen]
    show(rows if array or len(rows) > 1 else rows[0], as_json, lambda _: render(rows))


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
    kept = job.submission
    return {
        "run": str(run),
        "state": "queued",
        "job": job.id,
        "log": str(kept.log(0)),
        "code": kept.code,
        "commit": kept.commit,
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
    [(_, found)] = look_at_all([job], poll.moment())
    if (state := found["state"]) == "unknown":
        raise InputError(
            f"--after: whether run {run.name} will be done is unknown; {found['reason']}"
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
