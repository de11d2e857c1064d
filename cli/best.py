"""segfleet best RUN RUN [...]; segfleet best SWEEP"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.options import Device, Json, Runs
from segfleet.cli.output import progress, show, table
from segfleet.core.machine import wait_as_ranks_do


def command(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Recipes by name, or any run of each: all their folds count as one. Or a sweep, "
            "by name or folder: the best of its points.",
        ),
    ],
    top: Annotated[
        int, typer.Option(min=1, help="So many points of a sweep, since every pair is predicted.")
    ] = 4,
    device: Device = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Find the best recipe, or pair of recipes as an ensemble, by the score of cases not trained
    on."""
    wait_as_ranks_do()
    from segfleet.core.errors import InputError
    from segfleet.pipeline.ranks import device_of
    from segfleet.pipeline.scoring.folds import find_folds
    from segfleet.pipeline.trained.best import find_best
    from segfleet.pipeline.trained.model import trained_run

    candidates: list[list[Path]] = []
    for name in recipes:
        sweep = sweep_of(name, runs)
        candidates += best_points(sweep, top) if sweep else [find_folds(name, runs)]
    configurations = list({tuple(folders): None for folders in candidates})
    if len(configurations) < 2:
        raise InputError(
            f"best: found one recipe in: {' '.join(recipes)}; expected two or more to choose from"
        )
    with progress("predicting cases not trained on") as on_progress:
        document = find_best(
            [[trained_run(folder) for folder in folders] for folders in configurations],
            on_progress,
            device_of(device),
        )
    show(document, as_json, render)


def sweep_of(name: str, runs: Path) -> Path | None:
    """The outcome of the sweep of that name, or in that folder, if it is one."""
    from segfleet.sweeps.results.outcome import OUTCOME

    places = (Path(name), Path(name) / OUTCOME, runs / "sweeps" / name / OUTCOME)
    return next((path for path in places if path.name == OUTCOME and path.is_file()), None)


def best_points(outcome: Path, top: int) -> list[list[Path]]:
    """The runs of the best points of a sweep, those of each seed by themselves. Raises InputError
    if the outcome is damaged or ranks nothing."""
    from segfleet.core.errors import InputError
    from segfleet.core.files import read_json

    rows = (read_json(outcome) or {}).get("ranking")
    if not rows:
        raise InputError(f"best: {outcome} ranks no point; wait for the sweep, or run it again")
    run_groups: list[list[Path]] = []
    try:
        for row in rows[:top]:
            seeds: dict[int, list[Path]] = {}
            for run in sorted(row["runs"], key=lambda run: run["fold"]):
                seeds.setdefault(run["seed"], []).append(Path(run["run"]))
            run_groups += seeds.values()
    except (KeyError, TypeError):
        raise InputError(
            f"best: {outcome} is damaged; run the sweep again, which writes it anew"
        ) from None
    return run_groups


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
        f"\n{document['cases']} cases, each by networks not trained on it. {document['warning']}"
    )
    typer.echo(f"next: segfleet predict {' '.join(document['best'])} IMAGES --out DIR")
