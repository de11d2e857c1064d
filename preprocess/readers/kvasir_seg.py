"""Kvasir-SEG, polyps in colonoscopy: images and masks are both JPEG.

Source: specification `datasets_2d`, section 3.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from segfleet.core.errors import Problem
from segfleet.preprocess.files.images import ENDINGS
from segfleet.preprocess.readers.base import CaseRef, Facts, Folds, fold_problems
from segfleet.preprocess.readers.pairs import PairReader, paired, pictures


class Reader(PairReader):
    about = "Kvasir-SEG: polyps in colonoscopy; the masks are JPEG."
    layout = (
        "Kvasir-SEG/images/ID.jpg and Kvasir-SEG/masks/ID.jpg; train.txt and val.txt of the "
        "authors if present"
    )
    facts = Facts(
        dims="2D",
        modality="colonoscopy",
        download="https://datasets.simula.no/kvasir-seg/",
        licence="research and education only",
        complete=1000,
        counts="1000 images, 332x487 to 1920x1072; the authors' lists divide them into 880 and 120",
    )
    structure = "polyp"

    def lies_in(self, folder: Path) -> bool:
        return any(pictures(folder / "images")) and (folder / "masks").is_dir()

    def cases(self) -> list[CaseRef]:
        images, masks = self.folder / "images", self.folder / "masks"
        return paired(pictures(images), pictures(masks), f"{images}/{{}}.jpg", f"{masks}/{{}}.jpg")

    @cached_property
    def lists(self) -> dict[str, tuple[str, ...]]:
        """The authors' "train" and "val", names with or without an ending; none unless both files
        are there."""
        files = {side: self.folder / f"{side}.txt" for side in ("train", "val")}
        if not all(path.is_file() for path in files.values()):
            return {}
        return {
            side: tuple(map(_id, path.read_text(encoding="utf-8-sig", errors="replace").split()))
            for side, path in files.items()
        }

    def problems(self) -> list[Problem]:
        lists = (
            fold_problems(
                "train.txt, val.txt", "names", self.lists, {ref.id for ref in self.refs()}, "images"
            )
            if self.lists
            else []
        )
        return super().problems() + lists

    def brought(self) -> dict[str, Folds]:
        """The authors' lists (880 and 120), where their files lie beside the images, and the random
        ones of papers."""
        ids = {ref.id for ref in self.refs()}
        train, val = (
            tuple(name for name in self.lists.get(side, ()) if name in ids)
            for side in ("train", "val")
        )
        validates = set(val)
        train = tuple(name for name in train if name not in validates)
        return {
            **({"official": ({"train": train, "val": val},)} if train and val else {}),
            **super().brought(),
        }


def _id(name: str) -> str:
    """Of a list's entry: images/ID.jpg or ID."""
    name = name.rpartition("/")[2]
    return next((name[: -len(end)] for end in ENDINGS if name.lower().endswith(end)), name)
