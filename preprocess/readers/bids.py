"""BIDS with segmentations in derivatives: sub-*/.../*_T1w.nii.gz and
derivatives/*/.../*_dseg.nii.gz.

Source: BIDS 1.9, "Imaging data derivatives: segmentations".
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.files.faults import is_regular
from segfleet.preprocess.files.images import NIFTI, stem
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    RawReader,
    declared_labels,
    duplicates,
    natural,
    number,
    read_table,
)
from segfleet.preprocess.stores.manifest import Dataset

OF_THE_LABEL = ("space", "desc", "label", "atlas", "seg", "res", "den")  # not of the image


class Reader(RawReader):
    about = "BIDS: images of subjects, discrete segmentations (dseg) in derivatives."
    layout = (
        "dataset_description.json, sub-ID/[ses-ID/]anat/*_T1w.nii.gz and "
        "derivatives/NAME/sub-ID/.../*_dseg.nii.gz with *dseg.tsv (index, name) or labels.json"
    )
    facts = Facts(dims="3D", modality="MRI")
    patients_from = "BIDS says: its subjects"

    def __init__(self, root: str | Path, *, labelled: bool = True, **options: str):
        super().__init__(root, labelled=labelled, **options)
        if labelled and not self.segmentations:
            raise InputError(f"raw: {self.root} holds no *_dseg.nii.gz. Expected {self.layout}")

    @cached_property
    def segmentations(self) -> list[Path]:
        files = [p for p in _volumes(self.root, "derivatives/**/sub-*") if _suffix(p) == "dseg"]
        return sorted(files, key=lambda p: natural(p.name))

    @cached_property
    def images(self) -> dict[tuple, dict[str, Path]]:
        """The entities of an image (subject, session, ...) -> suffix, such as T1w -> file."""
        images: dict[tuple, dict[str, Path]] = {}
        for path in sorted(_volumes(self.root, "sub-*/**/sub-*")):
            if (suffix := _suffix(path)) != "dseg":
                images.setdefault(_key(_entities(path)), {})[suffix] = path
        return images

    @cached_property
    def keys(self) -> list[tuple]:
        """The entities of every case: what is segmented or, without labels, whatever lies in a
        folder anat."""
        if self.labelled:
            return [_key(_entities(path)) for path in self.segmentations]
        anat = [
            k
            for k, have in self.images.items()
            if any(p.parent.name == "anat" for p in have.values())
        ]
        return sorted(anat, key=lambda key: natural(_text(key)))

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """The suffixes that every case has an image of."""
        sets = [set(self.images.get(key, {})) for key in self.keys]
        common = set.intersection(*[s for s in sets if s] or [set()])
        return tuple(sorted(common)) or ("image",)

    def dataset(self) -> Dataset:
        return Dataset(
            name=self.root.resolve().name, reader="bids", dims=3, channels=self.channels,
            labels=self.labels if self.labelled else {"background": 0},
        )  # fmt: skip

    @cached_property
    def labels(self) -> dict[str, int]:
        if declared := declared_labels(self.root / "labels.json"):
            return declared
        tables = sorted(self.root.glob("derivatives/**/*dseg.tsv"))
        for path in tables:
            if not is_regular(path):
                continue
            pairs = {
                row["name"]: number(row["index"], "index", path)
                for row in read_table(path, "\t")[1]
                if row.get("index", "").isdecimal() and row.get("name")
            }
            if pairs:
                named = {name: value for name, value in pairs.items() if value}
                return {"background": 0, **dict(sorted(named.items(), key=lambda i: i[1]))}
        raise InputError(f"raw: {self.root} names no labels. Expected {self.layout}")

    def cases(self) -> list[CaseRef]:
        refs, labels = [], self.segmentations if self.labelled else [None] * len(self.keys)
        for key, label in zip(self.keys, labels, strict=True):
            subject, have = f"sub-{dict(key)['sub']}", self.images.get(key, {})
            missing = self.root / subject / "anat"
            images = tuple(have.get(s, missing / f"{_text(key)}_{s}.nii.gz") for s in self.channels)
            own = (label,) if label else ()
            refs.append(CaseRef(id=_text(key), group=subject, images=images, labels=own))
        return refs

    def problems(self) -> list[Problem]:
        return duplicates([ref.id for ref in self.refs()])


def _volumes(root: Path, pattern: str) -> list[Path]:
    files = [path for path in root.glob(pattern) if path.name.lower().endswith(NIFTI)]
    return [path for path in files if path.is_file()]


def _suffix(path: Path) -> str:
    return stem(path).rpartition("_")[2]


def _entities(path: Path) -> dict[str, str]:
    pairs = stem(path).split("_")[:-1]
    matches = [re.fullmatch(r"([a-zA-Z]+)-(.+)", pair) for pair in pairs]
    return {match[1]: match[2] for match in matches if match}


def _key(entities: dict[str, str]) -> tuple:
    return tuple((k, v) for k, v in entities.items() if k not in OF_THE_LABEL)


def _text(key: tuple) -> str:
    return "_".join(f"{name}-{value}" for name, value in key)
