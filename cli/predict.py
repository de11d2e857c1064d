"""segfleet predict RUN [RUN ...] IMAGE... --out DIR"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segfleet.cli.datasets import Options, chosen
from segfleet.cli.options import Best, Device, Folds, Json, Runs, fold_of
from segfleet.cli.output import progress, show, table
from segfleet.core.machine import cpus, threads_of, wait_as_ranks_do

if TYPE_CHECKING:
    from segfleet.pipeline.launch.job import Predict
    from segfleet.preprocess.readers.base import Layout


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... IMAGE...",
            help="A run folder, the beginning of its uid, its recipe's name or a model file; more "
            "of them are an ensemble. Then image files, folders of them or of DICOM series, or "
            "stores; with --layout raw data sets.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the predictions.")],
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also OUT/ID.npz: float16, on the image's grid."),
    ] = False,
    postprocess: Annotated[
        str | None,
        typer.Option(
            help="largest: of each structure its largest part. min-size=N, or Nmm3: no smaller "
            "parts. auto: what helped on cases not trained on."
        ),
    ] = None,
    overlays: Annotated[
        bool,
        typer.Option(
            "--overlays", help="Also OUT/overlays/: each prediction outlined on its image."
        ),
    ] = False,
    format: Annotated[
        str,
        typer.Option(
            help="Of the labels; by default the image's. dicom-seg: DICOM SEG, of DICOM series "
            "(needs segfleet[dicom]). seg-nrrd: 3D Slicer's, with names and colours."
        ),
    ] = "",
    fold: Folds = None,
    best: Best = False,
    layout: Annotated[
        str | None,
        typer.Option(help="Segment the cases of raw data sets in this layout (segfleet datasets)."),
    ] = None,
    option: Options = None,
    device: Device = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that share the images.")
    ] = 1,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Segment images with a finished run, or with several as an ensemble; every prediction lies
    exactly on its image. Continues where it stopped."""
    wait_as_ranks_do()
    job = job_of(
        words, runs, fold, best, out=out, format=format, layout=layout_of(layout, option),
        overlays=overlays, probabilities=probabilities, postprocess=checked_rule(postprocess),
    )  # fmt: skip
    document = by_ranks(job, ranks, device) if ranks > 1 else alone(job, device)
    show(document, as_json, render)
    raise typer.Exit(document["exit_code"])


def alone(job: Predict, device: str | None = None) -> dict[str, Any]:
    """Predict in this process; what came out."""
    import torch

    from segfleet.pipeline.jobs import predict
    from segfleet.pipeline.ranks import Ranks, device_of

    torch.set_num_threads(threads_of() or cpus())  # as a rank has; torch knows no cgroup
    ranks = Ranks(device_of(device))
    with progress("predicting") as on_progress:
        return predict(
            job,
            ranks,
            on_progress,
            lambda done, total: on_progress(done, total, "deciding on cases not trained on"),
        )


def by_ranks(job: Predict, ranks: int, device: str | None) -> dict[str, Any]:
    """Predict with processes that share the images; what came out."""
    from segfleet.core.errors import InputError
    from segfleet.core.litter import temporary_folder
    from segfleet.pipeline.launch.local import run_ranks
    from segfleet.pipeline.ranks import device_of

    if device:
        device_of(device)
    if device not in (None, "cpu", "cuda"):
        raise InputError(
            f"--device: found {device}, which is one GPU for --ranks {ranks}; expected cpu or "
            "cuda, of which every rank takes one"
        )

    with temporary_folder() as folder:
        answer = folder / "answer.json"
        run_ranks(job.model_copy(update={"answer": answer}), ranks, device=device)
        return json.loads(answer.read_text(encoding="utf-8"))


def layout_of(name: str | None, option: list[str] | None) -> Layout | None:
    """The layout of raw data sets. Raises InputError."""
    from segfleet.core.errors import InputError
    from segfleet.preprocess.readers.base import Layout

    if option and not name:
        raise InputError("--option: is of a layout; name it with --layout")
    return Layout(name, chosen(option)) if name else None


def checked_rule(text: str | None) -> str | None:
    """The words of --postprocess, if they can be meant. Raises InputError."""
    if text not in (None, "auto"):
        from segfleet.pipeline.inference.postprocess import parse_rule

        parse_rule(text)
    return text


def job_of(
    words: list[str], runs: Path, fold: str | None, best: bool, *, out: Path, **wishes: Any
) -> Predict:
    """What the ranks of a prediction do; `wishes`: the job's further fields. Raises InputError if
    they cannot."""
    from segfleet.pipeline.inference.collect import collect
    from segfleet.pipeline.inference.inputs import check_out
    from segfleet.pipeline.launch.job import Predict
    from segfleet.pipeline.trained.loading import find_models, open_model

    names, images = divided(words)
    paths = [path for name in names for path in find_models(name, runs, fold_of(fold), best)]
    job = Predict(models=tuple(dict.fromkeys(paths)), images=images, out=out, **wishes)
    model = open_model(job.models)
    if len(model.networks) > 1:
        typer.echo(f"segfleet: an ensemble of {len(model.networks)} networks", err=True)
    model.check_stores(job.images)
    inputs = collect(job.images, len(model.dataset.channels), job.format, job.layout)
    check_out(out, inputs, model.made_by)
    return job


def divided(words: list[str]) -> tuple[list[str], list[Path]]:
    """The runs and the images: the first word is a run; of the others what is there and is no run
    is an image, and so is all that follows it. Raises InputError if there is no image."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.run import RECIPE
    from segfleet.pipeline.trained.modelfile import is_modelfile

    def is_image(word: str) -> bool:
        path = Path(word)
        there = path.exists() or "/" in word or bool(path.suffix)
        return there and not (path / RECIPE).is_file() and not is_modelfile(path)

    first = next((n for n, word in enumerate(words) if n and is_image(word)), len(words))
    if first == len(words):
        raise InputError(
            f"predict: found no image or folder among: {' '.join(words)}; expected RUN [RUN ...] "
            "and then IMAGE [IMAGE ...]"
        )
    return words[:first], [Path(word) for word in words[first:]]


def render(document: dict) -> None:
    done, present, failed = (len(document[key]) for key in ("done", "kept", "failed"))
    typer.echo(f"{done} written, {present} already there, {failed} failed: {document['out']}")
    if rules := document.get("postprocess"):
        said = (f"{name}: {rule or 'nothing, none helped'}" for name, rule in rules.items())
        typer.echo(f"post-processing by cases not trained on: {'; '.join(said)}")
    if document["failed"]:
        table(
            ("image", "problem"),
            [(failure["id"], failure["problem"]) for failure in document["failed"]],
        )
