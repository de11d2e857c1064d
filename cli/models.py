"""`segfleet models`: the registered networks and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import show, table


def command(
    name: Annotated[
        str | None, typer.Argument(help="One network: its stages, options and source.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Registered networks: parameters, multiply-adds, input rules. With NAME: parameters per stage,
    options, memory, source."""
    from segfleet.models.registry import broken, spec, specs

    if name is None:
        for sentence in broken():
            typer.echo(f"segfleet: {sentence}", err=True)
        from segfleet.models.profile import profile

        show([summary(one, profile(one)) for one in specs().values()], as_json, render_all)
    else:
        show(details(spec(name)), as_json, render_one)


def summary(chosen, costs) -> dict[str, Any]:
    """One row: all at the published input, channels and classes."""
    return {
        "name": chosen.name,
        "dims": list(chosen.dims),
        "parameters": chosen.parameters,
        "gmac": round(costs.macs / 1e9, 3),
        "input": list(chosen.paper_input),
        "in_channels": chosen.in_channels,
        "classes": chosen.num_classes,
        "divisor": [chosen.divisor] * len(chosen.paper_input)
        if isinstance(chosen.divisor, int)
        else list(chosen.divisor),
        "fixed_patch": chosen.fixed_patch,
        "deep_supervision": chosen.deep_supervision,
    }


def details(chosen) -> dict[str, Any]:
    from segfleet.models.profile import profile
    from segfleet.models.registry import legal_options

    costs = profile(chosen, batch=1)
    return summary(chosen, costs) | {
        "about": chosen.about,
        "source": chosen.source,
        "options": legal_options(chosen),
        "training_bytes": costs.peak_bytes,
        "stages": costs.stages,
    }


def render_all(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("name", "dims", "parameters", "GMAC", "at", "step", "deep")
    table(columns, [(r["name"], *_cells(r)) for r in rows])
    typer.echo(
        "GMAC: one forward at batch 1. step: sizes must be multiples of it. deep: deep supervision."
    )


def render_one(model: dict[str, Any]) -> None:
    dims, parameters, gmac, size, rule, deep = _cells(model)
    lines = {
        "about": model["about"],
        "source": model["source"],
        "input": f"{model['in_channels']} channel(s), {dims}, size "
        + ("fixed when built" if rule == "fixed" else f"in steps of {rule}"),
        "output": f"{model['classes']} class(es), deep supervision: {deep}",
        "parameters": f"{parameters:,}",
        "multiply-adds": f"{gmac} G at {size}, batch 1, forward",
        "training memory": f"{model['training_bytes'] / 2**20:,.0f} MiB at {size}, batch 1, fp32, "
        "without optimizer state",
        "options": ", ".join(model["options"]) or "none",
    }
    table((model["name"], ""), list(lines.items()))
    table(("stage", "parameters"), list(model["stages"].items()))


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    dims = "/".join(f"{d}D" for d in row["dims"])
    by = row["divisor"]
    rule = (
        "fixed"
        if row["fixed_patch"]
        else str(by[0])
        if len(set(by)) == 1
        else "x".join(map(str, by))
    )
    return (
        dims,
        row["parameters"],
        row["gmac"],
        "x".join(map(str, row["input"])),
        rule,
        "yes" if row["deep_supervision"] else "no",
    )
