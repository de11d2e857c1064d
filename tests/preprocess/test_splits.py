"""Splits keep patients together and share out what is rare."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from segfleet.preprocess.phantoms.phantom import write_nnunet_phantom
from segfleet.preprocess.planning.splits import Member, disjoint, make_splits
from segfleet.preprocess.readers.base import open_reader


def members(patients: int, visits: int = 1, foreground=lambda p: {1: 100 + p}) -> list[Member]:
    return [
        Member(id=f"p{p:03d}_{v}", group=f"p{p:03d}", foreground=foreground(p))
        for p in range(patients)
        for v in range(visits)
    ]


@pytest.mark.parametrize(
    ("patients", "visits"), [(2, 1), (4, 3), (5, 1), (12, 2), (23, 1), (103, 1)]
)
def test_every_case_validates_once_and_no_patient_is_on_both_sides(patients, visits):
    everybody = members(patients, visits)
    splits = make_splits(everybody, seed=1)
    folds = splits["kfold"]
    ids = [m.id for m in everybody]
    assert len(folds) == min(5, patients) and splits["all"] == (
        {"train": tuple(ids), "val": tuple(ids)},
    )
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(ids)
    for fold in folds:
        assert disjoint(fold, everybody) and sorted(fold["train"] + fold["val"]) == sorted(ids)
        assert list(fold["train"]) == [i for i in ids if i in set(fold["train"])], (
            "in the order of the cases"
        )
    sizes = [len(fold["val"]) for fold in folds]
    assert max(sizes) - min(sizes) <= visits


def test_one_patient_has_no_folds():
    assert list(make_splits(members(1, 4), seed=1)) == ["all"]


def test_rare_labels_and_sizes_are_shared_out():
    everybody = members(
        50, foreground=lambda p: {1: 1000 * (p + 1)} | ({2: 10} if p % 5 == 0 else {})
    )
    for fold in make_splits(everybody, seed=3)["kfold"]:
        inside = [m for m in everybody if m.id in fold["val"]]
        assert sum(2 in m.foreground for m in inside) == 2
        assert 18_000 < sum(m.foreground[1] for m in inside) / len(inside) < 33_000


def test_the_seed_decides():
    everybody = members(20)
    assert (
        make_splits(everybody, seed=1)
        == make_splits(everybody, seed=1)
        != make_splits(everybody, seed=2)
    )


def test_what_the_data_set_brings_is_kept():
    brought = {"nnunet": ({"train": ("p000_0",), "val": ("p001_0",)},)}
    assert make_splits(members(2), seed=1, brought=brought)["nnunet"] == brought["nnunet"]


def test_what_the_data_set_brings_has_no_case_on_both_sides():
    good, bad = ({"train": ("p000_0",), "val": (side,)} for side in ("p001_0", "p000_0"))
    with pytest.raises(AssertionError, match="split 'x' has a case on both sides"):
        make_splits(members(2), seed=1, brought={"x": (good, bad)})


def test_no_fold_hangs_on_the_order_of_a_set():
    """Python hashes words anew in every process. Sites and labels of a patient are sets."""
    words = (
        "from segfleet.preprocess.planning.splits import Member, kfold\n"
        "found = [Member(id=f'{p}_{v}', group=str(p), stratum=f'site {(p * 7 + v * p) % 9}',\n"
        "                foreground={v: 1, p % 4 + 9: p}) for p in range(40) for v in range(6)]\n"
        "print(kfold(found, 5, 1))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", words],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(said) == 1


def test_visits_of_a_patient_stay_together(tmp_path):
    refs = open_reader("nnunet", write_nnunet_phantom(tmp_path / "raw", cases=8)).refs()
    everybody = [Member(id=ref.id, group=ref.group, foreground={1: 1}) for ref in refs]
    folds = make_splits(everybody, seed=5)["kfold"]
    assert len(folds) == 4
    assert all(
        len({case.split("_")[0] for case in fold["val"]}) == 1 and len(fold["val"]) == 2
        for fold in folds
    )


def test_a_patient_on_both_sides_is_seen():
    everybody = members(2, 2)
    assert not disjoint({"train": ("p000_0",), "val": ("p000_1", "p001_0")}, everybody)
