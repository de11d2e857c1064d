"""The same image twice: found by content, told to the user, and never on both sides of a split of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from segfleet.preprocess.fingerprint import CaseFacts
from segfleet.preprocess.problems import Problem
from segfleet.preprocess.splits import Folds


def link(facts: Sequence[CaseFacts]) -> tuple[dict[str, str], list[Problem]]:
    """Which cases belong to another patient than their own because they show the same pixels.

    Returns:
        case id -> the joint patient, for every case of patients that duplicates join (the name of the first of them)
        one warning per set of equal images
    """
    same: dict[str, list[CaseFacts]] = {}
    for case in facts:
        if case.image_sha256:
            same.setdefault(case.image_sha256, []).append(case)
    parent: dict[str, str] = {}

    def root(patient: str) -> str:
        while parent.get(patient, patient) != patient:
            patient = parent[patient]
        return patient

    warnings = []
    for cases in same.values():
        if len(cases) < 2:
            continue
        first, *others = (root(case.group or case.id) for case in cases)
        for other in others:
            parent[root(other)] = root(first)
        names = ", ".join(case.id for case in cases[1:6]) + (f" and {len(cases) - 6} more" if len(cases) > 6 else "")
        mend = "Nothing to do for kfold, which keeps them together; remove the copies if they should not count twice."
        facts_ = {"field": "image", "found": f"the same pixels as {names}", "expected": "every image once", "mend": mend}
        warnings.append(Problem(case=cases[0].id, **facts_))
    joint = {root(patient) for patient in parent}
    patients = {case.id: root(case.group or case.id) for case in facts}
    return {case: patient for case, patient in patients.items() if patient in joint}, warnings


def leaks(splits: Mapping[str, Folds], group: Mapping[str, str]) -> list[Problem]:
    """One warning for all splits the data set came with that have a patient on both sides. `group`: case id -> patient."""
    found = {name: n for name, folds in splits.items() if (n := max(len(_both(fold, group)) for fold in folds))}
    if not found:
        return []
    text = ", ".join(f"{name} ({n})" for name, n in found.items())
    mend = "Scores on these splits are comparable with papers, but too good. Use kfold for honest ones."
    return [Problem(case="splits", field="patients", found=f"some on both sides of {text}", expected="none", mend=mend)]


def _both(fold: Mapping[str, Iterable[str]], group: Mapping[str, str]) -> set[str]:
    train, val = ({group.get(case, case) for case in fold[side]} for side in ("train", "val"))
    return train & val
