"""What 2D data sets with black-and-white masks share: pairs by stem, colours without alpha.

Source: specification `datasets_2d`, the rules that hold for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import ENDINGS, ImageError, read_image, stem
from segfleet.preprocess.files.masks import read_mask
from segfleet.preprocess.planning.splits import published
from segfleet.preprocess.readers.base import CaseRef, Folds, RawReader, duplicates, natural, visible
from segfleet.preprocess.stores.manifest import Dataset


class PairReader(RawReader):
    """An image and one binary mask of the same stem. A layout says where they are (`refs`) and what
    the mask shows (`structure`)."""

    structure: ClassVar[str]  # name of label 1
    several: ClassVar[bool] = False  # more than one mask per image is usual

    def dataset(self) -> Dataset:
        name = type(self).__module__.rpartition(".")[2]
        labels = {"background": 0, self.structure: 1}
        source = {
            "channels": ("R", "G", "B"),
            "labels": labels,
            "file_ending": ".png",
            "licence": self.facts.licence,
        }
        return Dataset(name=self.name(name), reader=name, dims=2, **source)

    def name(self, layout: str) -> str:
        return layout

    def problems(self) -> list[Problem]:
        refs = self.refs()
        problems = duplicates([ref.id for ref in refs])
        for ref in refs if not self.several else ():
            if len(ref.labels) > 1:
                files = ", ".join(path.name for path in ref.labels)
                mend = "Keep the right one."
                problems.append(
                    Problem(
                        case=ref.id,
                        field="label",
                        found=f"{len(ref.labels)} masks: {files}",
                        expected="one",
                        mend=mend,
                    )
                )
        return problems

    def brought(self) -> dict[str, Folds]:
        return published([ref.id for ref in self.refs()])

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        return colours(*read_image(ref.images, digest))

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """1 where any of the case's masks is white."""
        return union(ref.labels, digest)


def colours(image: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, Geometry]:
    """Three channels: grey is repeated, alpha dropped."""
    image = opaque(image)
    return (np.repeat(image, 3, axis=0) if len(image) == 1 else image), geometry


def opaque(array_CZYX: np.ndarray) -> np.ndarray:
    """Without alpha, the second or fourth channel of a picture."""
    return array_CZYX[: {2: 1, 4: 3}.get(len(array_CZYX), len(array_CZYX))]


def union(
    paths: Sequence[Path], digest: Any = None, read: Callable | None = None
) -> tuple[np.ndarray, Geometry]:
    """uint8 (1, Y, X), 1 where any mask is true. Raises ImageError if their sizes differ."""
    together, first, white = None, None, 0
    for path in paths:
        mask, geometry = (read or read_mask)(path, digest)
        white = max(white, geometry.file.white)
        if together is None:
            together, first = mask, geometry
        elif mask.shape != together.shape:
            found, expected = ("x".join(map(str, array.shape)) for array in (mask, together))
            raise ImageError(
                path,
                f"shape of mask {path.name}",
                found,
                expected,
                "Remove the mask or replace it.",
            )
        else:
            together |= mask
    return together.astype(np.uint8), replace(first, file=replace(first.file, white=white))


def pictures(folder: Path, endings: Sequence[str] = ENDINGS) -> list[Path]:
    """The visible image files of a folder, in natural order; none if there is no such folder."""
    return [
        path
        for path in visible(folder)
        if path.is_file() and path.name.lower().endswith(tuple(endings))
    ]


def paired(
    images: Sequence[Path],
    masks: Sequence[Path],
    missing_image: str,
    missing_mask: str,
    *,
    mask_key: Callable[[Path], str] = stem,
    group: Callable[[str], str] = lambda case: "",
) -> list[CaseRef]:
    """One case per image, and one per mask that has no image. What is missing is a path that does
    not exist, for the check to report.

    `missing_image` and `missing_mask` are such paths, with {} for the case.
    """
    by_key: dict[str, list[Path]] = {}
    for path in masks:
        by_key.setdefault(mask_key(path), []).append(path)
    keyed = [(stem(path), path) for path in images]
    keys = {key for key, _ in keyed}
    bare = {}  # images without a mask of their very name, by their name in lower case
    for key in keys - by_key.keys():
        bare.setdefault(key.casefold(), []).append(key)
    for key in [key for key in by_key if key not in keys]:
        if len(alike := bare.get(key.casefold(), ())) == 1 and alike[0] not in by_key:
            by_key[alike[0]] = by_key.pop(key)
    keyed += [(key, Path(missing_image.replace("{}", key))) for key in by_key if key not in keys]
    keyed.sort(key=lambda item: natural(item[0]))
    return [
        CaseRef(
            id=key,
            group=group(key),
            images=(path,),
            labels=tuple(by_key.get(key) or [Path(missing_mask.replace("{}", key))]),
        )
        for key, path in keyed
    ]


def without(path: Path, suffix: str) -> str:
    """The stem less a suffix such as `_segmentation`, in any case."""
    name = stem(path)
    return name[: -len(suffix)] if suffix and name.lower().endswith(suffix.lower()) else name


def sides(train: Sequence[CaseRef], val: Sequence[CaseRef]) -> Folds:
    """One fold."""
    return ({"train": tuple(ref.id for ref in train), "val": tuple(ref.id for ref in val)},)


def inside(ref: CaseRef, folder: Path) -> bool:
    """Whether a case's image lies in a folder."""
    return ref.images[0].is_relative_to(folder)
