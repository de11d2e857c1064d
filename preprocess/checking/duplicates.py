"""The same image twice: found by content, reported to the user, and never on both sides of a split
of ours.

Equal pixels are found in every data set; in colour pictures also those that were compressed anew.
Measured on the 402 pictures of the 2018 Data Science Bowl: thumbnails of different pictures are
apart by 113 % of their contrast or more, those of one picture and its JPEG (quality 75 and 90) by
4.5 % at most.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy.spatial import cKDTree

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.planning.fingerprint import CaseFacts
from segfleet.preprocess.planning.splits import Folds
from segfleet.preprocess.stores.manifest import Manifest

EDGE = 16  # of a thumbnail
FINE = 256  # steps of a grey level
APART = 0.1  # two thumbnails differ by less than this share of their contrast
LEVELS = 3.0  # and nowhere by more than this, in grey levels of 255
AXES = 12  # along which thumbnails are looked up
BLOCK = 1024  # of them at a time
FLAT = 1.0  # standard deviation, in grey levels, below which a picture has nothing to compare


def thumbnail(image_CZYX: np.ndarray) -> str:
    """Mean grey of 16 x 16 blocks of a picture, for `CaseFacts.thumbnail`; none for a smaller
    picture."""
    if min(image_CZYX.shape[2:]) < EDGE:
        return ""
    white = np.iinfo(image_CZYX.dtype).max if image_CZYX.dtype.kind in "ui" else 255
    grey = image_CZYX[:, 0].mean(axis=0, dtype=np.float64) * (255 / white)
    for axis, length in enumerate(grey.shape):
        first = np.arange(EDGE) * length // EDGE
        sizes = np.diff([*first, length])
        grey = np.add.reduceat(grey, first, axis=axis) / (sizes[:, None] if axis == 0 else sizes)
    return base64.b64encode(np.rint(np.clip(grey, 0, 255) * FINE).astype("<u2").tobytes()).decode(
        "ascii"
    )


def nearly(cases: Sequence[CaseFacts]) -> Iterator[tuple[CaseFacts, CaseFacts]]:
    """Pairs of pictures of one size, of different patients and with different pixels, that look the
    same."""
    pictured = [case for case in cases if case.thumbnail]
    if not pictured:
        return
    grey = (
        np.stack(
            [np.frombuffer(base64.b64decode(case.thumbnail), "<u2") for case in pictured]
        ).astype(np.float32)
        / FINE
    )
    own = grey - grey.mean(axis=1, keepdims=True)
    power = (own**2).mean(axis=1)
    for i, others in _close(own, power):
        case = pictured[i]
        difference = power[i] + power[others] - 2 * (own[others] @ own[i]) / own.shape[1]
        for j in others[difference < APART**2 * np.minimum(power[i], power[others])]:
            other = pictured[j]
            apart = (case.group or case.id) != (
                other.group or other.id
            ) and case.image_sha256 != other.image_sha256
            if (
                apart
                and case.raw_shape == other.raw_shape
                and np.abs(grey[i] - grey[j]).max() <= LEVELS
            ):
                yield case, other


def _close(own: np.ndarray, power: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pictures with something to compare, and the later ones that can be like each: all that are
    apart by less than APART of the contrast, and few others.

    Divided by their contrast, two such pictures are unit vectors less than APART apart, and so are
    their shadows on any axes. A tree finds those on the axes along which these pictures differ
    most, instead of comparing all with all.
    """
    sharp = np.flatnonzero(power >= FLAT**2)
    if len(sharp) < 2:
        return
    units = own[sharp] / np.sqrt(power[sharp] * own.shape[1])[:, None]
    spread = units.astype(np.float64).T @ units
    shadows = units @ np.linalg.eigh(spread)[1][:, -AXES:].astype(np.float32)
    tree = cKDTree(shadows)
    reach = APART * 1.001 + 1e-5  # and what rounding takes away
    for start in range(0, len(sharp), BLOCK):
        stop = min(start + BLOCK, len(sharp))
        neighbours = tree.query_ball_point(shadows[start:stop], reach, return_sorted=True)
        for i, candidates in zip(range(start, stop), neighbours, strict=True):
            if others := [other for other in candidates if other > i]:
                yield int(sharp[i]), sharp[others]


