"""DICOM series, one folder per case, each with a label volume (NIfTI, NRRD, MHA) on the grid of the
series."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.dicom import RTSTRUCT, header_of, is_dicom, read_series
from segfleet.preprocess.files.images import VOLUMES, read_label, stem
from segfleet.preprocess.files.segments import is_seg_nrrd, kind_of, read_rtstruct, read_seg
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    RawReader,
    declared_labels,
    duplicates,
    natural,
    visible,
)
from segfleet.preprocess.readers.places import subfolders
from segfleet.preprocess.stores.manifest import Dataset

# what anonymisers write instead of a patient
NOBODY = ("none", "anonymous", "anonymized", "anonymised", "anon", "unknown", "0", "patient", "id")


class Reader(RawReader):
    patients_from = "the files' PatientID says"
    about = "Your own DICOM series, 3D, with a label volume each."
    layout = (
        "images/CASE/ with the DICOM files of one series, and labels/CASE.nii.gz (or .seg.nrrd, "
        "DICOM SEG, RTSTRUCT); optionally labels.json with the classes"
    )
    facts = Facts(dims="3D", modality="CT, MRI, PET")

    def lies_in(self, folder: Path) -> bool:
        return any(_slices(case) for case in _cases(folder))

    @cached_property
    def modality(self) -> str:
        for case in _cases(self.folder):
            for path in _slices(case)[:1]:
                header = header_of(path, ["Modality"])
                return str(header.get("Modality", "") if header else "").strip() or "image"
        return "image"

    @cached_property
    def patient_ids(self) -> dict[str, str]:
        """Case -> PatientID of its first file; none where cases are to be told apart by their
        names, since all have one, as anonymised files do."""
        ids = {}
        for case in _cases(self.folder):
            header = next((header_of(path, ["PatientID"]) for path in _slices(case)[:1]), None)
            name = str(header.get("PatientID", "") if header else "").strip()
            if name and name.lower() not in NOBODY:
                ids[_plain(case.name)] = name
        return ids if len(set(ids.values())) > 1 else {}

    def dataset(self) -> Dataset:
        labels = declared_labels(self.folder / "labels.json") or {"background": 0, "foreground": 1}
        return Dataset(
            name=self.root.resolve().name,
            reader="dicom",
            dims=3,
            channels=(self.modality,),
            labels=labels,
        )

    def cases(self) -> list[CaseRef]:
        labels = {_stem(path): path for path in self._labels()}
        series = {_plain(case.name): _slices(case) for case in _cases(self.folder)}
        refs = []
        for case in sorted({*labels, *series}, key=natural):
            files = series.get(case) or [self.folder / "images" / case / "*.dcm"]
            label = labels.get(case, self.folder / "labels" / f"{case}.nii.gz")
            group = self.patient_ids.get(case, "")
            refs.append(CaseRef(id=case, group=group, images=tuple(files), labels=(label,)))
        return refs

    def problems(self) -> list[Problem]:
        return duplicates([_stem(path) for path in self._labels()])

    def _labels(self) -> list[Path]:
        """Volumes, and single DICOM files, of the folder labels/."""
        return [
            path
            for path in visible(self.folder / "labels")
            if path.name.lower().endswith(VOLUMES) or is_dicom(path)
        ]

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """A volume, DICOM SEG or RTSTRUCT. Labels of a series are mostly drawn on its conversion to
        NIfTI, whose axes are turned: they lie where their affine says."""
        path, names = ref.labels[0], self.dataset().labels
        if path.name.lower().endswith(VOLUMES):
            label, grid = read_label(path, digest, names)
            return label, replace(grid, file=replace(grid.file, lies=grid.file.lies or "turned"))
        if kind_of(path) == RTSTRUCT:
            values = {name: value for name, value in names.items() if value}
            return read_rtstruct(path, read_series(ref.images)[1], values, digest)
        return read_seg(path, names, digest)

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        return read_series(ref.images, digest)


def _stem(path: Path) -> str:
    if is_seg_nrrd(path):
        return _plain(path.name[: -len(".seg.nrrd")])
    return stem(path) if path.name.lower().endswith(VOLUMES) else _plain(path.stem)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _cases(folder: Path) -> list[Path]:
    images = folder / "images"
    return sorted(subfolders(images), key=lambda p: natural(p.name)) if images.is_dir() else []


def _slices(case: Path) -> list[Path]:
    return [path for path in visible(case) if is_dicom(path)]
