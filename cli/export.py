"""`segfleet export model | hub | monai | nnunet | ome-zarr | dicom-seg ...`: what was trained or
predicted, for others to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.options import Best, Folds, Json, Runs, fold_of
from segfleet.cli.output import show

KINDS = {
    "model": "RUN...",
    "hub": "RUN...",
    "monai": "RUN...",
    "nnunet": "RUN PREDICTIONS",
    "ome-zarr": "STORE CASE",
    "dicom-seg": "STORE CASE SERIES",
}


def command(
    kind: Annotated[
        str,
        typer.Argument(
            help="model: a file (or folder) that predicts anywhere. hub: the same as a folder for "
            "Hugging Face. monai: a bundle of MONAI that calls segfleet. nnunet: dataset.json "
            "beside predictions. ome-zarr: a case of a store. dicom-seg: the label of a case as "
            "DICOM SEG."
        ),
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="model, hub, monai: runs (folder, uid or recipe) or a model. nnunet: a run, then "
            "the folder of predictions. ome-zarr: a store, then a case. dicom-seg: a store, a "
            "case, the folder of its DICOM series.",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="What is written: NAME.segfleet (one file), or a new folder."),
    ] = None,
    pt2: Annotated[
        bool, typer.Option("--pt2", help="model, hub: also each network as torch.export has it.")
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="model, hub: also each network as ONNX (segfleet[onnx])."),
    ] = False,
    use: Annotated[
        str, typer.Option(help="model, hub, monai: intended use, a sentence for the model card.")
    ] = "",
    licence: Annotated[
        str, typer.Option(help="model, hub, monai: licence of the weights, such as cc-by-4.0.")
    ] = "",
    fold: Folds = None,
    best: Best = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write trained networks as a model that needs no store, or data and predictions in formats of
    other tools."""
    from segfleet.core.errors import InputError, did_you_mean

    if kind not in KINDS:
        raise InputError(
            f"export: found '{kind}', expected one of: {', '.join(KINDS)}."
            f"{did_you_mean(kind, KINDS)}"
        )
    wanted = {"nnunet": 2, "ome-zarr": 2, "dicom-seg": 3}.get(kind, len(words))
    if len(words) != wanted:
        raise InputError(f"export {kind}: found {' '.join(words)}, expected {KINDS[kind]}")
    if kind == "nnunet":
        show(describe(words[0], Path(words[1]), runs, fold, best), as_json, render)
        return
    if to is None:
        raise InputError(f"export {kind}: --to is missing: what is to be written")
    if kind == "ome-zarr":
        from segfleet.preprocess.exporting.ome_zarr import write_ome_zarr
        from segfleet.preprocess.stores.base import open_store

        write_ome_zarr(open_store(Path(words[0])), words[1], to)
        show({"written": str(to)}, as_json, render)
        return
    if kind == "dicom-seg":
        from segfleet.preprocess.exporting.dicom_seg import export_seg
        from segfleet.preprocess.stores.base import open_store

        export_seg(open_store(Path(words[0])), words[1], Path(words[2]), to)
        show({"written": str(to)}, as_json, render)
        return
    if kind in ("hub", "monai") and to.suffix in (".segfleet", ".zip"):
        raise InputError(f"export {kind}: --to: found {to}, expected a new folder")
    if kind == "hub" and not licence:
        raise InputError(
            "export hub: --licence is missing; the hub asks for one, such as cc-by-4.0"
        )
    if kind == "monai" and (pt2 or onnx):
        raise InputError("export monai: a bundle takes no --pt2 and no --onnx; use export model")
    show(write(kind, words, to, runs, fold, best, (pt2, onnx), use, licence), as_json, render)


def write(
    kind: str,
    words: list[str],
    to: Path,
    runs: Path,
    fold: str | None,
    best: bool,
    graphs: tuple[bool, bool],
    use: str,
    licence: str,
) -> dict[str, Any]:
    """Write a model; what was written."""
    from segfleet.pipeline.exporting import graphs as writers
    from segfleet.pipeline.exporting.bundle import write_bundle
    from segfleet.pipeline.exporting.card import model_card
    from segfleet.pipeline.trained.loading import find_models, open_model
    from segfleet.pipeline.trained.modelfile import write_model

    paths = [path for name in words for path in find_models(name, runs, fold_of(fold), best)]
    model = open_model(list(dict.fromkeys(paths)))
    model.check()
    pt2, onnx = graphs
    if onnx:
        writers.check_onnx()

    def extra(folder: Path) -> None:
        for network in model.networks:
            name = "model" if len(model.networks) == 1 else f"model-{network.uid}"
            if pt2:
                writers.write_pt2(model, network, folder / f"{name}.pt2")
            if onnx:
                writers.write_onnx(model, network, folder / f"{name}.onnx")

    card = model_card(model, use=use, licence=licence)
    if kind == "monai":
        written = write_bundle(model, to, card, use=use, licence=licence)
    else:
        written = write_model(model, to, card, extra)
    return {"written": str(written), "networks": [network.uid for network in model.networks]}


def describe(
    run: str, predictions: Path, runs: Path, fold: str | None, best: bool
) -> dict[str, Any]:
    """dataset.json beside predictions, for nnU-Net's evaluation."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.trained.loading import find_models, open_model
    from segfleet.preprocess.exporting.nnunet import describe_predictions

    model = open_model(find_models(run, runs, fold_of(fold), best))
    if not predictions.is_dir():
        raise InputError(f"export nnunet: found no folder {predictions}")
    return {"written": [str(path) for path in describe_predictions(model.dataset, predictions)]}


def render(document: dict) -> None:
    written = document["written"]
    for path in written if isinstance(written, list) else [written]:
        typer.echo(path)
