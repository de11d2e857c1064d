"""Pictures with polygons in one COCO file."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.faults import ImageError
from segfleet.preprocess.files.images import ENDINGS, peek
from segfleet.preprocess.files.polygons import Area, filled
from segfleet.preprocess.readers.base import CaseRef, Facts, natural, read_json, visible
from segfleet.preprocess.readers.pairs import PairReader
from segfleet.preprocess.stores.manifest import Dataset


class Reader(PairReader):
    about = "Pictures with polygons in COCO's format."
    layout = (
        "annotations.json (or annotations/*.json, one file) with images, annotations, categories; "
        "pictures in images/ or beside it"
    )
    facts = Facts(dims="2D", modality="any")
    structure = "foreground"

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        files = _files(self.folder)
        if len(files) != 1:
            names = ", ".join(path.name for path in files)
            raise InputError(f"raw: found {len(files)} COCO files ({names}), expected one")
        self.file = files[0]

    def lies_in(self, folder: Path) -> bool:
        return bool(_files(folder))

    @cached_property
    def labels(self) -> dict[str, int]:
        return {"background": 0, **dict(self._categories.values())}

    @cached_property
    def _categories(self) -> dict[int, tuple[str, int]]:
        """Category id -> name and value, numbered from 1 in the order of the ids."""
        try:
            listed = sorted((int(c["id"]), str(c["name"])) for c in self.json["categories"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{self.file}: categories: found {error}, expected id and name"
            ) from None
        names = [name for _, name in listed]
        if not listed or len(set(names)) < len(names) or "background" in names:
            raise InputError(f"{self.file}: categories: found {names}, expected different names")
        return {key: (name, n) for n, (key, name) in enumerate(listed, 1)}

    @cached_property
    def json(self) -> dict:
        return read_json(self.file)

    def dataset(self) -> Dataset:
        name = self.root.resolve().name
        channels = ("R", "G", "B")
        return Dataset(
            name=name, reader="coco", dims=2, channels=channels, labels=self.labels,
            file_ending=".png",
        )  # fmt: skip

    def cases(self) -> list[CaseRef]:
        """A case's own annotations travel with it, so that the file is read once."""
        try:
            drawn: dict[int, list] = {int(entry["id"]): [] for entry in self.json["images"]}
            for entry in self.json["annotations"]:
                if int(entry["image_id"]) in drawn:
                    drawn[int(entry["image_id"])].append(
                        [int(entry["category_id"]), entry.get("segmentation", [])]
                    )
            names = [(int(entry["id"]), str(entry["file_name"])) for entry in self.json["images"]]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(f"{self.file}: found no {error}, expected {self.layout}") from None
        refs = []
        for key, name in sorted(names, key=lambda item: natural(item[1])):
            places = [folder / name for folder in (self.folder / "images", self.folder)]
            image = next((place for place in places if place.is_file()), places[0])
            stem = next((name[: -len(e)] for e in ENDINGS if name.lower().endswith(e)), name)
            polygons = json.dumps(drawn[key])
            refs.append(
                CaseRef(id=stem.replace("/", "_"), images=(image,), labels=(), said=polygons)
            )
        return refs

    def problems(self) -> list[Problem]:
        """Pictures that would be read from outside the folder."""
        problems, root = super().problems(), Path(os.path.realpath(self.root))
        for ref in self.refs():
            if not Path(os.path.realpath(ref.images[0])).is_relative_to(root):
                problem = {"found": str(ref.images[0]), "expected": f"a picture in {root}"}
                problems.append(
                    Problem(case=ref.id, field="file_name", **problem, mend="Correct it.")
                )
        return problems

    def may_be_empty(self, ref: CaseRef) -> bool:
        return True

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """Smaller areas over larger ones."""
        if digest is not None:
            digest.update(ref.said.encode())
        shape = peek(ref.images[0])[2:]
        areas = []
        for category, outline in json.loads(ref.said):
            if category not in self._categories:
                found, expected = f"category {category}", "one of the categories"
                raise ImageError(self.file, "annotation", found, expected, "Correct the file.")
            value = self._categories[category][1]
            areas.append((_areas(outline, shape, self.file), value))
        label = np.zeros(shape, np.uint8)
        for parts, value in sorted(areas, key=lambda item: -sum(part.size for part in item[0])):
            for part in parts:
                part.paint(label, value)
        return label[None], Geometry(shape=(1, *shape), file=FileFacts(dims=2))


def _files(folder: Path) -> list[Path]:
    files = [folder / "annotations.json", *visible(folder / "annotations", "*.json")]
    return [path for path in files if path.is_file()]


def _areas(outline: Any, shape: tuple[int, int], file: Path) -> list[Area]:
    """The parts of one thing, which are never holes: polygons [[x, y, x, y, ...], ...], or runs
    down the columns. Raises ImageError."""
    try:
        if isinstance(outline, list):
            return [filled([np.array(polygon, float)], shape) for polygon in outline]
        if isinstance(outline["counts"], list) and tuple(outline["size"]) == tuple(shape):
            runs = np.array(outline["counts"], np.int64)
            if (runs >= 0).all() and runs.sum() == shape[0] * shape[1]:
                return [_of_runs(runs, shape)]
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    expected = "polygons, or runs as a list of counts that fill the picture"
    mend = "Convert packed runs with pycocotools."
    raise ImageError(file, "segmentation", str(outline)[:60], expected, mend)


def _of_runs(runs: np.ndarray, shape: tuple[int, int]) -> Area:
    """The columns that hold any pixel; of `runs` every second one is inside."""
    ends = np.cumsum(runs)
    some = np.flatnonzero(runs[1::2]) * 2 + 1
    if not len(some):
        return filled([], shape)
    height = shape[0]
    left = int(ends[some[0] - 1]) // height
    right = int(ends[some[-1]] - 1) // height + 1
    values = np.zeros(height * (right - left), bool)
    for run in some:
        values[ends[run - 1] - left * height : ends[run] - left * height] = True
    inside = values.reshape((height, right - left), order="F")
    return Area(rows=slice(0, height), columns=slice(left, right), inside=inside)
