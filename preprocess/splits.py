"""Who trains and who validates: by patient, balanced over labels and sizes, seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Folds = tuple[dict[str, tuple[str, ...]], ...]
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Member:
    """One case as a split sees it: `foreground` counts voxels per label value present."""

    id: str
    group: str
    foreground: Mapping[int, int]


def make_splits(members: Sequence[Member], seed: int, brought: Mapping[str, Folds] | None = None) -> dict[str, Folds]:
    """{"kfold": up to 5 folds of {"train": ids, "val": ids}, "all": everybody on both sides, and what the data set brought along}.

    Ids keep the order of `members`. With one patient there is only "all".
    """
    ids = tuple(member.id for member in members)
    splits: dict[str, Folds] = {"all": ({"train": ids, "val": ids},)}
    groups = {member.group for member in members}
    if len(groups) > 1:
        splits["kfold"] = kfold(members, min(FOLDS, len(groups)), seed)
        for fold in splits["kfold"]:
            assert disjoint(fold, members), "a patient is on both sides of a fold"
    return {**splits, **(brought or {})}


def kfold(members: Sequence[Member], folds: int, seed: int) -> Folds:
    """Patients ordered by the labels they have, then by how much foreground; each run of `folds` of them is dealt out at random.

    So every fold gets its share of rare labels and of small ones.
    """
    patients: dict[str, list[Member]] = {}
    for member in members:
        patients.setdefault(member.group, []).append(member)

    def order(name: str) -> tuple:
        cases = patients[name]
        labels = sorted({value for case in cases for value in case.foreground})
        return labels, sum(sum(case.foreground.values()) for case in cases) / len(cases), _shuffled(name, seed)

    names = sorted(patients, key=order)
    generator = np.random.default_rng(seed)
    side: dict[str, int] = {}
    for start in range(0, len(names), folds):
        side.update(zip(names[start : start + folds], (int(f) for f in generator.permutation(folds)), strict=False))
    return tuple(
        {
            "train": tuple(m.id for m in members if side[m.group] != fold),
            "val": tuple(m.id for m in members if side[m.group] == fold),
        }
        for fold in range(folds)
    )


def disjoint(fold: Mapping[str, Sequence[str]], members: Sequence[Member]) -> bool:
    """Whether no patient is on both sides."""
    group = {member.id: member.group for member in members}
    return not {group[case] for case in fold["train"]} & {group[case] for case in fold["val"]}


def _shuffled(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
