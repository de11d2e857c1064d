"""The cases of a store as a table: mapped from its file, an entry made when it is asked for.

A part of a table is the same file and the numbers of its rows, and so is what a loader process
gets: a hundred thousand cases are opened in a fraction of a second and lie in memory once per
machine.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from segfleet.core.errors import InputError
from segfleet.preprocess.stores.case_entry import RESTORE, CaseEntry, SampledVoxels, inside
from segfleet.preprocess.stores.columns import (
    Arrays,
    Coded,
    CodedBuilder,
    Text,
    TextBuilder,
    map_columns,
    narrow,
)

PLAIN = ("id", "sha256", "source_sha256", "image_sha256", "image_file")
CODED = ("group", "shard", "key")
# of a case, as one JSON text: pictures share it, volumes differ
GRID = ("shape", "spacing", "crop", "raw_shape", "raw_spacing", "affine", "has_truth")
WIDE = 2**32


class CaseTable(Sequence[CaseEntry]):
    """Cases by number, in the order of the manifest. Entries are checked as they are made."""

    def __init__(
        self,
        arrays: Arrays,
        rows: np.ndarray | None = None,
        source: tuple[Path, tuple[int, ...]] | None = None,
    ):
        """`rows`: those of the file that are meant, in this order; None: all. `source`: the file
        and its stamp, if it lies in one."""
        self._arrays, self._rows, self._source = arrays, rows, source
        self._columns: dict[str, Sequence[str]] = {
            **{name: Text(arrays, f"case.{name}") for name in (*PLAIN, "voxels")},
            **{name: Coded(arrays, f"case.{name}") for name in (*CODED, "grid")},
        }

    @classmethod
    def of(cls, cases: Iterable[CaseEntry]) -> CaseTable:
        """In memory."""
        if isinstance(cases, CaseTable):
            return cases
        builder = TableBuilder()
        for case in cases:
            builder.add(case)
        return builder.table()

    def __len__(self) -> int:
        return len(self._columns["id"]) if self._rows is None else len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._recent(self._row(index % len(self)))

    def __iter__(self) -> Iterator[CaseEntry]:
        return (self._entry(self._row(index)) for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self):
        if self._source is None:
            return CaseTable, (dict(self._arrays), self._rows)
        return _reopened, (*self._source, self._rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `CaseTable` is made of, for a file."""
        if self._rows is None and self._source is None:
            return dict(self._arrays)
        builder = TableBuilder()
        for case in self:
            builder.add(case)
        return builder.arrays()

    def take(self, indices: Iterable[int] | np.ndarray) -> CaseTable:
        """Those of these numbers, in this order."""
        chosen = np.fromiter(indices, np.int32)
        chosen = chosen if self._rows is None else self._rows[chosen]
        return CaseTable(self._arrays, chosen, self._source)

    def among(self, ids: Collection[str]) -> CaseTable:
        """Those with one of these ids (a set), in the order of the table."""
        return self.take(index for index, name in enumerate(self.column("id")) if name in ids)

    def with_foreground(self) -> CaseTable:
        """Those that have a sampled voxel."""
        first, end = self._arrays["case.labels"], self._arrays["sampled.end"]
        at = np.concatenate([[0], end])  # where the voxels of a label begin
        first = np.concatenate([[0], first])
        has = at[first[1:]] > at[first[:-1]]
        return self.take(np.flatnonzero(has if self._rows is None else has[self._rows]))

    def column(self, name: str) -> Iterator[str]:
        """One text of every case, without making entries: id, group, sha256, ..."""
        texts = self._columns[name]
        return iter(texts) if self._rows is None else (texts[int(row)] for row in self._rows)

    def columns(self, *names: str) -> Iterator[Any]:
        """Several of them, side by side: a tuple of texts for every case."""
        return zip(*map(self.column, names), strict=True)

    def grids(self, name: str) -> Iterator[Any]:
        """shape, spacing, ... (GRID) of every case; equal ones are decoded once."""
        code = self._columns["grid"].code
        code = code if self._rows is None else code[self._rows]
        return (self._grid(number)[name] for number in code.tolist())

    def find(self, case_id: str) -> CaseEntry | None:
        """The case of this id."""
        index = self._numbers.get(case_id)
        return None if index is None else self[index]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.column("id"))}

    @functools.cached_property
    def _grid(self):
        texts = self._columns["grid"].values

        @functools.lru_cache(maxsize=4096)
        def grid(number: int) -> dict[str, Any]:
            return {name: _tuples(value) for name, value in json.loads(texts[number]).items()}

        return grid

    @functools.cached_property
    def _recent(self):
        """Entries by row: a loader draws the cases of most data sets again and again."""
        return functools.lru_cache(maxsize=1024)(self._entry)

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def _entry(self, row: int) -> CaseEntry:
        try:
            return CaseEntry.model_validate(
                {
                    **{name: self._columns[name][row] for name in (*PLAIN, *CODED)},
                    **self._grid(int(self._columns["grid"].code[row])),
                    "voxels": json.loads(self._columns["voxels"][row]),
                    "foreground": self._foreground(row),
                }
            )
        except (ValidationError, ValueError, KeyError, IndexError, TypeError) as error:
            place = "" if self._source is None else f"{self._source[0]}: "
            raise InputError(
                f"store: {place}case {row} is damaged ({' '.join(str(error).split())[:200]}). "
                f"{RESTORE}"
            ) from None

    def _foreground(self, row: int) -> SampledVoxels:
        first = int(self._arrays["case.labels"][row - 1]) if row else 0
        last = int(self._arrays["case.labels"][row])
        labels, end = self._arrays["sampled.label"], self._arrays["sampled.end"]
        voxels = self._arrays["sampled.voxels"]
        starts = [int(end[at - 1]) if at else 0 for at in range(first, last)]
        return SampledVoxels(
            labels[first:last].tolist(),
            [voxels[s:e] for s, e in zip(starts, end[first:last].tolist(), strict=True)],
        )


