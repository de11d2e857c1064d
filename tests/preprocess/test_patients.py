"""Who is whose patient: names that people use, and the table that says it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.planning import patients
from segfleet.preprocess.planning.patients import by_names
from segfleet.preprocess.planning.splits import Member, disjoint, kfold
from segfleet.preprocess.readers.base import open_reader


def many(pattern: str, people: int, each: int) -> list[str]:
    return [pattern.format(p, s) for p in range(1, people + 1) for s in range(each)]


SLICED = {  # 20 patients of 30 slices, as they are really called -> whether it is a guess
    "p{:02d}_{:04d}": True,
    "case_{:04d}_z{:03d}": False,
    "vol{}_{}": True,
    "patient{}-{}": True,
    "patient{:03d}_slice{:03d}": False,
    "p{}_frame_{}": False,
    "sub-{:02d}_ses-01_slice-{:03d}": False,
    "TCGA_CS_{:04d}_19960909_{}": True,
    "{:03d}_{:03d}": True,
}


@pytest.mark.parametrize("pattern", SLICED)
def test_slices_of_a_patient_stay_together(pattern):
    cases = many(pattern, 20, 30)
    found = by_names(cases, 2)
    groups: dict[str, set[str]] = {}
    for case in cases:
        groups.setdefault(found.patients.get(case, case), set()).add(case)
    assert len(groups) == 20 and {len(group) for group in groups.values()} == {30}
    assert found.guess == SLICED[pattern] and "600 cases are 20 patients" in found.evidence
    members = [Member(id=c, group=found.patients[c], foreground={1: 5}) for c in cases]
    assert all(disjoint(fold, members) for fold in kfold(members, 5, 0))


VISITED = ["p{}_t{}", "sub-{:03d}_ses-{}", "patient{:03d}_visit_{}", "p{}-scan{}", "eye{}_{}"]


@pytest.mark.parametrize("pattern", VISITED)
def test_visits_of_a_patient_stay_together(pattern):
    found = by_names(many(pattern, 20, 2), 3)
    assert len({*found.patients.values()}) == 20


APART = {  # data sets whose numbers count patients, with the dimensions and what they say
    "study of scans": (many("study{}_scan{:03d}", 1, 999), 3),
    "sites": (many("site{}_{:03d}", 4, 30), 3),
    "years": (many("201{}_{:04d}", 4, 30), 2),
    "cohort with a number": (many("LUNG{}-{:03d}", 1, 422), 3),
    "two cohorts": (many("LUNG{}-{:03d}", 2, 200), 3),
    "BraTS": (many("BRATS_{1:03d}", 1, 40), 3),
    "BraTS 2021": (many("BraTS2021_{1:05d}", 1, 40), 3),
    "ISIC": (many("ISIC_{1:07d}", 1, 40), 2),
    "BUSI": (many("benign ({1})", 1, 40), 2),
}


@pytest.mark.parametrize("name", APART)
def test_cohorts_are_no_patient(name):
    cases, dims = APART[name]
    found = by_names(cases, dims)
    assert not found.patients
    if name not in ("BraTS", "ISIC", "BUSI", "BraTS 2021"):
        assert found.doubts, "a person is told"


def test_names_are_looked_at_a_few_times_however_many(monkeypatch):
    counted = []
    for people in (20, 200):
        seen = [0]

        class Counting:
            def __init__(self, pattern, seen=seen):
                self.pattern, self.seen = pattern, seen

            def fullmatch(self, text):
                self.seen[0] += 1
                return self.pattern.fullmatch(text)

        with monkeypatch.context() as patch:
            for name in ("BIDS", "VISIT", "SLICE", "NUMBER"):
                patch.setattr(patients, name, Counting(getattr(patients, name)))
            by_names(many("p{:03d}_{:04d}", people, 10), 2)
        counted.append(seen[0])
    assert counted[1] <= 10.5 * counted[0]


@pytest.fixture
def raw(tmp_path):
    """12 volumes that are called as they like."""
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(12):
        label = np.zeros((8, 8, 4), np.uint8)
        label[2:5, 2:6, 1:3] = 1
        image = rng.normal(100 * label, 5).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"raw/imagesTr/c{n:02d}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"raw/labelsTr/c{n:02d}.nii.gz")
    facts = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}}
    facts |= {"numTraining": 12, "file_ending": ".nii.gz"}
    (tmp_path / "raw/dataset.json").write_text(json.dumps(facts))
    return tmp_path / "raw"


def test_the_table_says_patients_sites_and_splits(raw, tmp_path):
    lines = ["Case;Patient;Site;Split"]
    lines += [
        f"c{n:02d}.nii.gz;P{n // 2};{'AB'[n % 4 > 1]};{'val' if n > 9 else 'train'}"
        for n in range(12)
    ]
    (raw / "patients.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    manifest = build(BuildRequest("nnunet", raw, tmp_path / "store", workers=1))
    assert [case.group for case in manifest.cases] == [f"P{n // 2}" for n in range(12)]
    assert manifest.splits["given"][0]["val"] == ("c10", "c11")
    site = {f"c{n:02d}": "AB"[n % 4 > 1] for n in range(12)}
    for fold in manifest.splits["kfold"]:
        assert len({site[case] for case in fold["train"]}) == 2, "balanced over sites"
    assert survey(open_reader("nnunet", raw), workers=1).grouping.rule == "the table patients.csv"


def test_a_table_that_cannot_be_meant_is_refused(raw):
    for text, message in (
        ("name,who\n", "expected: case, patient"),
        ("case,patient\nc00,A\nc00,B\n", "line 3: found 'c00' twice"),
        ("case,patient\nc00,\n", "line 2: found 'c00', ''"),
        ("case,patient,split\nc00,A,dev\n", "split: found 'dev'"),
    ):
        (raw / "patients.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            open_reader("nnunet", raw).refs()
    (raw / "patients.csv").write_text("case,patient\nc00,A\nc99,B\n")
    problems = survey(open_reader("nnunet", raw), workers=1).problems
    assert [p.found for p in problems] == [
        "c99", "without a line: c01, c02, c03, c04, c05 and 6 more",
    ]  # fmt: skip


def test_a_guess_is_a_warning(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for case in many("p{}_{}", 4, 3):
        image = rng.integers(0, 255, (8, 8)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"images/{case}.png")
        Image.fromarray(np.uint8(image > 99) * 255).save(tmp_path / f"masks/{case}.png")
    found = survey(open_reader("folder", tmp_path), workers=1)
    (warning,) = [w for w in found.warnings if w.field == "patients" and w.case == "all"]
    assert "12 cases are 4 patients" in warning.found and "patients.csv" in warning.mend
