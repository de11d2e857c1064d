"""segfleet submit [options] -- preprocess | evaluate | predict | sweep ...: the ordinary command,
checked here and done by SLURM."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from segfleet.cli.output import show, table
from segfleet.core.files import absolute

if TYPE_CHECKING:
    from segfleet.cli.submit import Request
    from segfleet.core.job import Job
    from segfleet.preprocess.building.request import BuildRequest

COMMANDS = ("preprocess", "evaluate", "predict", "sweep")
RAY_IN_SLURM = "ray-in-slurm"
ONE_PROCESS = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1}
Step = tuple[str, list["Job"]]  # name, jobs: one, or an array


def submit(words: list[str], request: Request) -> None:
    """Check a command and have SLURM do it. Raises InputError."""
    from segfleet.core.errors import InputError
    from segfleet.slurm import cluster
    from segfleet.slurm.job import refuse_if_active
    from segfleet.slurm.jobspec import make_spec
    from segfleet.slurm.submitit_launcher import SlurmLauncher, are_shares, without_bad_nodes

    name, root, options = words[0], absolute(request.runs), request.options
    arguments = parse(name, words[1:], request.runs)
    if request.engine:
        raise InputError(f"--engine: is chosen for a training, not for {name}")
    launcher = SlurmLauncher(live=request.live)
    if name == "preprocess":
        steps, home = preprocessing(arguments, request.array)
        if wrong := [key for key in ONE_PROCESS if key in options]:
            option = wrong[0].replace("_", "-")
            raise InputError(
                f"--{option}: a job of preprocess is one process; --array N shares the cases, "
                "--cpus gives each cores"
            )
        spec = make_spec({**options, **ONE_PROCESS}, request.cluster)
        spec = spec.model_copy(update={"cpus": spec.cpus or arguments["workers"] or 1})
    elif name == "sweep":
        if request.array:
            raise InputError("--array: a sweep is one job; its --slots are jobs at a time")
        steps, home, options = sweeping(arguments, words, options)
        spec = cluster.settled(make_spec(options, request.cluster or arguments["cluster"]))
    else:
        if request.array:
            raise InputError(
                f"--array: {name} shares its cases among the ranks of one job; ask for --nodes "
                "and ranks instead"
            )
        steps, home, root = (evaluation if name == "evaluate" else prediction)(arguments)
        spec = cluster.settled(make_spec(options, request.cluster))
    as_json = request.as_json or arguments["as_json"]
    if request.dry_run:
        resources = zip(steps, chained(steps, spec), strict=True)
        scripts = [
            launcher.script(home, root, step_spec, len(jobs), title, are_shares(jobs))
            for (title, jobs), step_spec in resources
        ]
        if cluster.there_is_one():
            cluster.check(without_bad_nodes(spec, root))
        document = {
            "scripts": scripts,
            "controller": [line for script in scripts for line in cluster.ask(script)],
        }
        show(document, as_json, render_scripts)
        return
    if steps:
        refuse_if_active(home)
        if name == "preprocess":
            refuse_if_locked(arguments["out"])
        home.parent.mkdir(parents=True, exist_ok=True)
        cluster.check(without_bad_nodes(spec, root))
    show(send(launcher, steps, home, root, spec), as_json, render)


def parse(name: str, words: list[str], runs: Path) -> dict[str, Any]:
    """The command's arguments, read as the command itself reads them. Typer's own error for what it
    cannot read."""
    command = importlib.import_module(f"segfleet.cli.{name}").command
    parsed: dict[str, Any] = {}
    reader = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    reader.command(name=name)(
        functools.wraps(command)(lambda **arguments: parsed.update(arguments))
    )
    # the words' own --runs comes last and wins
    whole = words if name == "preprocess" else ["--runs", str(runs), *words]
    code = typer.main.get_command(reader).main(
        whole, prog_name=f"segfleet {name}", standalone_mode=False
    )
    if not parsed:  # --help
        raise typer.Exit(code or 0)
    return parsed


def preprocessing(arguments: dict[str, Any], array: Sequence[str]) -> tuple[list[Step], Path]:
    """The jobs that make a store: one, or with an array of N members who survey, N who write, and
    one that does the rest and publishes."""
    from segfleet.cli.preprocess import request_of
    from segfleet.core.errors import InputError
    from segfleet.preprocess.building.request import Preprocess
    from segfleet.preprocess.stores.manifest import is_published
    from segfleet.slurm.submission import home_of

    places = {key: absolute(path) for key in ("raw", "out") if (path := arguments[key])}
    if array and not (len(array) == 1 and array[0].isdecimal() and int(array[0]) > 0):
        raise InputError(
            f"--array: found '{' '.join(array)}', expected the number of jobs that share the "
            "cases, for example 8"
        )
    request = request_of(**{**arguments, **places})
    out, home = request.out, home_of(request.out)
    if is_published(out):
        return [], home
    if not array:
        whole = Preprocess(store=request, verify=arguments["verify"])
        return [(title("preprocess", out), [whole])], home
    return shares_of(request, int(array[0]), arguments["verify"]), home


def shares_of(request: BuildRequest, members: int, verify: bool = False) -> list[Step]:
    """The jobs of so many members who make a store together."""
    from segfleet.preprocess.building.request import Preprocess, Survey, Write
    from segfleet.preprocess.readers.base import open_reader

    out = request.out
    cases = len(open_reader(request.reader_name, request.raw, **request.options).refs())
    count = min(members, cases)
    shares = [(member, count) for member in range(count)]
    return [
        (title("survey", out), [Survey(store=request, share=share) for share in shares]),
        (title("write", out), [Write(store=request, share=share) for share in shares]),
        (title("publish", out), [Preprocess(store=request, verify=verify)]),
    ]


def refuse_if_locked(out: Path) -> None:
    """Raises InputError if a process of this or another node is making the store."""
    from segfleet.preprocess.building.lock import locked

    partial = out.with_name(out.name + ".partial")
    if partial.exists():  # or asking would make it, and leave it behind when the job is refused
        with locked(partial, out, shared=True):
            pass


def evaluation(arguments: dict[str, Any]) -> tuple[list[Step], Path, Path]:
    from segfleet.cli.evaluate import job_of
    from segfleet.core.errors import InputError

    if arguments["ranks"] != 1:
        raise InputError(
            "--ranks: a job has nodes x gpus-per-node ranks; say --gpus-per-node or "
            "--ranks-per-node before the --"
        )
    selection = (arguments["runs"], arguments["fold"], arguments["best"])
    job = job_of(arguments["run"], arguments["changes"] or [], *selection)
    return [(title("evaluate", job.run), [job])], job.run, job.root


def prediction(arguments: dict[str, Any]) -> tuple[list[Step], Path, Path]:
    from segfleet.cli.predict import checked_rule, job_of, layout_of
    from segfleet.core.errors import InputError
    from segfleet.slurm.submission import home_of

    if arguments["device"]:
        raise InputError(
            "--device: is for this machine; a job has what it asks for, --gpus-per-node 0 the CPUs"
        )
    out, root = absolute(arguments["out"]), absolute(arguments["runs"])
    job = job_of(
        arguments["words"], arguments["runs"], arguments["fold"], arguments["best"], out=out,
        root=root,
        layout=layout_of(arguments["layout"], arguments["option"]),
        postprocess=checked_rule(arguments["postprocess"]),
        **{name: arguments[name] for name in ("format", "overlays", "probabilities")},
    )  # fmt: skip
    job = job.model_copy(update={"images": tuple(map(absolute, job.images))})
    return [(title("predict", out), [job])], home_of(out), root


def sweeping(
    arguments: dict[str, Any], words: list[str], options: dict[str, Any]
) -> tuple[list[Step], Path, dict[str, Any]]:
    """The job of a whole sweep. With --on slurm it only waits for its stages' jobs: one process.
    Else its ranks run inside it, and it has one task with all of a node's GPUs."""
    from segfleet.cli.sweep_stores import missing
    from segfleet.core.errors import InputError
    from segfleet.pipeline.launch.job import Command
    from segfleet.slurm.submission import home_of
    from segfleet.sweeps.run import Resources, foreign
    from segfleet.sweeps.space.load import load_search
    from segfleet.sweeps.space.plan import make_plan, unplanned

    if arguments["space"] == "status" or arguments["dry_run"]:
        raise InputError("submit: sweep status and --dry-run ask; run them here")
    search = load_search(arguments["space"], arguments["changes"] or [])
    # without its stores nothing can be planned here; the job makes them
    plan = (unplanned if missing(search) else make_plan)(search, arguments["runs"])
    if fault := foreign(plan):
        raise InputError(fault)
    Resources(
        slots=arguments["slots"],
        ranks=arguments["ranks"],
        on="local" if arguments["on"] == RAY_IN_SLURM else arguments["on"],
        address=arguments["address"],
        options=job_options(arguments["cluster"], arguments["resource"]),
    ).check()
    if arguments["on"] == "slurm":
        if options.get("gpus_per_node"):
            raise InputError(
                "--gpus-per-node: the job of a sweep --on slurm only waits; after the --, say what "
                "its stages get: --resource gpus_per_node=4"
            )
    elif arguments["on"] == RAY_IN_SLURM:
        return on_ray(arguments, options, plan)
    elif options.get("nodes", 1) != 1 or options.get("gpus_per_node") not in (None, 0):
        raise InputError(
            "submit: a sweep inside one job runs on the CPUs of one node (--cpus); for GPUs and "
            "more "
            f"nodes say --on {RAY_IN_SLURM} after the --, or let every stage be a job: --on slurm"
        )
    options = {**options, **ONE_PROCESS}
    space = Path(arguments["space"])
    words = [
        str(absolute(space)) if word == arguments["space"] and space.is_file() else word
        for word in words
    ]
    job = Command(words=(*words, "--runs", str(plan.runs)))
    return [(title("sweep", plan.folder), [job])], home_of(plan.folder), options


