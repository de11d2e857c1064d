"""The pictures that were drawn of a run's cases, as its overlays/index.json names them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, StringConstraints, ValidationError

from segfleet.core.files import read_json

FOLDER, INDEX = "overlays", "index.json"


class Picture(BaseModel):
    """`colours`: name of a structure -> "#rrggbb"."""

    role: str
    file: str  # in the same folder
    case: str
    mean_dice: float | None
    slice: int
    slices: int
    colours: dict[str, Annotated[str, StringConstraints(pattern=r"^#[0-9a-f]{6}$")]] = {}


def drawn(run: Path) -> list[dict[str, Any]]:
    """What is there whole, in order; that something is not is said on stderr."""
    folder, pictures = Path(run) / FOLDER, []
    for entry in read_json(folder / INDEX, list) or ():
        try:
            picture = Picture.model_validate(entry)
        except ValidationError:
            sys.stderr.write(f"segfleet: {folder / INDEX} is damaged and is left out\n")
            return []
        if Path(picture.file).name == picture.file and (folder / picture.file).is_file():
            pictures.append(picture.model_dump())
    return pictures
