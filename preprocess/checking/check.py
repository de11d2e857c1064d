"""The one pass over raw files: every case is opened once, checked and measured. All problems come
out together."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from segfleet.core.errors import DataError, Problem
from segfleet.core.parallel import run
from segfleet.preprocess.case import Case, Geometry
from segfleet.preprocess.checking.duplicates import leaks, link, thumbnail
from segfleet.preprocess.files.faults import crashed, instead_of_file
from segfleet.preprocess.files.grids import advice, disagreement, settled
from segfleet.preprocess.files.images import ImageError, peek, sources
from segfleet.preprocess.planning.fingerprint import CaseFacts, samples_per_case, statistics
from segfleet.preprocess.planning.patients import NAME as SHEET
from segfleet.preprocess.planning.patients import Grouping
from segfleet.preprocess.planning.plan import normalisation
from segfleet.preprocess.readers.base import CaseRef, RawReader, no_label
from segfleet.preprocess.stores.manifest import Dataset
from segfleet.preprocess.transforms.voxels import pieces, values

# of memory per voxel and channel: the file, decoded, as float32, and what cropping and resampling
# add
BYTES_PER_VALUE = 24
WHITES = {1, 255, 65535}  # that masks are usually painted with
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A whole raw data set after one pass. `facts` are in the order of `refs`; in both, cases with
    equal images are of one patient."""

    where: str
    dataset: Dataset
    refs: tuple[CaseRef, ...]
    facts: tuple[CaseFacts, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    grouping: Grouping

    def raise_problems(self) -> None:
        if self.problems:
            raise DataError(self.where, list(self.problems))


def survey(
    reader: RawReader,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    known: Sequence[CaseFacts] = (),
    keep: Callable[[CaseFacts], None] | None = None,
) -> Survey:
    """Check and measure every case. The result does not depend on `workers`.

    Args:
        known: facts of an earlier pass; those whose files have not changed since are taken over.
        keep: is given each new case's facts as soon as they are there.
    """
    dataset, refs = reader.dataset(), reader.refs()
    surveyed = look_at(
        reader, range(len(refs)), workers=workers, progress=progress, known=known, keep=keep
    )
    cases = [surveyed[index] for index in range(len(refs))]
    own = [ref.id for ref in refs]
    problems = [*reader.problems(), *(reader.sheet.problems(own) if reader.sheet else ())]
    problems += [*(problem for case in cases for problem in case.problems)]
    if any(kind == "rgb_to_0_1" for kind in normalisation(dataset)):
        problems += _depths(cases)
    odd, doubts = _whites(cases)
    problems += odd
    warnings = [w for case in cases for w in case.warnings] + doubts + _together(cases)
    warnings += guesses(reader.grouping)
    joint, doubles = link(cases)
    cases = [case.model_copy(update={"group": joint.get(case.id, case.group)}) for case in cases]
    refs = [replace(ref, group=joint.get(ref.id, ref.group)) for ref in refs]
    warnings += doubles + leaks(reader.splits(), {ref.id: ref.group or ref.id for ref in refs})
    has_labels = any(dataset.labels.values()) or dataset.regions
    if (
        has_labels
        and not problems
        and not any(case.foreground(dataset.ignore_label) for case in cases)
    ):
        mend = "Check that labels and images belong together."
        problems.append(
            Problem(
                case="all",
                field="label",
                found="no foreground voxel in any case",
                expected="at least one",
                mend=mend,
            )
        )
    return Survey(
        where=str(reader.root),
        dataset=dataset,
        refs=tuple(refs),
        facts=tuple(cases),
        problems=tuple(problems),
        warnings=tuple(warnings),
        grouping=reader.grouping,
    )


def look_at(
    reader: RawReader,
    cases: Sequence[int],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    known: Sequence[CaseFacts] = (),
    keep: Callable[[CaseFacts], None] | None = None,
) -> dict[int, CaseFacts]:
    """The facts of the cases with these numbers, as `survey` takes and keeps them."""
    dataset, refs = reader.dataset(), reader.refs()
    surveyed, todo = recall(reader, cases, known)
    look = partial(check_case, reader, dataset, samples_per_case(len(refs)))
    weights = [memory_of(refs[index]) for index in todo]
    report = progress or (lambda done, total: None)
    report(len(surveyed), len(cases))
    for position, case in run(
        look,
        [refs[i] for i in todo],
        weights=weights,
        names=[refs[i].id for i in todo],
        workers=workers,
        died=partial(_died, reader.root),
    ):
        surveyed[todo[position]] = case
        if keep is not None:
            keep(case)
        report(len(surveyed), len(cases))
    return surveyed


def recall(
    reader: RawReader, cases: Sequence[int], known: Sequence[CaseFacts]
) -> tuple[dict[int, CaseFacts], list[int]]:
    """Facts whose files have not changed since, by case number, and the numbers of all other cases.
    Patients are those of today."""
    refs, earlier = reader.refs(), {case.stamp: case for case in known}
    unchanged = {
        index: case
        for index in (cases if earlier else ())
        if (case := earlier.get(stamp(refs[index], reader.root)))
    }
    by_number = {
        index: case.model_copy(update={"group": refs[index].group})
        for index, case in unchanged.items()
    }
    return by_number, [index for index in cases if index not in by_number]


def check_case(reader: RawReader, dataset: Dataset, samples: int, ref: CaseRef) -> CaseFacts:
    """Read one case and report what is wrong with it, completely, and what it is like if nothing
    is."""
    identity = {"id": ref.id, "group": ref.group, "stamp": stamp(ref, reader.root)}
    problems = missing(ref, reader.root)
    if problems:
        return CaseFacts(**identity, problems=tuple(problems))
    digest = hashlib.sha256()
    image = label = None
    try:
        image, geometry = reader.image(ref, digest)
        problems += image_problems(ref.id, image, geometry, dataset)
    except ImageError as error:
        problems.append(error.problem(ref.id))
    try:
        if reader.labelled:
            label, grid = reader.label(ref, digest)
        elif image is not None:
            label, grid = no_label(geometry), geometry
        if reader.labelled and image is not None:
            label, grid = settled(label, grid, geometry)
        problems += label_problems(ref.id, label, dataset) if label is not None else []
    except ImageError as error:
        problems.append(error.problem(ref.id))
    if image is not None and label is not None and (difference := disagreement(grid, geometry)):
        field, found, expected = difference
        problem = {
            "field": f"label {field}",
            "found": found,
            "expected": f"{expected} as the image has",
            "mend": advice(label, grid, geometry),
        }
        problems.append(Problem(case=ref.id, **problem))
    if problems:
        return CaseFacts(**identity, problems=tuple(problems))
    doubts = dict.fromkeys((*geometry.file.warnings, *grid.file.warnings))
    warnings = [
        Problem(case=ref.id, field=field, found=found, expected=expected, mend=mend)
        for field, found, expected, mend in doubts
    ]
    case = Case(id=ref.id, group=ref.group, image_CZYX=image, label_ZYX=label, geometry=geometry)
    kinds = normalisation(dataset)
    measured = statistics(case, kinds, dataset.ignore_label, samples, labelled=reader.labelled)
    measured |= {"source_sha256": digest.hexdigest(), "image_sha256": _pixels(image)}
    checked = CaseFacts(
        **identity,
        **measured,
        white=grid.file.white,
        warnings=tuple(warnings),
        thumbnail=thumbnail(image) if dataset.dims == 2 and "rgb_to_0_1" in kinds else "",
    )
    if checked.foreground(dataset.ignore_label) or reader.may_be_empty(ref):
        return checked
    mend = "Nothing to do if the case is really empty: it is kept."
    warning = Problem(
        case=ref.id, field="label", found="no foreground voxel", expected="usually some", mend=mend
    )
    return checked.model_copy(update={"warnings": (*warnings, warning)})


def _died(root: Path, ref: CaseRef, cause: str) -> CaseFacts:
    """Of a case whose files a library crashed at."""
    problem = crashed((*ref.images, *ref.labels)[0], cause).problem(ref.id)
    if len(files := (*ref.images, *ref.labels)) > 1:
        named = " or ".join(_relative(path, root) for path in files[:4])
        problem = replace(problem, found=f"{named}: one {problem.found.partition(', ')[2]}")
    return CaseFacts(id=ref.id, group=ref.group, stamp=stamp(ref, root), problems=(problem,))


def missing(ref: CaseRef, root: Path) -> list[Problem]:
    """Files of a case that are not there."""
    problems = []
    for index, path in enumerate(ref.images):
        if found := instead_of_file(path):
            field = "image" if len(ref.images) == 1 else f"channel {index}"
            expected, mend = _relative(path, root), "Add the file, or remove the case."
            problems.append(
                Problem(case=ref.id, field=field, found=found, expected=expected, mend=mend)
            )
    for path in ref.labels:
        if found := instead_of_file(path):
            mend = "Add the label, or remove the case from the training set."
            problems.append(
                Problem(
                    case=ref.id,
                    field="label",
                    found=found,
                    expected=_relative(path, root),
                    mend=mend,
                )
            )
    return problems


def image_problems(
    case: str, image: np.ndarray, geometry: Geometry, dataset: Dataset
) -> list[Problem]:
    problems = []
    if len(image) != len(dataset.channels):
        expected = f"{len(dataset.channels)} ({', '.join(dataset.channels)})"
        mend = "Correct the channels in dataset.json or the image."
        problems.append(
            Problem(
                case=case, field="channels", found=str(len(image)), expected=expected, mend=mend
            )
        )
    if dataset.dims == 2 and geometry.shape[0] != 1:
        mend = "Split the volume, or use a 3D layout."
        problems.append(
            Problem(
                case=case,
                field="slices",
                found=str(geometry.shape[0]),
                expected="1 (2D data set)",
                mend=mend,
            )
        )
    if image.dtype.kind == "f":
        for index, channel in enumerate(image):
            if not np.isfinite(channel.sum(dtype=np.float64)) and (
                bad := int((~np.isfinite(channel)).sum())
            ):
                mend = "Replace them, for instance by the value of air, and save the image again."
                wording = {
                    "field": f"image, channel {index}",
                    "expected": "finite numbers",
                    "mend": mend,
                }
                problems.append(
                    Problem(case=case, found=f"{bad} voxel(s) that are nan or infinite", **wording)
                )
    return problems


def label_problems(case: str, label: np.ndarray, dataset: Dataset) -> list[Problem]:
    broken = []
    for _, piece in pieces(label) if label.dtype.kind == "f" else ():
        bad = ~np.isfinite(piece) | (piece != np.rint(piece))
        broken += [(int(bad.sum()), piece[bad][0])] if bad.any() else []
    if broken:
        found = (
            f"{sum(n for n, _ in broken)} voxel(s) that are no integers, such as {broken[0][1]!s}"
        )
        mend = "Resample labels with nearest neighbour and save them as integers."
        return [Problem(case=case, field="label", found=found, expected="integers", mend=mend)]
    declared, present, problems = dataset.values, values(label), []
    if unknown := sorted(present - declared):
        found = ", ".join(map(str, unknown[:10])) + (
            f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        )
        expected = f"only the declared values {', '.join(map(str, sorted(declared)))}"
        mend = "Declare them in the labels of the data set, or correct the mask."
        problems.append(
            Problem(case=case, field="label values", found=found, expected=expected, mend=mend)
        )
    if beyond := sorted(v for v in present & declared if v > 255):
        mend = "Number the labels from 0 on."
        problems.append(
            Problem(
                case=case,
                field="label values",
                found=f"{beyond[0]}",
                expected="0 to 255",
                mend=mend,
            )
        )
    return problems


def stamp(ref: CaseRef, root: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a case's files change, cheap to ask for; never () for a case with files."""
    out = []
    files = [file for path in (*ref.images, *ref.labels) for file in sources(path)]
    for path in dict.fromkeys(files):
        status = _file_status(path)
        out.append(
            (
                _relative(path, root),
                status.st_size if status else -1,
                status.st_mtime_ns if status else -1,
            )
        )
    if ref.said:
        out.append(("", len(ref.said), int(hashlib.sha256(ref.said.encode()).hexdigest()[:15], 16)))
    return tuple(out)


def _file_status(path: Path) -> os.stat_result | None:
    """None for what is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def memory_of(ref: CaseRef) -> int:
    """Bytes that reading and preprocessing a case takes, from the headers of its images."""
    return memory_for(sum(int(np.prod(peek(path))) for path in ref.images))


def memory_for(values: int) -> int:
    """Bytes that reading and preprocessing a case of so many values takes."""
    return BYTES_PER_VALUE * values


def _together(cases: Sequence[CaseFacts]) -> list[Problem]:
    """What only shows over all cases."""
    kinds = sorted({case.orientation for case in cases if case.orientation})
    if len(kinds) < 2:
        return []
    counts = ", ".join(
        f"{kind} {sum(case.orientation == kind for case in cases)}" for kind in kinds
    )
    mend = "Reorient the images if left and right or up and down matter to the labels."
    return [
        Problem(
            case="all", field="orientation", found=counts, expected="one for all cases", mend=mend
        )
    ]


def guesses(grouping: Grouping) -> list[Problem]:
    """A grouping that only names speak for, and what speaks against one."""
    mend = f"If that is wrong, say it in {SHEET} in the raw folder: case, patient[, site, split]."
    texts = [f"{grouping.rule}: {grouping.evidence}"] if grouping.guess else []
    texts += [text for text in grouping.doubts if grouping.guess or grouping.doubts]
    return [
        Problem(
            case="all", field="patients", found=text, expected="a table or clear names", mend=mend
        )
        for text in texts
    ]


def _whites(cases: Sequence[CaseFacts]) -> tuple[list[Problem], list[Problem]]:
    """(problems, warnings) where black and white masks of one data set paint with differing values:
    they may be classes."""
    counts = Counter(case.white for case in cases if case.white)
    if len(counts) < 2:
        return [], []
    usual = counts.most_common(1)[0][0]
    many = ", ".join(f"{value} in {n} mask(s)" for value, n in sorted(counts.items()))
    if set(counts) <= WHITES:
        mend = "All are taken as white. Declare them in a labels.json if they are classes."
        problem = {"field": "mask values", "found": many, "expected": "one value for white"}
        return [], [Problem(case="all", **problem, mend=mend)]
    mend = "Declare the classes in a labels.json, or save all masks with one value."
    expected = f"{usual}, as most have ({many})"
    return [
        Problem(
            case=case.id, field="mask values", found=str(case.white), expected=expected, mend=mend
        )
        for case in cases
        if case.white not in (0, usual)
    ], []


def _depths(cases: Sequence[CaseFacts]) -> list[Problem]:
    """Colours of differing depth would be divided by differing whites."""
    counts = Counter(case.dtype for case in cases if case.dtype)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    mend = f"Save all pictures as {usual}."
    odd = [case for case in cases if case.dtype not in ("", usual)]
    return [
        Problem(
            case=c.id,
            field="voxel type",
            found=c.dtype,
            expected=f"{usual}, as most have",
            mend=mend,
        )
        for c in odd
    ]


def _pixels(image: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{image.shape} {image.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _relative(path: Path, root: Path) -> str:
    return str(path).removeprefix(f"{str(root).rstrip('/')}/")
