"""What every raw layout can do. A layout is one file `preprocess/readers/<name>.py` with a class
`Reader`."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import pkgutil
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from segfleet.core.errors import InputError, Problem, check_one_of, did_you_mean, import_part
from segfleet.preprocess.case import Case, Geometry
from segfleet.preprocess.files.faults import is_regular
from segfleet.preprocess.files.grids import settled
from segfleet.preprocess.files.images import ENDINGS, read_image, read_label, sources
from segfleet.preprocess.files.segments import is_seg_nrrd
from segfleet.preprocess.planning.patients import NAME as SHEET
from segfleet.preprocess.planning.patients import Grouping, Sheet, by_names, read_sheet
from segfleet.preprocess.planning.patients import patient_of as patient_of
from segfleet.preprocess.readers.places import locate
from segfleet.preprocess.stores.manifest import Dataset

Folds = tuple[dict[str, tuple[str, ...]], ...]
SHARED = ("base", "pairs", "places", "unlabelled")  # what several layouts use


@dataclass(frozen=True, kw_only=True)
class CaseRef:
    """Where the files of one case lie. `labels` is empty where they are not asked for, and where
    one document holds those of all cases. `group` is the patient; empty: the case is a patient of
    its own. `stratum` is what folds are to be balanced over: a site, or a class of the data set.
    `said` is what a description of many cases says of this one, and counts for its hash as its
    files do.
    """

    id: str
    images: tuple[Path, ...]  # one file per channel, or one that holds all
    labels: tuple[Path, ...]
    group: str = ""
    stratum: str = ""
    said: str = ""


@dataclass(frozen=True)
class Layout:
    """The name of a layout with its own options: how a raw data set is to be read."""

    name: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def open(self, root: str | Path) -> RawReader:
        return open_reader(self.name, root, **self.options)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one should know before downloading a data set; said from its publications, not from the
    files."""

    dims: str  # "2D", "3D"
    modality: str
    download: str = ""  # the official page
    licence: str = ""
    complete: int | None = None  # labelled cases of the whole download
    counts: str = ""  # the same in words


