"""ISIC 2017, lesions in dermoscopy: official training, validation and test parts.

Source: specification `datasets_2d`, section 6. The image folders also hold
`ISIC_*_superpixels.png`, which are no masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from segfleet.preprocess.files.masks import LOSSY
from segfleet.preprocess.planning.splits import published, shuffled
from segfleet.preprocess.readers.base import CaseRef, Facts, Folds
from segfleet.preprocess.readers.pairs import (
    PairReader,
    inside,
    paired,
    pictures,
    sides,
    without,
)

SUFFIX = "_segmentation"


class Reader(PairReader):
    about = "ISIC 2017, part 1: skin lesions in dermoscopy."
    layout = (
        "ISIC-2017_Training_Data/ISIC_N.jpg with "
        "ISIC-2017_Training_Part1_GroundTruth/ISIC_N_segmentation.png; "
        "likewise Validation and Test_v2"
    )
    facts = Facts(
        dims="2D",
        modality="dermoscopy",
        download="https://challenge.isic-archive.com/data/#2017",
        licence="CC0 (to be checked at the download)",
        complete=2750,
        counts="2000 training, 150 validation, 600 test; most of the images are also in ISIC 2018",
    )
    structure = "lesion"
    held_out = 650 / 2150  # of training and validation together, in the 7:3 split
    parts: ClassVar[dict[str, tuple[str, str]]] = {  # part -> folders of images and masks
        "training": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
        "validation": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
        "test": ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
    }

    def lies_in(self, folder: Path) -> bool:
        return any(pictures(folder / images, LOSSY) for images, _ in self.parts.values())

    def cases(self) -> list[CaseRef]:
        """Parts whose masks are not there (they were released later) are no training cases; the
        training part always is."""
        refs = []
        for part, (images, masks) in self.parts.items():
            image, mask = self.folder / images, self.folder / masks
            if mask.is_dir() or part == "training" and image.is_dir():
                parts = [
                    path for path in pictures(mask, (".png",)) if without(path, SUFFIX) != path.stem
                ]
                missing = (f"{image}/{{}}.jpg", f"{mask}/{{}}{SUFFIX}.png")
                refs += paired(
                    pictures(image, LOSSY),
                    parts,
                    *missing,
                    mask_key=lambda path: without(path, SUFFIX),
                )
        return refs

    def brought(self) -> dict[str, Folds]:
        refs = self.refs()
        part = {
            name: [ref for ref in refs if inside(ref, self.folder / images)]
            for name, (images, _) in self.parts.items()
        }
        splits = {
            "official": sides(part["training"], part["validation"]),
            "official-test": sides(part["training"], part["test"]),
        }
        splits = {
            name: folds for name, folds in splits.items() if folds[0]["train"] and folds[0]["val"]
        }
        # MALUNet, EGE-UNet and VM-UNet divide training and validation images 7:3, by names of their
        # own drawing: 1500 and 650 of ISIC 2017, 1886 and 808 of ISIC 2018
        if part["training"] and part["validation"]:
            order = shuffled([ref.id for ref in part["training"] + part["validation"]], 42)
            cut = len(order) - round(self.held_out * len(order))
            train, val = tuple(sorted(order[:cut])), tuple(sorted(order[cut:]))
            splits["70-30-shuffle42"] = ({"train": train, "val": val},)
        # papers draw from the training part
        return {
            **splits,
            **published([ref.id for ref in part["training"] or refs]),
        }
