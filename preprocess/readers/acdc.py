"""ACDC, cine cardiac MRI: a folder per patient, Info.cfg names the end-diastolic and end-systolic
frames.

Source: specification `datasets_3d`, section 1.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from segfleet.core.errors import Problem
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
from segfleet.preprocess.readers.places import subfolders
from segfleet.preprocess.stores.manifest import Dataset

PARTS = ("training", "testing")
# by TransUNet, nnFormer, UNETR++, E2MISeg
EVALUATED = (
    2,
    3,
    8,
    9,
    12,
    14,
    17,
    24,
    42,
    48,
    49,
    53,
    55,
    64,
    67,
    79,
    81,
    88,
    92,
    95,
)
# by TransUNet and nnFormer, whose code lists them; the other 70 train
VALIDATED = (
    89,
    90,
    91,
    93,
    94,
    96,
    97,
    98,
    99,
    100,
)
NNUNET_SEED = 1234


class Reader(RawReader):
    about = "ACDC: heart chambers in cine MRI, end-diastole and end-systole of each patient."
    layout = (
        "training/patientNNN/ (and testing/) with Info.cfg, patientNNN_frameMM.nii.gz, "
        "patientNNN_frameMM_gt.nii.gz"
    )
    facts = Facts(
        dims="3D",
        modality="MRI",
        download="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html",
        licence="CC BY-NC-SA 4.0",
        complete=300,
        counts="150 patients, two volumes each: 100 for training, 50 for testing",
    )

    def lies_in(self, folder: Path) -> bool:
        return any(visible(patient) for part in PARTS for patient in _patients(folder / part))

    def dataset(self) -> Dataset:
        labels = {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}
        return Dataset(
            name="acdc",
            reader="acdc",
            dims=3,
            channels=("MRI",),
            labels=labels,
            licence=self.facts.licence,
        )

    @cached_property
    def patients(self) -> list[Path]:
        return [patient for part in PARTS for patient in _patients(self.folder / part)]

    def cases(self) -> list[CaseRef]:
        """Testing patients without labels (older downloads) are no training cases."""
        refs = []
        for patient in self.patients:
            frames = _frames(patient)
            if (
                self.labelled
                and patient.parent.name == "testing"
                and not {_label(image).name for image in frames}
                & {path.name.lower() for path in patient.iterdir()}
            ):
                continue
            refs += [
                CaseRef(id=_id(image), group=patient.name, images=(image,), labels=(_label(image),))
                for image in frames
            ]
        return refs

    def problems(self) -> list[Problem]:
        problems = duplicates([ref.id for ref in self.refs()])
        for patient in self.patients:
            file = patient / "Info.cfg"
            if not file.is_file():
                mend = "Add the file: only it tells the two frames."
                problems.append(
                    Problem(
                        case=patient.name,
                        field="Info.cfg",
                        found="no file",
                        expected="ED: and ES: frame numbers",
                        mend=mend,
                    )
                )
            elif missing := [key for key in ("ED", "ES") if key not in info(file)]:
                wording = {"expected": "lines 'ED: 1' and 'ES: 12'", "mend": "Complete the file."}
                problems.append(
                    Problem(
                        case=patient.name,
                        field="Info.cfg",
                        found=f"no frame for {' and '.join(missing)}",
                        **wording,
                    )
                )
        return problems

    def brought(self) -> dict[str, Folds]:
        """official: 100 training, 50 testing patients. evaluated-20: the published 20 of the
        training patients against the other 80.
        transunet: 70 against 10 of those 80; transunet-test: the 70 against the 20. nnunet: 5 folds
        of the training patients, shuffled, every fifth."""
        refs = self.refs()
        train = [ref for ref in refs if inside(ref, self.folder / "training")]
        test = [ref for ref in refs if inside(ref, self.folder / "testing")]
        evaluated, validated = (
            {f"patient{number:03d}" for number in numbers} for numbers in (EVALUATED, VALIDATED)
        )
        twenty, ten = (
            [r for r in train if r.group in patients] for patients in (evaluated, validated)
        )
        seventy = [r for r in train if r.group not in evaluated | validated]
        splits = {
            "official": sides(train, test),
            "evaluated-20": sides([r for r in train if r.group not in evaluated], twenty),
            "transunet": sides(seventy, ten),
            "transunet-test": sides(seventy if ten else [], twenty),
            "nnunet": _every_fifth(train),
        }
        return {
            name: folds
            for name, folds in splits.items()
            if all(fold["train"] and fold["val"] for fold in folds)
        }


def info(file: Path) -> dict[str, int]:
    """The frame numbers of Info.cfg: lines `key: value`."""
    pairs = (
        line.partition(":")
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return {key.strip(): int(value) for key, _, value in pairs if value.strip().isdecimal()}


def _patients(part: Path) -> list[Path]:
    return (
        [folder for folder in subfolders(part) if folder.name.startswith("patient")]
        if part.is_dir()
        else []
    )


def _frames(patient: Path) -> list[Path]:
    """The images of end-diastole and end-systole, the earlier frame first."""
    file = patient / "Info.cfg"
    numbers = info(file) if file.is_file() else {}
    return [
        _image(patient, number)
        for number in sorted({numbers[key] for key in ("ED", "ES") if key in numbers})
    ]


def _image(patient: Path, frame: int) -> Path:
    names = [f"{patient.name}_frame{frame:02d}.nii.gz", f"{patient.name}_frame{frame:02d}.nii"]
    return next(
        (patient / name for name in names if (patient / name).is_file()), patient / names[0]
    )


def _label(image: Path) -> Path:
    return image.with_name(image.name.replace(".nii", "_gt.nii"))


def _id(image: Path) -> str:
    return image.name.partition(".nii")[0]


def _every_fifth(refs: list[CaseRef]) -> Folds:
    patients = np.array(sorted({ref.group for ref in refs}, key=natural))
    np.random.RandomState(NNUNET_SEED).shuffle(patients)
    folds = [set(patients[fold::5].tolist()) for fold in range(5)]
    return tuple(
        sides([r for r in refs if r.group not in val], [r for r in refs if r.group in val])[0]
        for val in folds
    )
