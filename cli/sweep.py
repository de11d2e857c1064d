"""segfleet sweep SPACE [key=value ...] and segfleet sweep status SPACE"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.options import Json, Runs
from segfleet.cli.output import progress, show, table

MOST_LINES = 60  # of a tree that is printed for people


class Code(StrEnum):
    frozen = "frozen"
    current = "current"


def command(
    space: Annotated[
        str,
        typer.Argument(
            help="A space file or the name of a shipped space; or `status` and then one of these."
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes of the base recipe, key.path=value.")
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            help="Where trials run: local, slurm (every stage a job), or ray-in-slurm (one job, "
            "with a Ray cluster of its own over its nodes)."
        ),
    ] = "local",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="With --on ray-in-slurm: nodes of the job.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stages trained at a time; by default what GPUs, or else cores, allow."
        ),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that train one stage together; with --on slurm the job says it."
        ),
    ] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="With --on slurm: a profile of clusters.yaml.")
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            help="With --on slurm or ray-in-slurm: a field of the job, gpus_per_node=4. Repeatable."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A running Ray cluster; by default Ray starts here for this sweep alone."
        ),
    ] = None,
    runs: Runs = Path("runs"),
    code: Annotated[
        Code | None,
        typer.Option(
            help="After segfleet has changed since the sweep began: continue with the code that it "
            "began with, or with the current one."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the tree and what it costs; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train every schedule of SPACE, each common beginning once; rank them. The same command
    continues or does nothing."""
    from segfleet.cli.submit_words import job_options
    from segfleet.sweeps.space.load import load_search
    from segfleet.sweeps.space.plan import foreign, make_plan

    words = changes or []
    asking = space == "status"
    if asking:
        if not words:
            raise typer.BadParameter("segfleet sweep status SPACE")
        space, *words = words
    if on == "ray-in-slurm" and not asking:
        from segfleet.cli import submit_words
        from segfleet.cli.submit import Request

        whole = ["sweep", space, *words, "--on", on, "--ranks", str(ranks)]
        for name, value in (
            ("slots", slots),
            ("nodes", nodes),
            ("code", code),
            ("address", address),
        ):
            whole += [f"--{name}", str(value)] if value is not None else []
        request = Request(
            options=job_options(cluster, resource)["spec"],
            cluster=cluster,
            dry_run=dry_run,
            runs=runs,
            as_json=as_json,
        )
        submit_words.submit(whole, request)
        return
    if nodes:
        raise typer.BadParameter(
            "--nodes is for --on ray-in-slurm; with --on slurm: --resource nodes="
        )
    # jobs are waited for by a small process: what takes torch is done in another one
    apart = on == "slurm" and not (asking or dry_run)
    search = load_search(space, words)
    if search.space.prepare and not asking:
        from segfleet.cli.sweep_prepare import prepare

        prepare(search, on, dry_run, job_options(cluster, resource), runs)
    plan = make_plan(search, runs, build=not asking and not apart)
    if apart:
        plan.warnings = checked_apart(space, words, runs)
    if asking:
        show(standing(plan), as_json, render_standing)
        return
    from segfleet.sweeps.run import Resources, frozen_elsewhere, run_sweep

    if code == Code.frozen and (before := frozen_elsewhere(plan)):
        start_again_with(before)
    resources = Resources(
        slots=slots, ranks=ranks, on=on, address=address, options=job_options(cluster, resource)
    )
    if dry_run:
        resources.check()
        document = forecast(plan, resources.at_once)
        document["warnings"] += [fault] if (fault := foreign(plan)) else []
        show(document, as_json, render_forecast)
        return
    from segfleet.sweeps.results.outcome import write_outcome

    warn(plan.warnings)
    with progress("epochs") as on_progress:
        ledger = run_sweep(plan, resources, on_progress, current=code == Code.current)
    document = write_outcome(plan, ledger)
    show(
        {**document, "folder": str(plan.folder), "report": str(plan.folder / "report.html")},
        as_json,
        render,
    )
    if document["failed"]:
        raise typer.Exit(1)


