"""Who trains and who validates: by patient, balanced over labels and sizes, seeded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Folds = tuple[dict[str, tuple[str, ...]], ...]
FOLDS = 5
OWN = ("all", "kfold")  # the splits of ours, which no data set brings
SEEDS = (41, 2981, 6142, 1187)  # of the published 80/20 splits


@dataclass(frozen=True, kw_only=True)
class Member:
    """One case as a split sees it: `foreground` counts voxels per label value present."""

    id: str
    group: str
    foreground: Mapping[int, int]


def make_splits(
    members: Sequence[Member], seed: int, brought: Mapping[str, Folds] | None = None
) -> dict[str, Folds]:
    """{"kfold": up to 5 folds of {"train": ids, "val": ids}, "all": everybody on both sides, and
    what the data set brought along}.

    Ids keep the order of `members`. With one patient there is only "all".
    """
    ids = tuple(member.id for member in members)
    splits: dict[str, Folds] = {"all": ({"train": ids, "val": ids},)}
    groups = {member.group for member in members}
    if len(groups) > 1:
        splits["kfold"] = kfold(members, min(FOLDS, len(groups)), seed)
        for fold in splits["kfold"]:
            assert disjoint(fold, members), "a patient is on both sides of a fold"
    for name, folds in (brought or {}).items():
        assert all(not {*fold["train"]} & {*fold["val"]} for fold in folds), (
            f"split '{name}' has a case on both sides"
        )
    return {**splits, **(brought or {})}


def kfold(members: Sequence[Member], folds: int, seed: int) -> Folds:
    """Patients ordered by the labels they have, then by how much foreground; each run of `folds` of
    them is dealt out at random.

    So every fold gets its share of rare labels and of small ones.
    """
    patients: dict[str, list[Member]] = {}
    for member in members:
        patients.setdefault(member.group, []).append(member)

    def order(name: str) -> tuple:
        cases = patients[name]
        labels = sorted({value for case in cases for value in case.foreground})
        return (
            labels,
            sum(sum(case.foreground.values()) for case in cases) / len(cases),
            _shuffled(name, seed),
        )

    names = sorted(patients, key=order)
    generator = np.random.default_rng(seed)
    side: dict[str, int] = {}
    for start in range(0, len(names), folds):
        side.update(
            zip(
                names[start : start + folds],
                (int(f) for f in generator.permutation(folds)),
                strict=False,
            )
        )
    return tuple(
        {
            "train": tuple(m.id for m in members if side[m.group] != fold),
            "val": tuple(m.id for m in members if side[m.group] == fold),
        }
        for fold in range(folds)
    )


def random_split(names: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(rest, drawn), both shuffled, as scikit-learn's `train_test_split(names, test_size=share,
    random_state=seed)` gives them.

    This is how the published random splits were made. It knows nothing of patients.
    """
    # the legacy stream, which never changes
    order = np.random.RandomState(seed).permutation(len(names))
    count = math.ceil(share * len(names))
    return [names[i] for i in order[count:]], [names[i] for i in order[:count]]


def published(ids: Sequence[str]) -> dict[str, Folds]:
    """The random splits of sorted names 2D papers use: 80/20 with their seeds, and 70/15/15, whose
    test part is a split of its own.

    Source: specification `datasets_2d` (UNeXt: seed 41; U-KAN and Rolling-UNet: 2981, 6142, 1187)
    and `unet_lite` (70/15/15, seed 42).
    """
    names = sorted(ids)
    found = {f"80-20-seed{seed}": random_split(names, 0.2, seed) for seed in SEEDS}
    rest, test = random_split(names, 0.15, 42)
    train, val = random_split(rest, 0.15 / 0.85, 42)
    found |= {"70-15-15-seed42": (train, val), "70-15-15-seed42-test": (train, test)}
    return {
        name: ({"train": tuple(sorted(a)), "val": tuple(sorted(b))},)
        for name, (a, b) in found.items()
        if a and b
    }


def disjoint(fold: Mapping[str, Sequence[str]], members: Sequence[Member]) -> bool:
    """Whether no patient is on both sides."""
    group = {member.id: member.group for member in members}
    return not {group[case] for case in fold["train"]} & {group[case] for case in fold["val"]}


def _shuffled(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