def job_options(cluster: str | None, resources: list[str] | None) -> dict[str, Any]:
    """{"cluster": ..., "spec": fields of a JobSpec} from the command line."""
    from segfleet.core.settings import override, text_keys
    from segfleet.slurm.jobspec import JobSpec

    spec = override({}, resources or [], text_keys(JobSpec), "--resource")
    return {"cluster": cluster, "spec": spec}


def on_ray(
    arguments: dict[str, Any], options: dict[str, Any], plan: Any
) -> tuple[list[Step], Path, dict[str, Any]]:
    """The job of a sweep on a Ray cluster of its own: one process of every node."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.launch.job import Command
    from segfleet.slurm.submission import home_of

    if arguments["address"]:
        raise InputError(f"sweep: --address and --on {RAY_IN_SLURM} are two clusters; give one")
    nodes = {"nodes": arguments["nodes"]} if arguments["nodes"] else {}
    space = Path(arguments["space"])
    words = ["sweep", str(absolute(space)) if space.is_file() else arguments["space"]]
    words += arguments["changes"] or []
    words += ["--ranks", str(arguments["ranks"]), "--runs", str(plan.runs)]
    words += ["--slots", str(arguments["slots"])] if arguments["slots"] else []
    words += ["--code", arguments["code"].value] if arguments["code"] else []
    job = Command(words=tuple(words), ray=True)
    spec = job_options(None, arguments["resource"])["spec"]
    options = {**spec, **options, **nodes, "whole_nodes": True}
    return [(title("sweep", plan.folder), [job])], home_of(plan.folder), options


def title(what: str, out: Path) -> str:
    return f"segfleet-{what}-{re.sub(r'[^A-Za-z0-9._-]', '_', out.name)}"


def chained(steps: list[Step], spec) -> list[Any]:
    """The resources of every step; each but the first waits until all of the one before have ended,
    however that was."""
    waits = [spec.dependency, *(f"afterany:<{name}>" for name, _ in steps)]
    return [
        spec.model_copy(update={"dependency": wait}) for wait, _ in zip(waits, steps, strict=False)
    ]


def send(launcher, steps: list[Step], home: Path, root: Path, spec) -> dict[str, Any]:
    """Submit all steps or none."""
    from segfleet.slurm import cluster

    sent: list[Any] = []
    try:
        for name, jobs in steps:
            members = [(home, job.model_copy(update={"root": root})) for job in jobs]
            before = tuple(Path(earlier.submission.folder).name for earlier in sent)
            sent += (
                accepted := launcher.submit_jobs(
                    members, root, spec, name, home / "logs", before=before
                )
            )
            arrays = [job.id.partition("_")[0] for job in accepted]  # more than one, if split
            spec = spec.model_copy(
                update={"dependency": "afterany:" + ":".join(dict.fromkeys(arrays))}
            )
    except BaseException:
        if sent:
            ids = dict.fromkeys(job.id.partition("_")[0] for job in sent)
            cluster.call("scancel", *ids, of=spec.clusters)
        raise
    out = str(home.with_suffix("")) if home.suffix == ".jobs" else str(home)
    rows = [
        {"name": job.submission.name, "job": job.id, "log": str(job.submission.log(0))}
        for job in sent
    ]
    return {
        "out": out,
        "state": "queued" if sent else "done",
        "job": None,
        "log": None,
        **(rows[-1] if rows else {}),
        "jobs": rows,
    }


def render(document: dict) -> None:
    out = document["out"]
    if not document["jobs"]:
        typer.echo(
            f"{out} is a finished store; `segfleet preprocess` without submit compares it with "
            "the raw files"
        )
        return
    table(("job", "id"), [(row["name"], row["job"]) for row in document["jobs"]])
    typer.echo(
        f"`segfleet status {out}` shows the jobs, `segfleet logs {out} -f` what they print, "
        f"`segfleet cancel {out}` ends them"
    )


def render_scripts(document: dict) -> None:
    typer.echo("\n".join([*document["scripts"], *(f"# {line}" for line in document["controller"])]))
