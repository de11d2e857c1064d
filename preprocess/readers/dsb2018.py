"""2018 Data Science Bowl, stage 1: one folder per image, one mask file per nucleus; the target is
their union.

Source: specification `datasets_2d`, section 5.
"""

from __future__ import annotations

from pathlib import Path

from segfleet.preprocess.readers.base import CaseRef, Facts, visible
from segfleet.preprocess.readers.pairs import PairReader, pictures
from segfleet.preprocess.readers.places import subfolders


class Reader(PairReader):
    about = "2018 Data Science Bowl: nuclei in light microscopy, 2D."
    layout = "a folder with stage1_train/ID/images/ID.png and stage1_train/ID/masks/*.png"
    facts = Facts(
        dims="2D",
        modality="light microscopy",
        download="https://bbbc.broadinstitute.org/BBBC038",
        licence="CC0",
        complete=670,
        counts="670 images of stage 1 training, about 29400 nuclei; papers divide these 670",
    )
    structure = "nucleus"
    several = True

    def lies_in(self, folder: Path) -> bool:
        return any(visible(case / "images") for case in _cases(folder))

    def cases(self) -> list[CaseRef]:
        refs = []
        for folder in _cases(self.folder):
            images = pictures(folder / "images") or [folder / "images" / f"{folder.name}.png"]
            masks = pictures(folder / "masks") or [folder / "masks" / "*.png"]
            refs.append(CaseRef(id=folder.name, images=(images[0],), labels=tuple(masks)))
        return refs


def _cases(folder: Path) -> list[Path]:
    inner = folder / "stage1_train"
    return [
        p
        for p in subfolders(inner if inner.is_dir() else folder)
        if (p / "images").is_dir() or (p / "masks").is_dir()
    ]
