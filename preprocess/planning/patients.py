"""Which cases are of one patient: by the user's table, by what the files say, or by their names.

Names are judged together: numbers behind a name are slices or visits of one patient only if many
patients have them. Cases of one patient never land on both sides of a split, so a guess that joins
too little is a leak, and one that joins too much leaves no split.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from segfleet.core.errors import InputError, Problem

NAME = "patients.csv"
COLUMNS = ("case", "patient", "site", "split")
MOST_VISITS = 20  # of one patient: more volumes than this are a cohort
FEWEST = 3  # patients that a guess must leave
BIDS = re.compile(r"(?P<patient>sub-[a-z0-9]+)_.*", re.IGNORECASE)
VISIT = re.compile(
    r"(?P<patient>.*\d)[_.-]?[_-](?P<what>t|tp|time|timepoint|visit|ses|session|phase|scan|ed|es|"
    r"baseline|followup|fu|pre|post|left|right|l|r|od|os|cc|mlo)[_-]?\d*",
    re.IGNORECASE,
)
SLICE = re.compile(
    r"(?P<patient>.*\d)[_-](?P<what>slice|sl|z|s|frame|fr|image|img|im|tile|patch|crop|roi|view)"
    r"[_-]?\d*",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?P<patient>.*\d)[_-]\d+")
# what is numbered here is no patient: study1_0001
COLLECTIVE = re.compile(
    r"(^|.*[_-])(site|cent(er|re)|hospital|clinic|study|data(set)?|batch|part|fold|cohort|train(ing)?|"
    r"test(ing)?|val(idation)?|year|scanner|task|set|group|class|project|vendor)[_-]?\d+",
    re.IGNORECASE,
)
YEAR = re.compile(r"(19|20)\d\d")


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """`patients`: case -> patient, only where it is not the case's own. `guess`: nothing but the
    names says so; `doubts` are what a person should look at."""

    patients: Mapping[str, str]
    rule: str
    evidence: str
    guess: bool = False
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A patients.csv: case -> patient, site and side of the split; what is wrong with it."""

    path: Path
    patients: Mapping[str, str]
    sites: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)

    def problems(self, cases: Sequence[str]) -> list[Problem]:
        """Cases that are listed and not there, and the other way round."""
        present, problems = set(cases), []
        for names, expected in (
            ([c for c in self.patients if c not in present], "names of cases"),
            ([c for c in cases if c not in self.patients], "a line for every case"),
        ):
            if names:
                rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
                text = ("without a line: " if expected[0] == "a" else "") + ", ".join(names[:5])
                mend = "Correct the file or remove it."
                problem = {"field": "case", "found": text + rest, "expected": expected}
                problems.append(Problem(case=self.path.name, **problem, mend=mend))
        return problems


def read_sheet(path: Path, plain: Callable[[str], str]) -> Sheet | None:
    """The table of a file, None without one. `plain` makes a case's name of a file's. Raises
    InputError for a file that is no such table."""
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            text = file.read()
        delimiter = ";" if ";" in text.partition("\n")[0] else ","
        table = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
        names = {(name or "").strip().lower(): name for name in table.fieldnames or ()}
        rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if "case" not in names or "patient" not in names:
        raise InputError(
            f"{path}: found the columns {', '.join(names) or 'none'}, expected: case, patient, and "
            "if you like site and split"
        )
    columns: dict[str, dict[str, str]] = {column: {} for column in COLUMNS[1:]}
    for line, row in enumerate(rows, 2):
        case, patient = (str(row.get(names[c]) or "").strip() for c in ("case", "patient"))
        if not case and not patient:
            continue
        case = plain(case)
        if not case or not patient or case in columns["patient"]:
            found = f"'{case}' twice" if case in columns["patient"] else f"'{case}', '{patient}'"
            raise InputError(f"{path}: line {line}: found {found}, expected a case and its patient")
        for column in COLUMNS[1:]:
            value = str(row.get(names[column]) or "").strip() if column in names else ""
            if value:
                columns[column][case] = value
    sides = {"train", "val", "test"}
    if odd := sorted({s for s in columns["split"].values() if s.lower() not in sides}):
        raise InputError(f"{path}: split: found '{odd[0]}', expected train, val or test")
    splits = {case: side.lower() for case, side in columns["split"].items()}
    return Sheet(path=path, patients=columns["patient"], sites=columns["site"], splits=splits)