class TableBuilder:
    """A table in the making: case after case, nothing kept but its columns."""

    def __init__(self) -> None:
        self._text = {name: TextBuilder() for name in (*PLAIN, "voxels")}
        self._coded = {name: CodedBuilder() for name in (*CODED, "grid")}
        self._labels, self._label, self._end = array("Q"), array("i"), array("Q")
        self._voxels = array("I")

    def add(self, case: CaseEntry) -> None:
        for name in PLAIN:
            self._text[name].add(getattr(case, name))
        for name in CODED:
            self._coded[name].add(getattr(case, name))
        self._text["voxels"].add(json.dumps(case.voxels, separators=(",", ":")))
        grid = {name: getattr(case, name) for name in GRID}
        self._coded["grid"].add(json.dumps(grid, separators=(",", ":")))
        for label, voxels in case.foreground.items():
            if self._voxels.typecode == "I" and len(voxels) and max(voxels) >= WIDE:
                self._voxels = array("Q", self._voxels)
            self._voxels.extend(map(int, voxels))
            self._label.append(label)
            self._end.append(len(self._voxels))
        self._labels.append(len(self._label))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name, column in {**self._text, **self._coded}.items():
            arrays |= column.arrays(f"case.{name}")
        kind = "<u4" if self._voxels.typecode == "I" else "<u8"
        return {
            **arrays,
            "case.labels": narrow(self._labels),
            "sampled.label": np.asarray(self._label, "<i4"),
            "sampled.end": narrow(self._end),
            "sampled.voxels": np.frombuffer(self._voxels, kind)
            if self._voxels
            else np.empty(0, kind),
        }

    def table(self) -> CaseTable:
        return CaseTable(self.arrays())


class SplitTable(Mapping[str, tuple[dict[str, tuple[str, ...]], ...]]):
    """The splits of a store; the ids of one are gathered when it is asked for."""

    def __init__(self, cases: CaseTable, arrays: Arrays, spans: Mapping[str, Any]):
        """`spans`: name -> folds of {side: (start, stop)} in the array `split.case` of case
        numbers; numbers beyond the cases are those of `split.other`."""
        self._cases, self._arrays, self._spans = cases, arrays, spans
        self._known: dict[str, tuple[dict[str, tuple[str, ...]], ...]] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __contains__(self, name: object) -> bool:
        return name in self._spans

    def __getitem__(self, name: str) -> tuple[dict[str, tuple[str, ...]], ...]:
        if name not in self._known:
            ids = self._ids
            numbers = self._arrays["split.case"]
            self._known[name] = tuple(
                {
                    side: tuple(ids[number] for number in numbers[start:stop].tolist())
                    for side, (start, stop) in fold.items()
                }
                for fold in self._spans[name]
            )
        return self._known[name]

    @functools.cached_property
    def _ids(self) -> tuple[str, ...]:
        return (*self._cases.column("id"), *Text(self._arrays, "split.other"))

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self):
        if self._cases._source is None:
            return dict, (dict(self),)
        return _splits, (self._cases, self._spans)