class RawReader(ABC):
    """One raw layout in a folder. Opening it reads the layout's description only, never an image.

    Raises InputError where the folder is not of this layout; what is wrong inside is reported by
    `problems`.
    """

    about: ClassVar[str]  # one line: which data sets look like this
    layout: ClassVar[str]  # the folder, in one line
    facts: ClassVar[Facts]
    # whose word the layout's own patients are: "what ... says"
    patients_from: ClassVar[str] = "the layout says"
    options: ClassVar[dict[str, tuple[str, ...]]] = {}  # name -> legal values, the default first

    def __init__(self, root: str | Path, *, labelled: bool = True, **options: str):
        """`labelled`: whether labels are wanted; without, images that have none are cases, too."""
        self.root, self.labelled = Path(root), labelled
        if not self.root.is_dir():
            raise InputError(f"raw: {self.root} is not a folder. Expected {self.layout}")
        self.chosen = {name: values[0] for name, values in self.options.items()}
        for name, value in options.items():
            if name not in self.options:
                raise InputError(
                    f"option: found '{name}', expected one of: "
                    f"{', '.join(self.options) or 'none, for this layout'}"
                )
            check_one_of(f"option {name}", value, self.options[name])
            self.chosen[name] = value
        self.folder = locate(self.root, self.lies_in, self.layout)

    def lies_in(self, folder: Path) -> bool:
        """Whether a folder holds the data set: the root, or else the only one in it that does."""
        return True

    @abstractmethod
    def dataset(self) -> Dataset: ...

    @abstractmethod
    def cases(self) -> list[CaseRef]:
        """All labelled cases in natural order; their files may be missing, which the check
        reports. Those without a group are grouped by `refs`."""

    def refs(self) -> list[CaseRef]:
        """The cases with their patients. Listed once: a reader describes the folder as it was."""
        return list(self._grouped[0])

    @property
    def grouping(self) -> Grouping:
        """How cases came to their patients."""
        return self._grouped[1]

    @cached_property
    def sheet(self) -> Sheet | None:
        """The user's patients.csv in the raw folder, which says more than any name. Raises
        InputError."""
        folders = dict.fromkeys((self.root, self.folder))
        sheets = (read_sheet(folder / SHEET, _plain) for folder in folders)
        return next((sheet for sheet in sheets if sheet), None)

    @cached_property
    def _grouped(self) -> tuple[tuple[CaseRef, ...], Grouping]:
        refs, sheet = _as_spelt(self.cases()), self.sheet
        if sheet:
            refs = [
                replace(
                    ref,
                    group=sheet.patients.get(ref.id, ref.group),
                    stratum=sheet.sites.get(ref.id, ref.stratum),
                )
                for ref in refs
            ]
            rule, many = f"the table {sheet.path.name}", len(set(sheet.patients.values()))
            evidence = f"{len(sheet.patients)} cases of {many} patients"
            return tuple(refs), Grouping(patients=sheet.patients, rule=rule, evidence=evidence)
        if any(ref.group for ref in refs):
            patients = {ref.id: ref.group for ref in refs if ref.group}
            evidence = f"{len(patients)} cases of {len(set(patients.values()))} patients"
            return tuple(refs), Grouping(
                patients=patients, rule=f"what {self.patients_from}", evidence=evidence
            )
        dims = {"2D": 2, "3D": 3}.get(self.facts.dims) or self.dataset().dims
        grouping = by_names([ref.id for ref in refs], dims)
        refs = [replace(ref, group=grouping.patients.get(ref.id, "")) for ref in refs]
        return tuple(refs), grouping

    def __getstate__(self) -> dict[str, Any]:
        """Without the list of cases: workers are given theirs one by one."""
        return {key: value for key, value in self.__dict__.items() if key != "_grouped"}

    def problems(self) -> list[Problem]:
        """Faults of the layout itself, found without opening an image."""
        return []

    def brought(self) -> dict[str, Folds]:
        """The splits the data set brings along or is published with, by name."""
        return {}

    def splits(self) -> dict[str, Folds]:
        """Those, and the user's from patients.csv: "given", and "given-test" against its test
        part."""
        splits = self.brought()
        if self.sheet and self.sheet.splits:
            side: dict[str, list[str]] = {name: [] for name in ("train", "val", "test")}
            for ref in self.refs():
                if ref.id in self.sheet.splits:
                    side[self.sheet.splits[ref.id]].append(ref.id)
            for name, val in (("given", side["val"] or side["test"]), ("given-test", side["test"])):
                if side["train"] and val:
                    splits[name] = ({"train": tuple(side["train"]), "val": tuple(val)},)
        return splits

    def may_be_empty(self, ref: CaseRef) -> bool:
        """Whether a mask without foreground is usual for this case, so that nobody needs to be
        warned."""
        return False

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """(C, Z, Y, X) and its grid. Raises ImageError."""
        return read_image(ref.images, digest)

    def label(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        """(Z, Y, X) and its grid. Raises ImageError."""
        path = ref.labels[0]
        named = self.dataset().labels if is_seg_nrrd(path) else None
        return read_label(path, digest, named)

    def read(self, ref: CaseRef) -> Case:
        """Image and label of one case; `extra["source_sha256"]` is the hash of the files' bytes.
        Raises ImageError."""
        digest = hashlib.sha256()
        image, geometry = self.image(ref, digest)
        if self.labelled:
            label, _ = settled(*self.label(ref, digest), geometry)
        else:
            label = no_label(geometry)
        extra = {
            "source_sha256": digest.hexdigest(),
            "files": [os.path.relpath(p, self.root) for p in ref.images],
        }
        return Case(
            id=ref.id,
            group=ref.group,
            image_CZYX=image,
            label_ZYX=label,
            geometry=geometry,
            extra=extra,
        )


def no_label(geometry: Geometry) -> np.ndarray:
    """(Z, Y, X) of an image without a label: background."""
    return np.zeros(geometry.shape, np.uint8)


def _as_spelt(refs: Sequence[CaseRef]) -> list[CaseRef]:
    """With the files as the folder spells them, where one that is looked for is there but for how
    its accents are stored (NFC, NFD) or for upper and lower case."""
    folders: dict[Path, dict[str, list[Path]]] = {}

    def spelt(path: Path) -> Path:
        if os.path.lexists(path) or not path.parent.is_dir():
            return path
        if path.parent not in folders:
            names = folders.setdefault(path.parent, {})
            for other in path.parent.iterdir():
                names.setdefault(_folded(other.name), []).append(other)
        twins = folders[path.parent].get(_folded(path.name), ())
        return twins[0] if len(twins) == 1 else path

    return [
        replace(ref, images=tuple(map(spelt, ref.images)), labels=tuple(map(spelt, ref.labels)))
        for ref in refs
    ]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def source_sha256(ref: CaseRef) -> str:
    """The hash `read` finds, without decoding anything."""
    digest = hashlib.sha256()
    for path in (*ref.images, *ref.labels):
        for file in sources(path):
            if not is_regular(file):  # a pipe would be waited for
                raise FileNotFoundError(file)
            digest.update(file.read_bytes())
    digest.update(ref.said.encode())
    return digest.hexdigest()


def readers() -> list[str]:
    import segfleet.preprocess.readers as room

    return sorted(m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in SHARED)


def reader_class(name: str) -> type[RawReader]:
    """The class of a layout. Raises InputError with the legal names."""
    if name not in readers():
        raise InputError(
            f"data set: found '{name}', expected one of the layouts: {', '.join(readers())}."
            f"{did_you_mean(name, readers())}"
        )
    return import_part(f"segfleet.preprocess.readers.{name}", "layout").Reader


def open_reader(name: str, root: str | Path, *, unlabelled: str = "", **options: str) -> RawReader:
    """The reader of a layout with its options; `unlabelled`, if not empty: of its images alone."""
    create: Callable[..., RawReader] = reader_class(name)
    if not unlabelled:
        return create(root, **options)
    bare = import_part("segfleet.preprocess.readers.unlabelled", "layout")
    return bare.Unlabelled(create(root, labelled=False, **options))


def natural(text: str) -> list:
    """Sort key: case2 before case10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.lower())
        for part in re.split(r"(\d+)", text)
        if part
    ]


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The files of a folder in natural order, without what macOS and Windows leave behind (`._*`,
    Thumbs.db). `pattern` is in lower case, and fits names in upper case, too."""
    junk = ("thumbs.db", "desktop.ini")
    names = [(p.name.lower(), p) for p in folder.glob("*")]
    files = [p for n, p in names if n[0] != "." and n not in junk and fnmatchcase(n, pattern)]
    return sorted(files, key=lambda p: natural(p.name))


def tables(folder: Path) -> list[Path]:
    """The CSV files of a folder, whatever the case of their ending: files that can be read, no
    folders, pipes or links to nowhere."""
    files = [path for path in visible(folder) if path.suffix.lower() == ".csv"]
    return [path for path in files if is_regular(path) and path.name != SHEET]


def _plain(name: str) -> str:
    """A case's name, of that of a file."""
    name = unicodedata.normalize("NFC", name.rpartition("/")[2])
    return next((name[: -len(end)] for end in ENDINGS if name.lower().endswith(end)), name)


def read_json(path: Path) -> dict:
    """A JSON object. Raises InputError that names the file and the place."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply to be a description") from None
    except (OSError, ValueError) as error:  # no text, or a number of thousands of digits
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: found a {type(document).__name__}, expected an object with the data set's "
            "description"
        )
    return document


def read_table(path: Path, delimiter: str = ",") -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file in their order, and its rows. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.DictReader(file, delimiter=delimiter, restval="", skipinitialspace=True)
            return [name or "" for name in rows.fieldnames or ()], list(rows)
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from None


def declared_labels(file: Path) -> dict[str, int]:
    """The classes of a labels.json, by value; none without one. Raises InputError."""
    if not file.is_file():
        return {}
    labels = {str(name): number(value, name, file) for name, value in read_json(file).items()}
    if labels.get("background") != 0 or not 1 < len(labels) == len(set(labels.values())):
        raise InputError(
            f'{file}: found {labels}, expected {{"background": 0, "name": 1, ...}}, all values '
            "different"
        )
    return dict(sorted(labels.items(), key=lambda item: item[1]))


def field(document: dict, name: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """document[name] of the given type. Raises InputError that names file and key."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(
        {"dict": "object", "str": "text", "int": "integer"}.get(k.__name__, k.__name__)
        for k in kinds
    )
    if name not in document:
        raise InputError(
            f"{path}: the key '{name}' is missing ({expected}). Present: "
            f"{', '.join(document) or 'nothing'}"
        )
    if not isinstance(document[name], kind) or isinstance(document[name], bool):
        raise InputError(f"{path}: {name}: found {document[name]!r}, expected {expected}")
    return document[name]


