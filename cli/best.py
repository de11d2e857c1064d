"""segfleet best RUN RUN [...]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.output import Json, progress, show, table


def command(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Recipes by name, or any run of each: all their folds count as one.",
        ),
    ],
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Find the best recipe, or pair of recipes as an ensemble, by the score of cases not trained
    on."""
    from segfleet.core.errors import InputError
    from segfleet.pipeline.best import find_best
    from segfleet.pipeline.folds import find_folds
    from segfleet.pipeline.trained import trained_run

    found = [find_folds(name, runs) for name in recipes]
    configurations = list({tuple(folders): None for folders in found})
    if len(configurations) < 2:
        raise InputError(
            f"best: found one recipe in: {' '.join(recipes)}; expected two or more to choose from"
        )
    with progress("predicting cases not trained on") as tick:
        document = find_best(
            [[trained_run(folder) for folder in folders] for folders in configurations], tick
        )
    show(document, as_json, render)


def render(document: dict[str, Any]) -> None:
    rows = []
    for row in document["candidates"]:
        score, bounds = row["mean_foreground_dice"], row["mean_foreground_dice_ci95"]
        rows.append(
            (
                "*" if row is document["candidates"][0] else "",
                " + ".join(row["recipes"]),
                str(len(row["runs"])),
                "-" if score is None else f"{score:.4f}",
                f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "-",
            )
        )
    table(("", "recipe or ensemble", "runs", "Dice", "95 % interval"), rows)
    typer.echo(
        f"\\n{document['cases']} cases, each by networks not trained on it. {document['warning']}"
    )
    typer.echo(f"next: segfleet predict {' '.join(document['best'])} IMAGES --out DIR")
