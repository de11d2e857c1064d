"""segfleet doctor"""

from __future__ import annotations

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import show, table


def command(as_json: Json = False) -> None:
    """Say what this machine can do; time and check a 3D convolution in every precision. Exit code 1
    if a result is wrong or the GPU's driver is too old."""
    from segfleet.pipeline.launch.doctor import examine

    found = examine()
    show(found, as_json, render)
    precise = [row for row in found["convolutions"] if row["precision"] == "fp32"]
    if found["driver_problem"] or not all(row["right"] for row in precise):
        raise typer.Exit(1)


def render(found: dict) -> None:
    typer.echo(
        f"Python {found['python']}, {found['cores']} cores, {found['memory_gib']} GiB usable "
        f"memory, {found['device']}"
    )
    if found["driver_problem"]:
        typer.echo(f"GPU: {found['driver_problem']}")
    elif found["cuda"]:
        typer.echo(f"CUDA {found['cuda']}, driver {found['driver'] or 'not found'}")
    table(
        ("package", "version"),
        [(name, number or "not installed") for name, number in found["packages"].items()],
    )
    table(
        ("program", "where"),
        [(name, place or "not found") for name, place in found["programs"].items()],
    )
    rows = []
    for row in found["convolutions"]:
        memory, right = (
            "channels last" if row["channels_last"] else "contiguous",
            "yes" if row["right"] else row.get("why", "NO"),
        )
        rows.append((row["precision"], memory, row["ms"] or "-", right))
    table(("3D convolution", "memory", "ms", "right"), rows)
