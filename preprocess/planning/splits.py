"""Who trains and who validates: by patient, balanced over labels and sizes, seeded."""

from __future__ import annotations

import hashlib
import math
import random
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
    stratum: str = ""  # site or class, balanced over folds before anything else


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
    """Patients ordered by site or class, then by the labels they have, then by how much foreground;
    each run of `folds` of them is dealt out at random.

    So every fold gets its share of rare labels and of small ones.
    """
    patients: dict[str, list[Member]] = {}
    for member in members:
        patients.setdefault(member.group, []).append(member)

    def order(name: str) -> tuple:
        cases = patients[name]
        labels = sorted({value for case in cases for value in case.foreground})
        return (
            sorted({case.stratum for case in cases}),
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


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Sorted names in the order Python's seeded generator gives them."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order


def shuffled_split(
    names: Sequence[str], shares: tuple[float, float], seed: int
) -> tuple[list[str], list[str], list[str]]:
    """(training, validation, test): sorted names shuffled by Python's generator and cut at whole
    numbers of `shares`, the rest for testing. How ASC-Seg's code means to divide."""
    order = shuffled(names, seed)
    first = int(shares[0] * len(order))
    second = first + max(1, int(shares[1] * len(order)))
    return order[:first], order[first:second], order[second:]


def published(ids: Sequence[str]) -> dict[str, Folds]:
    """The random splits of sorted names 2D papers use: 80/20 with their seeds, and 70/15/15,
    70/10/20 and 80/10/10, whose test parts are splits of their own.

    Source: specification `datasets_2d` (UNeXt: seed 41; U-KAN and Rolling-UNet: 2981, 6142, 1187),
    `unet_lite` (70/15/15, seed 42) and `asc_seg` (ISIC 2018 70/10/20, PH2 80/10/10, BUSI 80/20,
    seed 42).
    """
    names = sorted(ids)
    splits = {f"80-20-seed{seed}": random_split(names, 0.2, seed) for seed in SEEDS}
    rest, test = random_split(names, 0.15, 42)
    train, val = random_split(rest, 0.15 / 0.85, 42)
    splits |= {"70-15-15-seed42": (train, val), "70-15-15-seed42-test": (train, test)}
    for name, shares in (("70-10-20-seed42", (0.7, 0.1)), ("80-10-10-seed42", (0.8, 0.1))):
        train, val, test = shuffled_split(names, shares, 42)
        splits |= {name: (train, val), f"{name}-test": (train, test)}
    tested = int(0.2 * len(names))  # ASC-Seg on BUSI: 518 and 129 of 647
    train, test = shuffled(names, 42)[: len(names) - tested], shuffled(names, 42)[-tested:]
    splits["80-20-shuffle42"] = (train, test if tested else [])
    return {
        name: ({"train": tuple(sorted(a)), "val": tuple(sorted(b))},)
        for name, (a, b) in splits.items()
        if a and b
    }


def disjoint(fold: Mapping[str, Sequence[str]], members: Sequence[Member]) -> bool:
    """Whether no patient is on both sides."""
    group = {member.id: member.group for member in members}
    return not {group[case] for case in fold["train"]} & {group[case] for case in fold["val"]}


def _shuffled(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
