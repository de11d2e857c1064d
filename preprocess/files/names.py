"""What label values are called, in files beside labels: JSON, and 3D Slicer's colour table."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping
from pathlib import Path

from segfleet.core.files import write_atomically

JSON, SLICER = "labels.json", "labels.ctbl"
GOLDEN = 0.61803398875  # of a circle: neighbouring values get colours far from each other


def write_names(folder: Path, labels: Mapping[str, int]) -> None:
    """labels.json ({"name": value}) and labels.ctbl (value, name, red, green, blue, alpha) into
    `folder`, if what is there differs."""
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    rows = [
        f"{value} {name.replace(' ', '_')} {' '.join(map(str, colour(value)))}"
        for name, value in ordered.items()
    ]
    for name, text in (
        (JSON, json.dumps(ordered, indent=1) + "\n"),
        (SLICER, "\n".join(["# value name r g b a", *rows]) + "\n"),
    ):
        path = folder / name
        if not (path.is_file() and path.read_text(encoding="utf-8") == text):
            write_atomically(path, text)


def colour(value: int) -> tuple[int, int, int, int]:
    """Red, green, blue and alpha of a label value, 0 to 255; nothing for the background."""
    if value == 0:
        return 0, 0, 0, 0
    red, green, blue = (
        round(255 * part) for part in colorsys.hsv_to_rgb(value * GOLDEN % 1, 0.75, 0.95)
    )
    return red, green, blue, 255