def link(cases: Sequence[CaseFacts]) -> tuple[dict[str, str], list[Problem]]:
    """Which cases belong to another patient than their own because they show the same picture.

    Returns:
        case id -> the joint patient, for every case of patients that duplicates join (the name of
        the first of them) one warning per set of equal images, and per pair of those that look the
        same
    """
    by_pixels: dict[str, list[CaseFacts]] = {}
    for case in cases:
        if case.image_sha256:
            by_pixels.setdefault(case.image_sha256, []).append(case)
    parent: dict[str, str] = {}

    def root(patient: str) -> str:
        while parent.get(patient, patient) != patient:
            patient = parent[patient]
        return patient

    warnings = []
    for copies in by_pixels.values():
        if len(copies) < 2:
            continue
        first, *others = (root(case.group or case.id) for case in copies)
        for other in others:
            parent[root(other)] = root(first)
        names = ", ".join(case.id for case in copies[1:6]) + (
            f" and {len(copies) - 6} more" if len(copies) > 6 else ""
        )
        mend = (
            "Nothing to do for kfold, which keeps them together; remove the copies if they should "
            "not count twice."
        )
        problem = {
            "field": "image",
            "found": f"the same pixels as {names}",
            "expected": "every image once",
            "mend": mend,
        }
        warnings.append(Problem(case=copies[0].id, **problem))
    for case, other in nearly(cases):
        parent[root(other.group or other.id)] = root(case.group or case.id)
        mend = "Look at both. kfold keeps them together; remove one if it should not count twice."
        problem = {
            "field": "image",
            "found": f"looks the same as {other.id}",
            "expected": "every image once",
            "mend": mend,
        }
        warnings.append(Problem(case=case.id, **problem))
    joint = {root(patient) for patient in parent}
    patients = {case.id: root(case.group or case.id) for case in cases}
    return {case: patient for case, patient in patients.items() if patient in joint}, warnings


def shared(cases: Sequence[CaseFacts], manifest: Manifest) -> list[Problem]:
    """One warning per case whose image is in another data set's store too, as the same pixels.
    Raises InputError if that cannot be known."""
    columns = manifest.cases.columns("image_sha256", "id")
    stored = {image: case for image, case in columns if image}
    if not stored:
        raise InputError(
            "against: the store does not record its images' hashes. Preprocess its raw data again "
            "into a new folder."
        )
    expected, mend = (
        "an image of one of the two",
        "Do not train on one of the data sets and score on the other with it.",
    )
    doubles = [
        (case.id, stored[case.image_sha256]) for case in cases if case.image_sha256 in stored
    ]
    texts = [
        (case, f"also in {manifest.dataset.name}: {other} ({_sides(other, manifest)})")
        for case, other in doubles
    ]
    return [
        Problem(case=case, field="image", found=text, expected=expected, mend=mend)
        for case, text in texts
    ]


def _sides(case: str, manifest: Manifest) -> str:
    """Where a case is in every split but "all"; of several folds, in which it validates."""
    places = []
    for name, folds in manifest.splits.items():
        sides = [
            next((side for side in ("train", "val") if case in fold[side]), "") for fold in folds
        ]
        if len(folds) > 1 and "val" in sides:
            places.append(f"{name}: val of fold {sides.index('val')}")
        elif name != "all" and any(sides):
            places.append(f"{name}: {max(sides)}")
    return ", ".join(places) or "in no split"


def leaks(splits: Mapping[str, Folds], group: Mapping[str, str]) -> list[Problem]:
    """One warning for all splits the data set came with that have a patient on both sides. `group`:
    case id -> patient."""
    counts = {
        name: n
        for name, folds in splits.items()
        if (n := max(len(_both(fold, group)) for fold in folds))
    }
    if not counts:
        return []
    text = ", ".join(f"{name} ({n})" for name, n in counts.items())
    mend = (
        "Scores on these splits are comparable with papers, but too good. Use kfold for honest "
        "ones."
    )
    return [
        Problem(
            case="splits",
            field="patients",
            found=f"some on both sides of {text}",
            expected="none",
            mend=mend,
        )
    ]


def _both(fold: Mapping[str, Iterable[str]], group: Mapping[str, str]) -> set[str]:
    train, val = ({group.get(case, case) for case in fold[side]} for side in ("train", "val"))
    return train & val
