"""segfleet slurm-sandbox start|stop DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import show


def command(
    action: Annotated[str, typer.Argument(help="start or stop.")],
    folder: Annotated[Path, typer.Argument(help="Where the sandbox keeps all its state.")],
    accounting: Annotated[
        bool,
        typer.Option(
            "--accounting", help="With slurmdbd and a private MariaDB, for sacct and sacctmgr."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Start or stop a real SLURM of four nodes with pretended GPUs on this machine alone. Needs
    root and Debian's SLURM packages."""
    from segfleet.core.errors import InputError
    from segfleet.slurm.sandbox.sandbox import NODES, Sandbox

    if action not in ("start", "stop"):
        raise InputError(f"slurm-sandbox: found '{action}', expected start or stop")
    sandbox = Sandbox(folder, accounting=accounting)
    if action == "start":
        sandbox.start()
    else:
        sandbox.stop()
    document = {
        "folder": str(sandbox.folder),
        "slurm_conf": str(sandbox.configuration),
        "running": sorted(sandbox.pids()),
        "nodes": NODES,
    }
    show(document, as_json, render)


def render(document: dict) -> None:
    if document["running"]:
        typer.echo(
            f"SLURM runs: {len(document['nodes'])} nodes, partitions main, low, low0. In every "
            "shell that shall use it:"
        )
        typer.echo(f"  export SLURM_CONF={document['slurm_conf']}")
    else:
        typer.echo(f"SLURM in {document['folder']} is stopped")
