"""segfleet predict RUN IMAGE... --out DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.output import Best, Fold, Json, progress, show, table


def command(
    run: Annotated[
        str, typer.Argument(help="A run folder, the beginning of its uid, or its recipe's name.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the predictions.")],
    overlays: Annotated[
        bool,
        typer.Option(
            "--overlays", help="Also OUT/overlays/: each prediction outlined on its image."
        ),
    ] = False,
    fold: Fold = None,
    best: Best = False,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Segment images with a finished run; every prediction lies exactly on its image. Continues
    where it stopped."""
    job = job_of(run, images, out, runs, fold, best) | {"overlays": overlays}
    from segfleet.pipeline.jobs import predict
    from segfleet.pipeline.ranks import Ranks

    with progress("predicting") as tick:
        document = predict(job, Ranks(), tick)
    show(document, as_json, render)
    raise typer.Exit(document["exit_code"])


def job_of(
    run: str, images: list[Path], out: Path, runs: Path, fold: int | None = None, best: bool = False
) -> dict[str, Any]:
    """What the ranks of a prediction do. Raises InputError if they cannot."""
    from segfleet.pipeline.inference.inputs import check_out, collect
    from segfleet.pipeline.run import data_of, find_run, open_run

    folder = find_run(run, runs, fold, best)
    recipe, folders = open_run(folder)
    for stage in folders:
        stage.check_done()
    check_out(
        out,
        collect(images, len(data_of(folder, recipe).dataset.channels)),
        folder.name,
    )
    return {
        "do": "predict",
        "run": str(folder),
        "images": [str(path) for path in images],
        "out": str(out),
    }


def render(document: dict) -> None:
    done, kept, failed = (len(document[key]) for key in ("done", "kept", "failed"))
    typer.echo(f"{done} written, {kept} already there, {failed} failed: {document['out']}")
    if document["failed"]:
        table(("image", "problem"), [(one["id"], one["problem"]) for one in document["failed"]])