def number(text: Any, key: str, path: Path) -> int:
    """An integer that JSON may have as a text. Raises InputError."""
    if isinstance(text, bool) or not re.fullmatch(r"\d{1,18}", str(text)):
        raise InputError(f"{path}: {key}: found {text!r}, expected an integer from 0")
    return int(text)


def duplicates(ids: list[str]) -> list[Problem]:
    counts: dict[str, int] = {}
    for case in ids:
        counts[case] = counts.get(case, 0) + 1
    return [
        Problem(
            case=case,
            field="id",
            found=f"{n} cases of this name",
            expected="one",
            mend="Rename the files or remove the copies.",
        )
        for case, n in counts.items()
        if n > 1
    ]


def fold_problems(
    file: str, place: str, fold: Mapping[str, Iterable[str]], ids: set[str], folder: str
) -> list[Problem]:
    """Cases of a split's list that are not there, or on both of its sides."""
    problems = []
    unknown = sorted({*fold["train"], *fold["val"]} - ids, key=natural)
    both = sorted({*fold["train"]} & {*fold["val"]}, key=natural)
    for cases, expected in (
        (unknown, f"cases of {folder}"),
        (both, "no case in both train and val"),
    ):
        if cases:
            text = ", ".join(cases[:5]) + (f" and {len(cases) - 5} more" if len(cases) > 5 else "")
            problems.append(
                Problem(
                    case=file,
                    field=place,
                    found=text,
                    expected=expected,
                    mend="Correct the file or remove it.",
                )
            )
    return problems


def count_problem(cases: int, declared: Any, key: str = "numTraining") -> list[Problem]:
    if isinstance(declared, int) and declared == cases:
        return []
    mend = f"Correct {key} in dataset.json or add the missing files."
    return [
        Problem(
            case="dataset.json",
            field=key,
            found=str(declared),
            expected=f"{cases}, the number of training cases",
            mend=mend,
        )
    ]
