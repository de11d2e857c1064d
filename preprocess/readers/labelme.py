"""Pictures with polygons drawn in LabelMe: a JSON file beside each picture."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.faults import ImageError, damaged, read_bytes
from segfleet.preprocess.files.images import peek
from segfleet.preprocess.files.polygons import FARTHEST, filled
from segfleet.preprocess.readers.base import CaseRef, Facts, declared_labels, natural, visible
from segfleet.preprocess.readers.pairs import PairReader, pictures
from segfleet.preprocess.stores.manifest import Dataset

SHAPES = ("polygon", "rectangle", "circle")


class Reader(PairReader):
    about = "Pictures with polygons, rectangles and circles drawn in LabelMe."
    layout = (
        "STEM.png with STEM.json of LabelMe beside it, in one folder; optionally labels.json with "
        "the classes"
    )
    facts = Facts(dims="2D", modality="any")
    structure = "foreground"

    def lies_in(self, folder: Path) -> bool:
        return bool(_drawn(folder))

    @cached_property
    def labels(self) -> dict[str, int]:
        """The classes of labels.json, or all names that occur, in their order."""
        if declared := declared_labels(self.folder / "labels.json"):
            return declared
        names = {name for path in _drawn(self.folder) for name, _, _ in _shapes(path, lenient=True)}
        ordered = sorted(names - {"background", ""}, key=natural)
        if not ordered:
            raise InputError(f"{self.folder}: no shape has a label. Expected {self.layout}")
        return {"background": 0, **{name: n for n, name in enumerate(ordered, 1)}}

    def dataset(self) -> Dataset:
        name = self.root.resolve().name
        channels = ("R", "G", "B")
        return Dataset(
            name=name, reader="labelme", dims=2, channels=channels, labels=self.labels,
            file_ending=".png",
        )  # fmt: skip

    def cases(self) -> list[CaseRef]:
        by_stem = {path.stem: path for path in pictures(self.folder)}
        refs = []
        for file in _drawn(self.folder):
            image = by_stem.get(file.stem, file.with_suffix(".png"))
            refs.append(CaseRef(id=file.stem, images=(image,), labels=(file,)))
        return refs

    def may_be_empty(self, ref: CaseRef) -> bool:
        return True

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """Later shapes over earlier ones, as LabelMe draws them."""
        path = ref.labels[0]
        if digest is not None:
            digest.update(read_bytes(path))
        shape = peek(ref.images[0])[2:]
        label = np.zeros(shape, np.uint8)
        for name, kind, points in _shapes(path):
            if name not in self.labels:
                found, expected = f"'{name}' in {path.name}", ", ".join(self.labels)
                raise ImageError(path, "label", found, expected, "Name it in labels.json.")
            filled([_outline(kind, points)], shape).paint(label, self.labels[name])
        return label[None], Geometry(shape=(1, *shape), file=FileFacts(dims=2))


def _drawn(folder: Path) -> list[Path]:
    return [p for p in visible(folder, "*.json") if p.is_file() and _is_labelme(p)]


def _is_labelme(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(2**16)
    return b'"shapes"' in start


def _shapes(path: Path, lenient: bool = False) -> list[tuple[str, str, np.ndarray]]:
    """(label, kind, points (n, 2)) of a file. Raises ImageError for what is no area."""
    try:
        shapes = [
            (str(s["label"]), str(s.get("shape_type", "polygon")), np.array(s["points"], float))
            for s in json.loads(read_bytes(path))["shapes"]
        ]
        for _, kind, points in shapes:
            least = 1 if kind == "polygon" else 2
            if points.ndim != 2 or points.shape[1] != 2 or len(points) < least:
                raise ValueError(f"points of a {kind} that are no pairs of numbers")
            if not np.abs(points).max() < FARTHEST:
                raise ValueError(f"points of a {kind} that are on no picture")
            if kind not in SHAPES and not lenient:
                mend = "Draw areas, or remove the shape."
                raise ImageError(path, "shape", f"{kind} in {path.name}", " or ".join(SHAPES), mend)
        return shapes
    except ImageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if lenient:
            return []
        raise damaged(path, str(error)[:100]) from None


def _outline(kind: str, points: np.ndarray) -> np.ndarray:
    if kind == "rectangle":
        (left, top), (right, bottom) = points[0], points[-1]
        return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    if kind == "circle":
        radius = math.dist(points[0], points[1])
        turn = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        return points[0] + radius * np.stack([np.cos(turn), np.sin(turn)], -1)
    return points
