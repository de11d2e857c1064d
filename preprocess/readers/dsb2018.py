"""2018 Data Science Bowl, stage 1: one folder per image, one mask file per nucleus; the target is their union.

Source: specification `datasets_2d`, section 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import Geometry
from segfleet.preprocess.images import ImageError, read_image, read_label
from segfleet.preprocess.manifest import Dataset
from segfleet.preprocess.problems import InputError
from segfleet.preprocess.readers.base import CaseRef, RawReader, visible


class Reader(RawReader):
    about = "2018 Data Science Bowl: nuclei in light microscopy, 2D."
    layout = "a folder with stage1_train/ID/images/ID.png and stage1_train/ID/masks/*.png"

    def __init__(self, root: str | Path):
        super().__init__(root)
        inner = self.root / "stage1_train"
        self.folder = inner if inner.is_dir() else self.root
        self.folders = [p for p in visible(self.folder) if (p / "images").is_dir() or (p / "masks").is_dir()]
        if not self.folders:
            raise InputError(f"raw: {self.folder} holds no folder ID/images. Expected {self.layout}")

    def dataset(self) -> Dataset:
        labels = {"background": 0, "nucleus": 1}
        return Dataset(name="dsb2018", reader="dsb2018", dims=2, channels=("R", "G", "B"), labels=labels, file_ending=".png", licence="CC0")

    def refs(self) -> list[CaseRef]:
        refs = []
        for folder in self.folders:
            images = visible(folder / "images", "*.png") or [folder / "images" / f"{folder.name}.png"]
            masks = visible(folder / "masks", "*.png") or [folder / "masks" / "*.png"]
            refs.append(CaseRef(id=folder.name, images=(images[0],), labels=tuple(masks)))
        return refs

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """RGB without alpha; a grey file is repeated to three channels."""
        image, geometry = read_image(ref.images, digest)
        return (np.repeat(image, 3, axis=0) if len(image) == 1 else image), geometry

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """The union of all masks: 1 where any of them is above 0."""
        union, first = None, None
        for path in ref.labels:
            mask, geometry = read_label(path, digest)
            if union is None:
                union, first = mask > 0, geometry
            elif mask.shape != union.shape:
                found = "x".join(map(str, mask.shape))
                expected = "x".join(map(str, union.shape))
                raise ImageError(path, f"shape of mask {path.name}", found, expected, "Remove the mask or replace it.")
            else:
                union |= mask > 0
        return union.astype(np.uint8), first
