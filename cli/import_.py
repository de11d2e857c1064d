"""`segfleet import torch FILE | nnunet FOLDER`: what was trained elsewhere becomes a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import show
from segfleet.core.files import absolute

KINDS = ("torch", "nnunet")


def command(
    kind: Annotated[
        str, typer.Argument(help="torch: a file of weights. nnunet: nnU-Net v2's model folder.")
    ],
    source: Annotated[Path, typer.Argument(help="The file, or the folder.")],
    to: Annotated[Path, typer.Option(help="Folder of all runs, or a .safetensors file (torch).")],
    network: Annotated[
        str | None, typer.Option(help="torch: which network; `segfleet models` lists them.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="torch: option of the network, NAME=VALUE.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="torch: the store whose channels, labels and plan the network is for."),
    ] = None,
    mapping: Annotated[
        str, typer.Option(help="torch: auto, order, or a JSON file {theirs: ours} of names.")
    ] = "auto",
    strict: Annotated[
        str, typer.Option(help="torch: all tensors must come, or the encoder's alone.")
    ] = "all",
    checkpoint: Annotated[
        str, typer.Option(help="nnunet: file in each fold_N.")
    ] = "checkpoint_final.pth",
    as_json: Json = False,
) -> None:
    """Make runs of what was trained elsewhere: `segfleet predict` takes them, and recipes start
    from their weights by model.weights."""
    from segfleet.core.errors import InputError, check_one_of

    check_one_of("import", kind, KINDS)
    if not source.exists():
        raise InputError(f"import: found no {source}")
    if kind == "nnunet":
        from segfleet.pipeline.trained.imports import import_nnunet

        runs = import_nnunet(source, to, checkpoint)
    else:
        if network is None:
            raise InputError("import: torch needs --network; `segfleet models` lists them")
        runs = [import_torch(source, to, network, option or [], store, mapping, strict)]
    show({"runs": [str(run) for run in runs]}, as_json, render)


def import_torch(
    source: Path,
    to: Path,
    network: str,
    options: list[str],
    store: Path | None,
    mapping: str,
    strict: str,
) -> Path:
    """A run in the folder `to`, or with a name that ends in .safetensors the tensors by our
    names."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.recipe import override, parse
    from segfleet.pipeline.trained.imports import write_run, write_weights
    from segfleet.preprocess.stores.manifest import load_manifest

    document = {
        "name": source.stem,
        "model": {
            "name": network, "weights": str(absolute(source)), "mapping": mapping, "strict": strict
        },
        "data": {"split": "all"},
        "stages": [{"name": "imported", "epochs": 0, "lr": 1.0}],
    }  # fmt: skip
    document = override(document, [f"model.options.{pair}" for pair in options])
    if to.suffix == ".safetensors":
        return write_weights(to, parse(document, "import"))
    if store is None:
        raise InputError(
            "import: a run needs --store, for the channels, labels and plan it is for; "
            "--to FILE.safetensors needs none"
        )
    document["data"]["store"] = str(absolute(store))
    return write_run(absolute(to), parse(document, "import"), load_manifest(store))


def render(document: dict) -> None:
    for run in document["runs"]:
        typer.echo(run)
