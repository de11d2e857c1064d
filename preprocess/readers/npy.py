"""REC-UNet's slices: float arrays H x W x 3 of three neighbouring CT slices, already scaled, and
masks of class numbers.

Source: specification `rec_unet`, section 4. `segfleet datasets NAME slices ROOT --to OUT` writes
such folders from volumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.npy import read_npy
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    Folds,
    RawReader,
    duplicates,
    natural,
    visible,
)
from segfleet.preprocess.readers.pairs import inside, sides
from segfleet.preprocess.stores.manifest import Dataset

PARTS = ("train", "test")


class Reader(RawReader):
    about = (
        "REC-UNet's .npy slices of LiTS or MSD Task08: three CT slices per image, grouped by "
        "volume."
    )
    layout = (
        "train_image/VOLUME_SLICE.npy (H x W x 3) with train_label/VOLUME_SLICE.npy (H x W); "
        "likewise test_image, test_label"
    )
    facts = Facts(
        dims="2D",
        modality="CT",
        download="written by REC-UNet's script or `segfleet datasets lits slices`",
    )
    options = {"classes": ("liver", "vessel"), "regions": ("none", "any-tumour")}

    def lies_in(self, folder: Path) -> bool:
        return any(visible(folder / f"{part}_image", "*.npy") for part in PARTS)

    def dataset(self) -> Dataset:
        labels = {"background": 0, self.chosen["classes"]: 1, "tumour": 2}
        regions = {"any": (1, 2), "tumour": (2,)} if self.chosen["regions"] != "none" else {}
        # the script has clipped and scaled them: no further normalisation
        channels = ("noNorm",) * 3
        source = {
            "regions": regions,
            "region_order": (1, 2) if regions else (),
            "file_ending": ".png",
        }
        return Dataset(
            name=self.root.resolve().name,
            reader="npy",
            dims=2,
            channels=channels,
            labels=labels,
            **source,
        )

    def cases(self) -> list[CaseRef]:
        """What stands before the last `_` is the volume, and counts as one patient in both parts:
        their numbers may mean the same."""
        refs = []
        for part in PARTS:
            image, label = self.folder / f"{part}_image", self.folder / f"{part}_label"
            files = [p for folder in (label, image) for p in visible(folder, "*.npy")]
            names = {p.stem: p.name for p in files}
            for stem, name in sorted(names.items(), key=lambda item: natural(item[0])):
                refs.append(
                    CaseRef(
                        id=f"{part}_{stem}",
                        group=stem.rpartition("_")[0],
                        images=(image / name,),
                        labels=(label / name,),
                    )
                )
        return refs

    def problems(self) -> list[Problem]:
        return duplicates([ref.id for ref in self.refs()])

    def brought(self) -> dict[str, Folds]:
        refs = self.refs()
        train, test = (
            [ref for ref in refs if inside(ref, self.folder / f"{part}_image")] for part in PARTS
        )
        return {"given": sides(train, test)} if train and test else {}

    def may_be_empty(self, ref: CaseRef) -> bool:
        return True  # slices between tumours, or below the liver

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        array = read_npy(ref.images[0], 3, digest)
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)[:, None], np.float32), Geometry(
            shape=(1, *array.shape[:2])
        )

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        array = read_npy(ref.labels[0], 2, digest)
        return array[None], Geometry(shape=(1, *array.shape))
