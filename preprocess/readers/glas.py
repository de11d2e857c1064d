"""GlaS (Warwick-QU), glands in histology: one flat folder, masks of instance numbers, official test
parts A and B.

Source: specification `datasets_2d`, section 4.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import ImageError, read_file, stem
from segfleet.preprocess.files.masks import read_grey
from segfleet.preprocess.readers.base import CaseRef, Facts, Folds, read_table, tables
from segfleet.preprocess.readers.pairs import (
    PairReader,
    paired,
    pictures,
    sides,
    union,
    without,
)

SUFFIX = "_anno"
MOST_GLANDS = 128  # of one image: a mask with more numbers is no mask


class Reader(PairReader):
    about = "GlaS (Warwick-QU): glands in H&E histology."
    layout = (
        "'Warwick QU Dataset (Released 2016_07_08)'/{train_N,testA_N,testB_N}.bmp, each with "
        "..._anno.bmp; Grade.csv"
    )
    facts = Facts(
        dims="2D",
        modality="histology",
        download="https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/",
        licence="research, after registration; not commercial",
        complete=165,
        counts="165 images of 16 slides: 85 train, 60 test A, 20 test B; 1530 glands",
    )
    structure = "gland"

    def lies_in(self, folder: Path) -> bool:
        return bool(_files(folder))

    @cached_property
    def patients(self) -> dict[str, str]:
        """Image -> patient, from Grade.csv."""
        for path in tables(self.folder):
            names, rows = read_table(path)
            patient = next((name for name in names if "patient" in name.lower()), None)
            if patient is not None:
                return {
                    row[names[0]].strip(): f"patient{row[patient].strip()}"
                    for row in rows
                    if row[patient].strip()
                }
        return {}

    def cases(self) -> list[CaseRef]:
        files = _files(self.folder)
        masks = [path for path in files if stem(path).lower().endswith(SUFFIX)]
        painted = set(masks)
        images = [path for path in files if path not in painted]
        missing = (f"{self.folder}/{{}}.bmp", f"{self.folder}/{{}}{SUFFIX}.bmp")
        return paired(
            images,
            masks,
            *missing,
            mask_key=lambda path: without(path, SUFFIX),
            group=lambda case: self.patients.get(case, ""),
        )

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        return union(ref.labels, digest, read_instances)

    def brought(self) -> dict[str, Folds]:
        refs = self.refs()
        part = {
            name: [ref for ref in refs if ref.id.startswith(name)]
            for name in ("train_", "testA_", "testB_")
        }
        tests = {
            "official": part["testA_"] + part["testB_"],
            "official-a": part["testA_"],
            "official-b": part["testB_"],
        }
        return {
            **{
                name: sides(part["train_"], val)
                for name, val in tests.items()
                if val and part["train_"]
            },
            **super().brought(),
        }


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in pictures(folder)
        if path.name.lower().startswith(("train_", "testa_", "testb_"))
    ]


def read_instances(path: Path, digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """Bool (1, Y, X): any gland. Numbers are small, so no threshold of grey would see them."""
    numbers, geometry = read_grey(path, digest, label=True)
    glands = len(np.unique(numbers)) - 1
    if glands > MOST_GLANDS:
        found = f"{glands} different numbers in {path.name}"
        raise ImageError(
            path,
            "mask values",
            found,
            f"at most {MOST_GLANDS} glands",
            "Perhaps it is the image itself: put the mask there.",
        )
    shown, _ = read_file(path)  # of a palette: what its colours show
    return shown.any(axis=0), geometry