class FileTable(Mapping[str, dict[str, Any]]):
    """Path inside the store -> its bytes and sha256; read when first asked for."""

    def __init__(self, arrays: Arrays, source: tuple[Path, tuple[int, ...]]):
        self._arrays, self._source = arrays, source

    @functools.cached_property
    def _facts(self) -> dict[str, dict[str, Any]]:
        paths, texts = Text(self._arrays, "file.path"), Text(self._arrays, "file.facts")
        try:
            return {inside(path): json.loads(text) for path, text in zip(paths, texts, strict=True)}
        except ValueError as error:
            raise InputError(f"store: {self._source[0]} is damaged ({error}). {RESTORE}") from None

    def __len__(self) -> int:
        return len(self._arrays["file.path.end"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __getitem__(self, path: str) -> dict[str, Any]:
        return self._facts[path]

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self):
        return _files, self._source


class Rows(Sequence[tuple]):
    """A list of small tuples, equal ones once."""

    def __init__(self, arrays: Arrays, name: str, source: tuple[Path, tuple[int, ...]]):
        self._texts, self._name, self._source = Coded(arrays, name), name, source

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self)[index]
        return _tuples(json.loads(self._texts[index]))

    def __iter__(self) -> Iterator[tuple]:
        values = [_tuples(json.loads(text)) for text in self._texts.values]
        return (values[code] for code in self._texts.code.tolist())

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(map(tuple, other)) if isinstance(other, Sequence) else False

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self):
        return _rows, (*self._source, self._name)


def with_foreground(cases: Sequence[CaseEntry]) -> Sequence[CaseEntry]:
    """Those that have a sampled voxel."""
    if isinstance(cases, CaseTable):
        return cases.with_foreground()
    return tuple(case for case in cases if any(map(len, case.foreground.values())))


def split_columns(
    ids: Iterable[str], splits: Mapping[str, Sequence[Mapping[str, Sequence[str]]]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and spans of a `SplitTable`."""
    numbers = {name: number for number, name in enumerate(ids)}
    other, chosen, spans = TextBuilder(), array("i"), {}
    for name, folds in splits.items():
        spans[name] = []
        for fold in folds:
            place = {}
            for side, members in fold.items():
                start = len(chosen)
                for member in members:
                    if member not in numbers:
                        numbers[member] = len(numbers)
                        other.add(member)
                    chosen.append(numbers[member])
                place[side] = [start, len(chosen)]
            spans[name].append(place)
    return {"split.case": np.asarray(chosen, "<i4"), **other.arrays("split.other")}, spans


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced, cheap to ask for."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@functools.lru_cache(maxsize=8)
def mapped(path: Path, stamp: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The arrays of a table's file, once per process. Raises InputError if it is no more what it
    was."""
    try:
        if stamp_of(path) == stamp:
            return map_columns(path)
        reason = "changed"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise InputError(
        f"store: {path} is not what it was when the store was opened ({reason}). Put it back and "
        "run the same command again"
    )


def _reopened(path: Path, stamp: tuple[int, ...], rows: np.ndarray | None) -> CaseTable:
    return CaseTable(mapped(path, stamp), rows, (path, stamp))


def _splits(cases: CaseTable, spans: Mapping[str, Any]) -> SplitTable:
    return SplitTable(cases, cases._arrays, spans)


def _files(path: Path, stamp: tuple[int, ...]) -> FileTable:
    return FileTable(mapped(path, stamp), (path, stamp))


def _rows(path: Path, stamp: tuple[int, ...], name: str) -> Rows:
    return Rows(mapped(path, stamp), name, (path, stamp))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
