"""What 2D data sets with black-and-white masks share: pairs by stem, colours without alpha, masks
by threshold.

Source: specification `datasets_2d`, the rules that hold for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import (
    ENDINGS,
    ImageError,
    ending,
    read_file,
    read_image,
    stem,
)
from segfleet.preprocess.planning.splits import published
from segfleet.preprocess.readers.base import CaseRef, Folds, RawReader, duplicates, natural, visible
from segfleet.preprocess.stores.manifest import Dataset

LOSSY = (".jpg", ".jpeg")
UNDECIDED = 0.1  # share of pixels a mask may have that are neither black nor white


class PairReader(RawReader):
    """An image and one binary mask of the same stem. A layout says where they are (`refs`) and what
    the mask shows (`structure`)."""

    structure: ClassVar[str]  # name of label 1
    several: ClassVar[bool] = False  # more than one mask per image is usual

    def dataset(self) -> Dataset:
        name = type(self).__module__.rpartition(".")[2]
        labels = {"background": 0, self.structure: 1}
        facts = {
            "channels": ("R", "G", "B"),
            "labels": labels,
            "file_ending": ".png",
            "licence": self.facts.licence,
        }
        return Dataset(name=self.name(name), reader=name, dims=2, **facts)

    def name(self, layout: str) -> str:
        return layout

    def problems(self) -> list[Problem]:
        refs = self.refs()
        found = duplicates([ref.id for ref in refs])
        for ref in refs if not self.several else ():
            if len(ref.labels) > 1:
                files = ", ".join(path.name for path in ref.labels)
                mend = "Keep the right one."
                found.append(
                    Problem(
                        case=ref.id,
                        field="label",
                        found=f"{len(ref.labels)} masks: {files}",
                        expected="one",
                        mend=mend,
                    )
                )
        return found

    def splits(self) -> dict[str, Folds]:
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
    together, first = None, None
    for path in paths:
        mask, geometry = (read or read_mask)(path, digest)
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
            together = together | mask
    return together.astype(np.uint8), first


def read_mask(path: Path, digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """Bool (1, Y, X): above half of white. White is the largest value present (masks of 0/1 and of
    0/255 occur); 255 in a JPEG, whose compression rings around black too. Raises ImageError for
    what is no mask."""
    grey, geometry = read_grey(path, digest)
    white = 255.0 if ending(path) in LOSSY else float(grey.max())
    undecided = float(((grey > 0.1 * white) & (grey < 0.9 * white)).mean()) if white else 0.0
    if undecided > UNDECIDED:
        found = f"{undecided:.0%} of the pixels of {path.name} neither black nor white"
        raise ImageError(
            path,
            "mask values",
            found,
            "a black and white mask",
            "Perhaps it is the image itself: put the mask there.",
        )
    return grey > white / 2, geometry


def read_grey(path: Path, digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """(1, Y, X): one channel of a mask that may have been saved in colour. Raises ImageError if the
    colours differ."""
    array, geometry = read_file(path, digest, label=True)
    array = opaque(array)
    if len(array) > 1:
        low, high = array.min(axis=0).astype(np.int64), array.max(axis=0).astype(np.int64)
        if ((high - low) > 32).mean() > 0.01:
            raise ImageError(
                path,
                "label channels",
                f"{len(array)} that differ",
                "1",
                "Save the mask as one grey channel.",
            )
        array = array[:1]
    return array[0], geometry


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
    not exist, for the check to tell.

    `missing_image` and `missing_mask` are such paths, with {} for the case.
    """
    by_key: dict[str, list[Path]] = {}
    for path in masks:
        by_key.setdefault(mask_key(path), []).append(path)
    keys = [stem(path) for path in images]
    found = [(key, path) for key, path in zip(keys, images, strict=True)]
    found += [
        (key, Path(missing_image.replace("{}", key))) for key in by_key if key not in set(keys)
    ]
    found.sort(key=lambda item: natural(item[0]))
    return [
        CaseRef(
            id=key,
            group=group(key),
            images=(path,),
            labels=tuple(by_key.get(key) or [Path(missing_mask.replace("{}", key))]),
        )
        for key, path in found
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
