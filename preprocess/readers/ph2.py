"""PH2, lesions in dermoscopy: a folder per image with folders for the picture, the lesion and its
colours.

Source: specification `datasets_2d`, section 8.
"""

from __future__ import annotations

from pathlib import Path

from segfleet.preprocess.readers.base import CaseRef, Facts
from segfleet.preprocess.readers.pairs import PairReader, pictures
from segfleet.preprocess.readers.places import subfolders


class Reader(PairReader):
    about = "PH2: skin lesions in dermoscopy, mostly an external test set."
    layout = (
        "'PH2Dataset/PH2 Dataset images'/IMDnnn/IMDnnn_Dermoscopic_Image/IMDnnn.bmp with "
        "IMDnnn/IMDnnn_lesion/IMDnnn_lesion.bmp"
    )
    facts = Facts(
        dims="2D",
        modality="dermoscopy",
        download="https://www.fc.up.pt/addi/ph2%20database.html",
        licence="research and education; no redistribution, not commercial",
        complete=200,
        counts="200 images: 80 common naevi, 80 atypical, 40 melanoma",
    )
    structure = "lesion"

    def lies_in(self, folder: Path) -> bool:
        return any(_images(case) for case in subfolders(_inner(folder)))

    def cases(self) -> list[CaseRef]:
        refs = []
        for case in subfolders(_inner(self.folder)):
            images, lesions = _images(case), pictures(case / f"{case.name}_lesion")
            if images or lesions:  # other folders are none of ours
                image = images or [case / f"{case.name}_Dermoscopic_Image" / f"{case.name}.bmp"]
                lesion = lesions or [case / f"{case.name}_lesion" / f"{case.name}_lesion.bmp"]
                refs.append(CaseRef(id=case.name, images=(image[0],), labels=tuple(lesion)))
        return refs


def _inner(folder: Path) -> Path:
    inner = folder / "PH2 Dataset images"
    return inner if inner.is_dir() else folder


def _images(case: Path) -> list[Path]:
    return pictures(case / f"{case.name}_Dermoscopic_Image")
