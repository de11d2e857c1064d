"""Your own images beside their masks, of the same stem: the plainest layout, and the one most 2D
projects convert to.

Understood too: `train`, `val` and `test` folders with such a pair in each (they become the split
"given"), a folder of masks per class (`masks/0`, `masks/1`: class k + 1, later ones over earlier),
and stems that end in `_mask`, `_segmentation`, `_anno`, `_lesion` or `_gt`. Without labels.json
({"background": 0, "name": 1, ...}) masks are black and white. Source: specification `datasets_2d`.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import NATURAL, ending, peek, read_image, read_label, stem
from segfleet.preprocess.files.masks import read_mask
from segfleet.preprocess.planning.splits import published
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    Folds,
    declared_labels,
    visible,
)
from segfleet.preprocess.readers.pairs import (
    PairReader,
    colours,
    inside,
    paired,
    pictures,
    sides,
    union,
)
from segfleet.preprocess.readers.places import subfolders
from segfleet.preprocess.stores.manifest import Dataset

PARTS = ("train", "val", "test")
SUFFIX = re.compile(r"_(mask|segmentation|anno|lesion|gt)$", re.IGNORECASE)


class Reader(PairReader):
    about = "Your own images/ and masks/, 2D or 3D, in any known format."
    layout = (
        "images/STEM.png and masks/STEM.png, or train|val|test/{images,masks}; optionally "
        "labels.json with the classes"
    )
    facts = Facts(dims="2D, 3D", modality="any")
    structure = "foreground"

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        self.classes = {p: _classes(p / "masks") for p in _parts(self.folder)}

    def lies_in(self, folder: Path) -> bool:
        return any(pictures(part / "images") for part in _parts(folder))

    @cached_property
    def declared(self) -> dict[str, int]:
        """The classes of labels.json; empty without one."""
        return declared_labels(self.folder / "labels.json")

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(channels, dims), from the headers: a set with any colour image is one of colours; one
        slice is 2D."""
        flat = True
        channels = 1
        for path in (ref.images[0] for ref in self.cases()):
            own, depth, _, _ = peek(path)
            natural = ending(path) in NATURAL
            flat &= natural or depth <= 1
            # a second or fourth channel of a picture is alpha
            channels = max(channels, (3 if own >= 3 else 1) if natural else own)
        return channels, 2 if flat else 3

    def dataset(self) -> Dataset:
        channels, dims = self.shape
        several = max((len(folders) for folders in self.classes.values()), default=0)
        labels = self.declared
        if not labels and several > 1:
            labels = {"background": 0, **{f"class {index}": index + 1 for index in range(several)}}
        labels = labels or {"background": 0, self.structure: 1}
        names = (
            ("grey",) if channels == 1 else tuple(f"channel {index}" for index in range(channels))
        )
        if (channels, dims) == (3, 2):
            names = ("R", "G", "B")
        ends = ".nii.gz" if dims == 3 else ".png"
        return Dataset(
            name=self.root.resolve().name,
            reader="folder",
            dims=dims,
            channels=names,
            labels=labels,
            file_ending=ends,
        )

    def cases(self) -> list[CaseRef]:
        refs = []
        for part, folders in self.classes.items():
            masks = [path for folder in folders or [part / "masks"] for path in pictures(folder)]
            missing = (
                f"{part / 'images'}/{{}}.png",
                f"{(folders or [part / 'masks'])[0]}/{{}}.png",
            )
            refs += paired(
                pictures(part / "images"),
                masks,
                *missing,
                mask_key=lambda path: SUFFIX.sub("", stem(path).removesuffix(".seg")),
            )
        return refs

    def problems(self) -> list[Problem]:
        self.several = any(len(folders) > 1 for folders in self.classes.values())
        return super().problems()

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        image, geometry = read_image(ref.images, digest)
        return colours(image, geometry) if self.shape == (3, 2) else (image, geometry)

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        classes = next((folders for part, folders in self.classes.items() if inside(ref, part)), [])
        if len(classes) > 1:
            _, geometry = union(ref.labels, digest)  # which compares the sizes
            label = np.zeros(geometry.shape, np.uint8)
            for path in ref.labels:
                label[read_mask(path)[0]] = classes.index(path.parent) + 1
            return label, geometry
        return (
            read_label(ref.labels[0], digest, self.declared)
            if self.declared
            else _binary(ref.labels[0], digest)
        )

    def brought(self) -> dict[str, Folds]:
        refs = self.refs()
        part = {name: [ref for ref in refs if inside(ref, self.folder / name)] for name in PARTS}
        splits = {
            "given": sides(part["train"], part["val"] or part["test"]),
            "given-test": sides(part["train"], part["test"]),
        }
        splits = {
            name: folds for name, folds in splits.items() if folds[0]["train"] and folds[0]["val"]
        }
        return {**splits, **published([ref.id for ref in refs])}


def _parts(folder: Path) -> list[Path]:
    """Folders that hold images/ and masks/: the folder itself, or train, val and test in it."""
    inner = [folder / name for name in PARTS if (folder / name / "images").is_dir()]
    return inner or [folder]


def _classes(masks: Path) -> list[Path]:
    """masks/0, masks/1, ...; none where the masks lie in `masks` itself."""
    folders = [
        folder
        for folder in (subfolders(masks) if masks.is_dir() else [])
        if folder.name.isdecimal()
    ]
    return (
        sorted(folders, key=lambda folder: int(folder.name))
        if folders and not visible(masks, "*.*")
        else []
    )


def _binary(path: Path, digest: Any) -> tuple[np.ndarray, Geometry]:
    """A volume's labels are read as they are: without labels.json they have to be 0 and 1."""
    if ending(path) in (".nii", ".nii.gz", ".nrrd", ".mha"):
        return read_label(path, digest)
    return union((path,), digest)
