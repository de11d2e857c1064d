"""segfleet doctor"""

from __future__ import annotations

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import show, table


def command(as_json: Json = False) -> None:
    """Say what this machine can do; time and check a 3D convolution in every precision. Exit code 1
    if a result is wrong or the GPU's driver is too old."""
    from segfleet.pipeline.launch.doctor import check_machine

    machine = check_machine()
    show(machine, as_json, render)
    precise = [row for row in machine["convolutions"] if row["precision"] == "fp32"]
    if machine["driver_problem"] or not all(row["right"] for row in precise):
        raise typer.Exit(1)


def render(machine: dict) -> None:
    typer.echo(
        f"Python {machine['python']}, {machine['cores']} cores, {machine['memory_gib']} GiB usable "
        f"memory, {machine['device']}"
    )
    if machine["driver_problem"]:
        typer.echo(f"GPU: {machine['driver_problem']}")
    elif machine["cuda"]:
        typer.echo(f"CUDA {machine['cuda']}, driver {machine['driver'] or 'not found'}")
    table(
        ("package", "version"),
        [(name, number or "not installed") for name, number in machine["packages"].items()],
    )
    table(
        ("program", "where"),
        [(name, place or "not found") for name, place in machine["programs"].items()],
    )
    rows = []
    for row in machine["convolutions"]:
        memory, right = (
            "channels last" if row["channels_last"] else "contiguous",
            "yes" if row["right"] else row.get("why", "NO"),
        )
        rows.append((row["precision"], memory, row["ms"] or "-", right))
    table(("3D convolution", "memory", "ms", "right"), rows)
