"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[
    str, typer.Argument(help="A run folder, the beginning of its uid, or its recipe's name.")
]
Submitted = Annotated[
    str,
    typer.Argument(
        help="A run folder, the beginning of its uid, its recipe's name; a store; predictions."
    ),
]
Changes = Annotated[list[str] | None, typer.Argument(help="Changes of the recipe, key.path=value.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU if there is one.")
]
Live = Annotated[
    bool,
    typer.Option("--live", help="Run the code as it is when the job starts, not as it is now."),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document on stdout; everything else goes to stderr."
    ),
]
Fold = Annotated[
    int | None, typer.Option(min=0, help="Of several runs of that name, the one of this fold.")
]
Folds = Annotated[
    str | None,
    typer.Option(
        "--fold", help="Of several runs of that name, the one of this fold; all: an ensemble."
    ),
]
FoldsTogether = Annotated[
    str | None,
    typer.Option(
        "--fold",
        help="Of several runs of a recipe, the one of this fold; all, the default where all are "
        "scored: the score over all folds.",
    ),
]
Best = Annotated[
    bool, typer.Option("--best", help="Of several runs of that name, the one of the highest score.")
]


def fold_of(text: str | None) -> int | str | None:
    """The value of --fold: a number, or all. Raises InputError."""
    from segfleet.core.errors import InputError

    if text in (None, "all"):
        return text
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"--fold: found '{text}', expected a number from 0, or all")
    return int(text)
