"""BUSI, breast ultrasound: three folders, the mask beside its image, several masks for several
lesions.

Source: specification `datasets_2d`, section 1.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from segfleet.preprocess.files.images import stem
from segfleet.preprocess.readers.base import CaseRef, Facts
from segfleet.preprocess.readers.pairs import PairReader, paired, pictures

KINDS = ("benign", "malignant", "normal")
MASK = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)


class Reader(PairReader):
    about = "BUSI: lesions in breast ultrasound."
    layout = (
        "Dataset_BUSI_with_GT/{benign,malignant,normal}/'benign (N).png' with 'benign "
        "(N)_mask.png', '..._mask_1.png'"
    )
    facts = Facts(
        dims="2D",
        modality="ultrasound",
        download="https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
        licence="CC0 on the Kaggle page (to be checked there)",
        complete=780,
        counts="780: 437 benign, 210 malignant, 133 normal with empty masks; 17 images have more "
        "than one mask",
    )
    options = {"normals": ("keep", "drop")}
    structure = "lesion"
    several = True

    def lies_in(self, folder: Path) -> bool:
        return any(pictures(folder / kind, (".png",)) for kind in KINDS)

    def name(self, layout: str) -> str:
        return layout if self.chosen["normals"] == "keep" else f"{layout}-lesions"

    def cases(self) -> list[CaseRef]:
        refs = []
        for kind in KINDS if self.chosen["normals"] == "keep" else KINDS[:2]:
            files = pictures(self.folder / kind, (".png",))
            masks = [path for path in files if MASK.search(stem(path))]
            images = [path for path in files if not MASK.search(stem(path))]
            folder = str(self.folder / kind)
            pairs = paired(
                images,
                masks,
                f"{folder}/{{}}.png",
                f"{folder}/{{}}_mask.png",
                mask_key=lambda path: MASK.sub("", stem(path)),
            )
            refs += [replace(ref, stratum=kind) for ref in pairs]
        return refs

    def may_be_empty(self, ref: CaseRef) -> bool:
        return ref.images[0].parent.name == "normal"