def by_names(cases: Sequence[str], dims: int) -> Grouping:
    """Patients from the names of all cases of a data set of 2 or 3 dimensions."""
    now = {case: case for case in cases}
    rules, doubts, guess = [], [], False
    for _ in range(3):
        joined, rule, sure = _level(sorted(set(now.values())), dims, doubts)
        if not joined:
            break
        now = {case: joined.get(patient, patient) for case, patient in now.items()}
        rules.append(rule)
        guess |= not sure
    patients = {case: patient for case, patient in now.items() if patient != case}
    if not patients:
        return Grouping(
            patients={}, rule="every case is a patient", guess=bool(doubts), doubts=tuple(doubts),
            evidence="no name speaks of slices, frames or visits",
        )  # fmt: skip
    sizes = _children(now)
    most = max(sizes, key=lambda name: (len(sizes[name]), name))
    evidence = f"{len(cases)} cases are {len(sizes)} patients; '{most}' has {len(sizes[most])}"
    rule = " and ".join(dict.fromkeys(rules))
    return Grouping(
        patients=patients, rule=rule, evidence=evidence, guess=guess, doubts=tuple(doubts)
    )


def patient_of(case_id: str) -> str:
    """patient001_frame12 -> patient001, as its words say; an id that does not speak of a visit is a
    patient of its own: ""."""
    for pattern in (BIDS, VISIT, SLICE):
        if match := pattern.fullmatch(case_id):
            return match["patient"]
    return ""


def _level(names: Sequence[str], dims: int, doubts: list[str]) -> tuple[dict[str, str], str, bool]:
    """(name -> shorter name, rule, whether words say so) of the first rule that fits."""
    for pattern, rule in (
        (BIDS, "subjects of BIDS"),
        (VISIT, "names with a visit, session or side"),
        (SLICE, "names with a slice or frame"),
    ):
        joined = {name: match["patient"] for name in names if (match := pattern.fullmatch(name))}
        limit = MOST_VISITS if dims == 3 or pattern is VISIT else len(names)
        if joined := _kept(joined, limit, doubts):
            return joined, rule, True
    joined = {name: match["patient"] for name in names if (match := NUMBER.fullmatch(name))}
    joined = _kept(joined, MOST_VISITS if dims == 3 else len(names), doubts)
    children = _children(joined)
    several = [len(cases) for cases in children.values()]
    if len(children) >= FEWEST and median(several) >= 2:
        return joined, "names that end in a second number", False
    if several and max(several) > 1 and not doubts:
        few = ", ".join(list(children)[:3])
        doubts.append(f"numbers behind {few} may count slices or visits of one patient")
    return {}, "", True


def _kept(joined: dict[str, str], limit: int, doubts: list[str]) -> dict[str, str]:
    """Without what would join a study, a site or a cohort into one patient."""
    for name, cases in _children(joined).items():
        word, year = COLLECTIVE.fullmatch(name), YEAR.fullmatch(name)
        if word or year or len(cases) > limit:
            why = "names no patient" if word or year else "has too many volumes or visits for one"
            text = f"'{name}' with {len(cases)} cases {why}: each is taken as a patient"
            if text not in doubts:
                doubts.append(text)
            for case in cases:
                del joined[case]
    return joined


def _children(joined: Mapping[str, str]) -> dict[str, list[str]]:
    children = defaultdict(list)
    for name, parent in joined.items():
        children[parent].append(name)
    return dict(children)
