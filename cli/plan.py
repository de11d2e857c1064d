"""segfleet plan STORE"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import show
from segfleet.core.files import absolute
from segfleet.core.machine import cpus, threads_of, wait_as_ranks_do

if TYPE_CHECKING:
    from segfleet.pipeline.planning.planned import Planned


def command(
    store: Annotated[Path, typer.Argument(help="The store that is to be trained on.")],
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, or the memory of a GPU elsewhere: cuda:80G. Default: here."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Time of one run with its score: 30min, 8h, 2d. Default: 30min; GPU 1d."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the recipe; without, it is printed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan a recipe for STORE: network, patch, batch, rates and length, with a sentence beside
    every choice."""
    from segfleet.core.errors import InputError
    from segfleet.core.files import write_atomically

    if out is not None and out.exists():
        raise InputError(f"--out: {out} exists. Choose a new name.")
    planned = timed_plan(store, device, budget)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, planned.yaml())
    document = {
        "recipe": planned.document,
        "reasons": planned.reasons,
        "notes": list(planned.notes),
        "out": str(out) if out else None,
    }
    show(document, as_json, lambda _: render(document, planned.yaml()))


def timed_plan(store: Path, device: str | None, budget: str | None) -> Planned:
    """The plan, whose steps are timed in this process as a rank on this machine will do them."""
    wait_as_ranks_do()
    import torch

    from segfleet.pipeline.planning.planner import plan_recipe

    torch.set_num_threads(threads_of() or cpus())
    return plan_recipe(store, device, budget)


def render(document: dict[str, Any], text: str) -> None:
    if document["out"] is None:
        typer.echo(text, nl=False)
        return
    for note in document["notes"]:
        typer.echo(note)
    typer.echo(f"written to {document['out']}; next: segfleet train {document['out']}")


def frozen_plan(changes: list[str], budget: str | None, runs: Path) -> tuple[str, list[str]]:
    """The recipe that was planned for the store of `data.store=...` and this budget, planned now if
    it never was: (its file, the changes without the store). A plan is kept in RUNS/auto, so that
    the same command resumes the same run. Raises InputError."""
    from segfleet.core.errors import InputError
    from segfleet.core.files import digest_of, write_atomically
    from segfleet.preprocess.stores.manifest import load_manifest

    stores = [change.partition("=")[2] for change in changes if change.startswith("data.store=")]
    if not stores:
        raise InputError(
            "train auto: data.store is missing; name the store that is to be planned for: "
            "segfleet train auto data.store=stores/hippocampus"
        )
    wait_as_ranks_do()
    from segfleet.pipeline.planning.target import parse_budget

    seconds = parse_budget(budget) if budget else None
    manifest = load_manifest(Path(stores[-1]))
    name = f"{manifest.id[:12]}-{digest_of(seconds)[:6]}.yaml"
    path = absolute(runs) / "auto" / name
    if path.is_file():
        typer.echo(f"segfleet: going on with the plan {path}", err=True)
    else:
        typer.echo("segfleet: planning, a few steps are timed", err=True)
        planned = timed_plan(Path(stores[-1]), None, budget)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, planned.yaml())
        for note in planned.notes:
            typer.echo(f"segfleet: {note}", err=True)
        typer.echo(f"segfleet: the recipe with its reasons: {path}", err=True)
    return str(path), changes