def checked_apart(space: str, words: list[str], runs: Path) -> list[str]:
    """The warnings of a plan whose networks are built in another process. Raises InputError."""
    from segfleet.core.parallel import Apart

    with Apart() as apart:
        return apart(warnings_of, space, words, runs)


def warnings_of(space: str, words: list[str], runs: Path) -> list[str]:
    from segfleet.sweeps.space.load import load_search
    from segfleet.sweeps.space.plan import make_plan

    return make_plan(load_search(space, words), runs).warnings


def start_again_with(code: Path) -> None:
    """This very command, run by another version of segfleet."""
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "segfleet.cli.main", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


def warn(lines: list[str]) -> None:
    for line in lines:
        typer.echo(f"segfleet: {line}", err=True)


def forecast(plan: Any, slots: int) -> dict[str, Any]:
    """What --dry-run prints."""
    from segfleet.sweeps.results.estimate import estimate
    from segfleet.sweeps.results.ledger import Ledger

    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    nodes = [describe(plan, ledger, node) for node in plan.tree.walk()]
    notes = (
        []
        if plan.search.planned
        else [
            "its points come one after another; what is shown is what earlier runs of it have "
            "asked for"
        ]
    )
    document = {
        "sweep": plan.search.space.name,
        "folder": str(plan.folder),
        **estimate(plan, slots),
    }
    return {**document, "warnings": [*plan.warnings, *notes], "tree": nodes}


def describe(plan: Any, ledger: Any, node: Any) -> dict[str, Any]:
    tree, stage = plan.tree, node.stage
    depth, above = 0, tree.before(node)
    while above:
        depth, above = depth + 1, tree.before(above)
    return {
        "uid": node.uid, "after": node.after, "trunk": node.trunk is not None, "depth": depth,
        "stage": node.index + 1, "name": stage.name,
        "model": node.recipe.model.name, "seed": node.recipe.seed, "fold": node.recipe.data.fold,
        "task": node.recipe.task, "store": node.recipe.data.store, "lr": stage.lr,
        "epochs": stage.epochs,
        "epochs_to_train": tree.epochs(node), "remaining_epochs": tree.remaining[node.uid],
        "trials": node.trials, "leaf_of": node.leaf_of,
        "state": ledger.state(node), "path": str(ledger.path(node)),
    }  # fmt: skip


def render_forecast(document: dict[str, Any]) -> None:
    warn(document["warnings"])
    several = len({node["store"] for node in document["tree"]}) > 1
    for node in document["tree"][:MOST_LINES]:
        continues = (
            f" (goes on from {node['epochs'] - node['epochs_to_train']})" if node["trunk"] else ""
        )
        role = (
            f"{node['model']} seed {node['seed']} fold {node['fold']}  "
            if not node["depth"]
            else ""
        )
        on = f" on {Path(node['store']).name}" if several else ""
        on += " (reconstruct)" if node["task"] == "reconstruct" else ""
        shared = f"  for {len(node['trials'])} trials" if len(node["trials"]) > 1 else ""
        ends = f"  ends {len(node['leaf_of'])} trial(s)" if node["leaf_of"] else ""
        line = (
            f"{node['uid']}  {role}{node['name']}{on}: {node['epochs']} epochs{continues}, lr "
            f"{node['lr']:g}{shared}{ends}  {node['state']}"
        )
        typer.echo("  " * node["depth"] + line)
    if len(document["tree"]) > MOST_LINES:
        typer.echo(f"... {len(document['tree']) - MOST_LINES} more; --json prints all")
    hours, disk = document["hours"], document["disk_bytes"]
    typer.echo(
        f"{document['trials']} trials, {document['nodes']} stages to train instead of "
        f"{document['stage_trainings_naive']}\n"
        f"{document['epochs_shared']:,} epochs instead of {document['epochs_naive']:,}: "
        f"{document['ratio']:.2f} times fewer\n"
        f"{document['nodes_missing']} stages and {document['epochs_missing']:,} epochs are missing"
        + (
            f", about {hours:.1f} hours"
            if hours is not None
            else "; no past run tells how long they take"
        )
        + f"\nabout {disk / 1e9:.2f} GB of checkpoints in {document['folder']}"
    )


