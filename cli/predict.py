"""segfleet predict RUN IMAGE... --out DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segfleet.cli.output import Json, progress, show, table


def command(
    run: Annotated[str, typer.Argument(help="A run folder, the beginning of its uid, or its recipe's name.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the predictions.")],
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Segment images with a finished run; every prediction lies exactly on its image. Continues where it stopped."""
    from segfleet.pipeline.gang import Gang
    from segfleet.pipeline.parts import patch_of
    from segfleet.pipeline.predict import predict_files
    from segfleet.pipeline.run import find_run, open_run
    from segfleet.pipeline.score import forward_of, load_network
    from segfleet.preprocess.manifest import load_manifest

    folder = find_run(run, runs)
    recipe, folders = open_run(folder)
    manifest, device = load_manifest(Path(recipe.data.store)), Gang().device
    model, task, name = load_network(recipe, manifest, folders, device)
    with progress("predicting") as tick:
        document = predict_files(
            forward_of(model, task, recipe, device),
            manifest.plan,
            manifest.dataset,
            task,
            images,
            out,
            patch=patch_of(recipe, manifest),
            overlap=recipe.evaluation.overlap,
            mirror_axes=recipe.evaluation.mirror,
            batch=recipe.evaluation.batch,
            device=device,
            made_by=f"{folder.name} {name}",
            progress=tick,
        )
    show(document, as_json, render)
    raise typer.Exit(document["exit_code"])


def render(document: dict) -> None:
    done, kept, failed = (len(document[key]) for key in ("done", "kept", "failed"))
    typer.echo(f"{done} written, {kept} already there, {failed} failed: {document['out']}")
    if document["failed"]:
        table(("image", "problem"), [(one["id"], one["problem"]) for one in document["failed"]])
