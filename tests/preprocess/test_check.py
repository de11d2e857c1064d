"""Every kind of bad input is named, all of them at once, and nothing is written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segfleet.core.errors import DataError, InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.phantoms.phantom import (
    write_dsb_phantom,
    write_msd_phantom,
    write_nnunet_phantom,
)
from segfleet.preprocess.readers.base import open_reader


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_msd_phantom(tmp_path_factory.mktemp("sound") / "raw", cases=3, size=(8, 12, 12))


@pytest.fixture
def raw(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "raw"))


def change(path: Path, edit, affine=None, dtype=None) -> None:
    """Rewrite a NIfTI file with other values, another affine or another type."""
    image = nib.load(path)
    array = np.asarray(image.dataobj)
    array = edit(array.astype(dtype) if dtype else array.copy())
    path.write_bytes(
        gzip.compress(
            nib.Nifti1Image(array, image.affine if affine is None else affine).to_bytes(), mtime=0
        )
    )


def put(value, at=(4, 5, 3)):
    def edit(array):
        array[at] = value
        return array

    return edit


def rewrite(path: Path, edit) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def moved(path: Path, shift: float):
    affine = nib.load(path).affine.copy()
    affine[0, 3] += shift
    return affine


def stretched(path: Path):
    return nib.load(path).affine @ np.diag([1, 1, 1.5, 1])


def same(array):
    return array


LABEL, IMAGE, JSON = "labelsTr/phantom_001.nii.gz", "imagesTr/phantom_001.nii.gz", "dataset.json"
CASE, DECLARED, FINITE = "phantom_001", "only the declared values 0, 1, 2", "finite numbers"
BAD_VOXEL = "1 voxel(s) that are nan or infinite"
DOUBLE = lambda d: d["training"].append(d["training"][1])  # noqa: E731
FAULTS = {  # what is done to the folder; then case, field, found and expected of the problem
    "missing label": (lambda r: (r / LABEL).unlink(), CASE, "label", "no file", LABEL),
    "missing image": (lambda r: (r / IMAGE).unlink(), CASE, "image", "no file", IMAGE),
    "shape": (
        lambda r: change(r / LABEL, lambda a: a[:-1]),
        CASE,
        "label shape",
        "x",
        "as the image has",
    ),
    "affine": (
        lambda r: change(r / LABEL, same, moved(r / LABEL, 2)),
        CASE,
        "label affine",
        "[0,3] = -18",
        "-20 as the image has",
    ),
    "spacing": (
        lambda r: change(r / LABEL, same, stretched(r / LABEL)),
        CASE,
        "label spacing",
        "3.75x",
        "2.5x",
    ),
    "undeclared": (lambda r: change(r / LABEL, put(7)), CASE, "label values", "7", DECLARED),
    "negative": (
        lambda r: change(r / LABEL, put(-1), dtype="i2"),
        CASE,
        "label values",
        "-1",
        DECLARED,
    ),
    "fraction": (
        lambda r: change(r / LABEL, put(0.5), dtype="f4"),
        CASE,
        "label",
        "no integers, such as 0.5",
        "integers",
    ),
    "nan label": (
        lambda r: change(r / LABEL, put(np.nan), dtype="f4"),
        CASE,
        "label",
        "such as nan",
        "integers",
    ),
    "nan": (lambda r: change(r / IMAGE, put(np.nan)), CASE, "image, channel 0", BAD_VOXEL, FINITE),
    "inf": (lambda r: change(r / IMAGE, put(-np.inf)), CASE, "image, channel 0", BAD_VOXEL, FINITE),
    "truncated": (
        lambda r: truncate(r / IMAGE),
        CASE,
        "file",
        "phantom_001.nii.gz damaged or truncated",
        "a readable image",
    ),
    "not an image": (
        lambda r: (r / LABEL).write_bytes(b"no"),
        CASE,
        "file",
        "damaged",
        "a readable image",
    ),
    "channels": (
        lambda r: change(r / IMAGE, lambda a: np.stack([a, a], -1)),
        CASE,
        "channels",
        "2",
        "1 (MRI)",
    ),
    "duplicate": (lambda r: rewrite(r / JSON, DOUBLE), CASE, "id", "2 cases of this name", "one"),
    "number": (
        lambda r: rewrite(r / JSON, lambda d: d.update(numTraining=9)),
        JSON,
        "numTraining",
        "9",
        "3, the number of",
    ),
    "unlisted": (
        lambda r: shutil.copy(r / IMAGE, r / "imagesTr/extra.nii.gz"),
        "extra",
        "image",
        "a file",
        "to be listed in",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_what_was_expected_and_how_to_mend_it(fault, raw, tmp_path):
    damage, case, field, found, expected = FAULTS[fault]
    damage(raw)
    with pytest.raises(DataError) as caught:
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    problem = next(p for p in caught.value.problems if p.field == field)
    assert (
        problem.case == case
        and found in problem.found
        and expected in problem.expected
        and problem.mend.endswith(".")
    )
    assert caught.value.exit_code == 2 and f"{case}: {field}: found " in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"raw"}, "nothing is written"


def test_all_problems_come_at_once_in_the_order_of_the_cases(raw):
    change(raw / "imagesTr/phantom_002.nii.gz", put(np.nan))
    change(raw / "labelsTr/phantom_002.nii.gz", lambda a: put(9)(a[:, :-1]))
    (raw / "labelsTr/phantom_000.nii.gz").unlink()
    rewrite(raw / "dataset.json", lambda d: d.update(numTraining=4))
    found = survey(open_reader("msd", raw), workers=1)
    assert [(p.case, p.field) for p in found.problems] == [
        ("dataset.json", "numTraining"),
        ("phantom_000", "label"),
        ("phantom_002", "image, channel 0"),
        ("phantom_002", "label values"),
        ("phantom_002", "label shape"),
    ]
    assert survey(open_reader("msd", raw), workers=2) == found


def test_small_differences_of_the_header_are_no_fault(raw):
    change(raw / LABEL, lambda a: a, moved(raw / LABEL, 5e-4))
    assert not survey(open_reader("msd", raw), workers=1).problems


def test_an_empty_mask_is_a_warning_and_an_empty_data_set_a_problem(raw):
    change(raw / LABEL, np.zeros_like)
    found = survey(open_reader("msd", raw), workers=1)
    assert not found.problems and [(w.case, w.found) for w in found.warnings] == [
        ("phantom_001", "no foreground voxel")
    ]
    for case in ("phantom_000", "phantom_002"):
        change(raw / f"labelsTr/{case}.nii.gz", np.zeros_like)
    (problem,) = survey(open_reader("msd", raw), workers=1).problems
    assert problem.found == "no foreground voxel in any case"


def test_mixed_orientations_are_a_warning(raw):
    turn = np.diag([-1.0, 1, 1, 1])
    for folder in ("imagesTr", "labelsTr"):
        path = raw / folder / "phantom_002.nii.gz"
        change(path, lambda a: a, nib.load(path).affine @ turn)
    (warning,) = survey(open_reader("msd", raw), workers=1).warnings
    assert (warning.field, warning.found) == ("orientation", "LAS 1, RAS 2")


def test_an_empty_folder_is_one_message(tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=1)
    for folder in ("imagesTr", "labelsTr"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    with pytest.raises(
        InputError, match="imagesTr holds no CASE_0000.nii.gz. Expected an nnU-Net v2 folder"
    ):
        survey(open_reader("nnunet", root))


def test_nnunet_channels_that_are_missing_or_too_many(tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=2)
    (root / "imagesTr/patient000_visit0_0001.nii.gz").unlink()
    shutil.copy(
        root / "imagesTr/patient000_visit1_0001.nii.gz",
        root / "imagesTr/patient000_visit1_0002.nii.gz",
    )
    problems = survey(open_reader("nnunet", root), workers=1).problems
    assert [(p.case, p.field, p.found) for p in problems] == [
        ("patient000_visit1", "channel", "_0002"),
        ("patient000_visit0", "channel 1", "no file"),
    ]
    assert problems[1].expected == "imagesTr/patient000_visit0_0001.nii.gz"


def test_nnunet_channels_on_different_grids(tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=1)
    change(root / "imagesTr/patient000_visit0_0001.nii.gz", lambda a: a[:, :-2])
    (problem,) = survey(open_reader("nnunet", root), workers=1).problems
    assert (
        problem.field == "shape of channel patient000_visit0_0001.nii.gz"
        and problem.found == "12x30x32"
    )


def test_a_label_value_inside_a_region_or_ignored_is_declared(tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=1)
    facts = survey(open_reader("nnunet", root), workers=1).facts[0]
    assert set(facts.voxels) == {0, 1, 2, 3} and set(facts.foreground(3)) == {1, 2}


def test_dsb_without_masks(tmp_path):
    root = write_dsb_phantom(tmp_path / "raw", images=2)
    folder = sorted((root / "stage1_train").iterdir())[0]
    shutil.rmtree(folder / "masks")
    (problem,) = survey(open_reader("dsb2018", root), workers=1).problems
    assert (problem.case, problem.field, problem.expected) == (
        folder.name,
        "label",
        f"stage1_train/{folder.name}/masks/*.png",
    )


def test_real_data_are_sound(shared_data):
    found = survey(open_reader("msd", shared_data("Task04_Hippocampus")), workers=1)
    assert len(found.facts) == 208 and not found.problems and not found.warnings
    found = survey(open_reader("msd", shared_data("Task01_BrainTumour")), workers=1)
    assert len(found.facts) == 2 and not found.problems


def test_facts_are_taken_over_only_while_files_stay_the_same(raw):
    seen, reader = [], open_reader("msd", raw)
    first = survey(reader, workers=1, keep=seen.append)
    assert len(seen) == 3
    change(raw / LABEL, put(1))
    again: list = []
    second = survey(reader, workers=1, known=first.facts, keep=again.append)
    assert [facts.id for facts in again] == ["phantom_001"] and second.facts[0] == first.facts[0]


def crash_at(original, ref, *more):
    if ref.id == "phantom_001":
        os.kill(os.getpid(), signal.SIGSEGV)
    return original(ref, *more)


def test_files_that_crash_a_library_are_a_problem_of_their_case(raw, monkeypatch):
    reader = open_reader("msd", raw)
    reader.image = partial(crash_at, reader.image)
    found = survey(reader, workers=2)
    (problem,) = found.problems
    assert problem.case == "phantom_001" and "SIGSEGV" in problem.found
    assert "imagesTr/phantom_001.nii.gz or labelsTr/phantom_001.nii.gz" in problem.found
    assert sum(bool(case.source_sha256) for case in found.facts) == len(found.refs) - 1
