"""What label values are called, in files beside labels: JSON, 3D Slicer's colour
table and ITK-SNAP's label description."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping
from pathlib import Path

from segfleet.core.files import write_atomically

JSON, SLICER, ITKSNAP = "labels.json", "labels.ctbl", "labels.label"
GOLDEN = 0.61803398875  # of a circle: neighbouring values get colours far from each other


def write_names(folder: Path, labels: Mapping[str, int]) -> None:
    """labels.json ({"name": value}), labels.ctbl for 3D Slicer and labels.label for ITK-SNAP into
    `folder`, if what is there differs."""
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    slicer, itksnap = (
        "\n".join([head, *(line(value, name) for name, value in ordered.items())]) + "\n"
        for head, line in (("# value name r g b a", _slicer), ("# ITK-SNAP", _itksnap))
    )
    for name, text in (
        (JSON, json.dumps(ordered, indent=1) + "\n"),
        (SLICER, slicer),
        (ITKSNAP, itksnap),
    ):
        path = folder / name
        if not (path.is_file() and path.read_bytes() == text.encode()):
            write_atomically(path, text)


def colour(value: int) -> tuple[int, int, int, int]:
    """Red, green, blue and alpha of a label value, 0 to 255; nothing for the background."""
    if value == 0:
        return 0, 0, 0, 0
    red, green, blue = (
        round(255 * part) for part in colorsys.hsv_to_rgb(value * GOLDEN % 1, 0.75, 0.95)
    )
    return red, green, blue, 255


def _slicer(value: int, name: str) -> str:
    return f"{value} {name.replace(' ', '_')} {' '.join(map(str, colour(value)))}"


def _itksnap(value: int, name: str) -> str:
    """A line of ITK-SNAP's label description: index, red, green, blue, opacity, shown, as mesh."""
    if not value:
        return '0 0 0 0 0 0 0 "Clear Label"'
    quoted = name.replace(chr(34), chr(39))
    return f'{value} {" ".join(map(str, colour(value)[:3]))} 1 1 1 "{quoted}"'
