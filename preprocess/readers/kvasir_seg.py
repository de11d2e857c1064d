"""Kvasir-SEG, polyps in colonoscopy: images and masks are both JPEG.

Source: specification `datasets_2d`, section 3.
"""

from __future__ import annotations

from pathlib import Path

from segfleet.preprocess.readers.base import CaseRef, Facts, Folds
from segfleet.preprocess.readers.pairs import PairReader, paired, pictures
from segfleet.preprocess.readers.places import locate


class Reader(PairReader):
    about = "Kvasir-SEG: polyps in colonoscopy; the masks are JPEG."
    layout = "Kvasir-SEG/images/ID.jpg and Kvasir-SEG/masks/ID.jpg; train.txt and val.txt of the authors if present"
    facts = Facts(
        dims="2D",
        modality="colonoscopy",
        download="https://datasets.simula.no/kvasir-seg/",
        licence="research and education only",
        complete=1000,
        counts="1000 images, 332x487 to 1920x1072; the authors' lists divide them into 880 and 120",
    )
    structure = "polyp"

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        self.folder = locate(self.root, lambda p: any(pictures(p / "images")) and (p / "masks").is_dir(), self.layout)

    def refs(self) -> list[CaseRef]:
        images, masks = self.folder / "images", self.folder / "masks"
        return paired(pictures(images), pictures(masks), f"{images}/{{}}.jpg", f"{masks}/{{}}.jpg")

    def splits(self) -> dict[str, Folds]:
        """The authors' lists (880 and 120), where their files lie beside the images, and the random ones of papers."""
        lists = [self.folder / name for name in ("train.txt", "val.txt")]
        if not all(path.is_file() for path in lists):
            return super().splits()
        known = {ref.id for ref in self.refs()}
        train, val = (
            tuple(name for name in path.read_text(encoding="utf-8-sig", errors="replace").split() if name in known) for path in lists
        )
        return {"official": ({"train": tuple(n for n in train if n not in set(val)), "val": val},), **super().splits()}