def standing(plan: Any) -> dict[str, Any]:
    """What `status` prints: every node's state, from disk alone."""
    from segfleet.pipeline.reports.status import run_status
    from segfleet.sweeps.results.ledger import Ledger

    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    nodes = [describe(plan, ledger, node) for node in plan.tree.walk()]
    for row in nodes:
        if row["state"] == "running" and (Path(row["path"]) / "recipe.json").exists():
            status = run_status(Path(row["path"]))
            row |= {"step": status.step, "steps": status.steps, "loss": status.loss}
    states = [node["state"] for node in nodes]
    return {
        "sweep": plan.search.space.name,
        "folder": str(plan.folder),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "epochs_done": ledger.epochs_done(),
        "epochs": plan.tree.shared_epochs,
        "nodes": nodes,
    }


def render_standing(document: dict[str, Any]) -> None:
    rows = [
        (
            node["uid"],
            node["model"],
            node["stage"],
            node["epochs"],
            f"{node['lr']:g}",
            node["state"],
            f"{node.get('step', '')}",
        )
        for node in document["nodes"]
    ]
    table(("stage", "model", "number", "epochs", "lr", "state", "step"), rows)
    counts = ", ".join(f"{count} {state}" for state, count in document["states"].items())
    typer.echo(
        f"{document['epochs_done']:,} of {document['epochs']:,} epochs; "
        f"{counts or 'nothing was planned yet'}"
    )


def render(document: dict[str, Any]) -> None:
    if document["unranked"]:
        typer.echo(f"{document['standing']}; the best is the best of these")
    first, *others = document["objectives"]
    rows = [
        (
            row["rank"],
            row["name"],
            number(row["score"]),
            interval(row["ci95"]),
            *(number(row["values"][name]) for name in others),
            *(["*" if row["front"] == 1 and not row["violates"] else ""] if others else []),
            *([", ".join(row["violates"])] if document["constraints"] else []),
        )
        for row in document["ranking"]
    ]
    head = ("rank", "point", "Dice" if first == "dice" else first, "95 % interval", *others)
    table(
        (*head, *(["front"] if others else []), *(["violates"] if document["constraints"] else [])),
        rows,
    )
    if document["ranking"] and not document["best"]:
        typer.echo("no point keeps the constraints", err=True)
    for row in document["unranked"][:MOST_LINES]:
        typer.echo(f"no rank {row['name']}: {row['reason']}", err=True)
    if gains := document.get("learning"):
        render_gains(gains, "Dice" if first == "dice" else first)
    savings = document["savings"]
    left = savings["epochs_left_out"]
    typer.echo(
        f"{savings['epochs_trained']:,} epochs trained instead of {savings['epochs_naive']:,}"
        + (f"; {left:,} left out by stopping early" if left else "")
        + f"\nreport  {document['report']}"
    )
    if document["best"]:
        typer.echo(f"best    {document['folder']}/best.yaml")


def render_gains(learning: dict[str, Any], measure: str) -> None:
    """What one way of beginning adds to another, at each number of labelled cases."""
    several = learning["axis"] is not None
    rows = []
    for row in learning["rows"]:
        gain = row["gain"]
        rows.append(
            (
                row["way"],
                *(["all" if row["cases"] is None else str(row["cases"])] if several else []),
                number(row["score"]),
                "" if gain is None else f"{gain['mean']:+.4f}",
                "" if gain is None else interval(gain["ci95"]),
            )
        )
    head = ("way", *(["cases"] if several else []), measure, "gain", "95 % interval")
    table(head, rows, title=f"Gains over {learning['reference']}, paired by case")


def number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def interval(bounds: list[float] | None) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
