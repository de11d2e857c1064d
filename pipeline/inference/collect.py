"""Which images are to be segmented: files, folders, the cases of a data set or of a store. Needs no
torch, so it can be asked before a job waits in a queue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.inputs import (
    SEG,
    SEG_NRRD,
    Input,
    LayoutInput,
    StoreInput,
    is_npy,
)
from segfleet.preprocess.files.dicom import is_dicom
from segfleet.preprocess.files.dicom_seg import check_highdicom
from segfleet.preprocess.files.faults import instead_of_file
from segfleet.preprocess.files.images import ENDINGS, ending, stem
from segfleet.preprocess.readers.base import Layout, natural, visible
from segfleet.preprocess.readers.places import subfolders
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import NAME as MANIFEST

READABLE = (*ENDINGS, ".npy")
FORMATS = ("", SEG, SEG_NRRD)
CHANNEL = re.compile(r"(.+)_(\d{4})")


def collect(
    inputs: Sequence[str | Path],
    channels: int,
    format: str = "",
    layout: Layout | None = None,
) -> list[Input]:
    """The images among files and folders, in natural order. CASE_0000, CASE_0001, ... are channels
    of CASE when exactly the channels of the data set are there, or only 0000 (one channel, or all
    in one file); any other file is an image of its own. A folder of DICOM files is one image, and
    so is each folder of them in a folder. A store stands for all its cases.

    `format` of the labels: "dicom-seg" only goes with DICOM images. `layout` of the raw
    data sets that `inputs` are then. Raises InputError when a path does not exist or nothing is
    found.
    """
    if format not in FORMATS:
        raise InputError(f"format: found '{format}', expected dicom-seg, seg-nrrd, or none")
    if format == SEG:
        check_highdicom()
    paths = [Path(path) for path in inputs]
    for path in paths:
        if not path.exists():
            raise InputError(f"input: found no file or folder {path}")
    stores = [path for path in paths if (path / MANIFEST).is_file()]
    others = [path for path in paths if path not in stores]
    cases = [case for path in stores for case in _of_store(path)]
    if layout:
        cases += [case for path in others for case in _of_layout(path, layout)]
    elif others:
        cases += _of_files(others, channels)
    cases = [_looked_at(replace(case, format=format)) for case in cases]
    return _distinct(sorted(cases, key=lambda case: natural(case.id)))


def _of_store(path: Path) -> list[Input]:
    store = open_store(path)
    return [
        StoreInput(id=name_of(entry.id), images=(path / entry.shard,), store=store, entry=entry)
        for entry in store.manifest.cases
    ]


def _of_layout(path: Path, layout: Layout) -> list[Input]:
    reader = layout.open(path)
    cases = [
        LayoutInput(id=name_of(ref.id), images=ref.images, reader=reader, ref=ref)
        for ref in reader.refs()
    ]
    if not cases:
        raise InputError(f"input: found no case in {path}; expected {reader.layout}")
    return cases


def name_of(case: str) -> str:
    """A case's id as the name of a file."""
    return case.replace("/", "_")


def _of_files(paths: Sequence[Path], channels: int) -> list[Input]:
    files: list[Path] = []
    alone: list[Input] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in visible(path) if not p.is_dir()]
        images = [p for p in inside if p.name.lower().endswith(READABLE)]
        files += images
        series = [path, *subfolders(path)] if not images else ()
        alone += [
            Input(id=folder.resolve().name, images=tuple(slices))
            for folder in series
            if (slices := [p for p in visible(folder) if is_dicom(p)])
        ]
    if not files and not alone:
        raise InputError(
            f"input: found no image in {', '.join(map(str, paths))}; expected files ending in "
            f"{', '.join(READABLE)}, or folders of DICOM files. Of a raw data set name the layout: "
            "--layout, as `segfleet datasets` lists them"
        )
    cases: dict[tuple[Path, str, str], dict[int, Path]] = {}
    for path in dict.fromkeys(files):
        if not path.name.lower().endswith(ENDINGS):
            if not is_npy(path) and not is_dicom(path):
                ending(path)  # raises: this is no known kind of file
            alone.append(Input(id=path.stem, images=(path,)))
            continue
        match = CHANNEL.fullmatch(stem(path))
        if match:
            cases.setdefault((path.parent, match[1], ending(path)), {})[int(match[2])] = path
        else:
            alone.append(Input(id=stem(path), images=(path,)))
    for (_, name, _), parts in cases.items():
        alone += _channels(name, dict(sorted(parts.items())), channels)
    return alone


def _looked_at(case: Input) -> Input:
    """With a problem where a file is none: a pipe would be waited for."""
    if isinstance(case, StoreInput):
        if case.format == SEG:
            fault = "a case of a store"
            return replace(
                case, problem=f"{case.id}: a DICOM SEG needs a DICOM series, found {fault}"
            )
        return case
    for path in () if case.problem else case.images:
        if fault := instead_of_file(path):
            return replace(case, problem=f"{path}: found {fault}, expected a file")
        if case.format == SEG and path.name.lower().endswith(READABLE):
            return replace(case, problem=f"{path}: a DICOM SEG needs a DICOM series, found a file")
    return case


def _channels(name: str, parts: dict[int, Path], channels: int) -> list[Input]:
    if set(parts) in ({0}, set(range(channels))):
        return [Input(id=name, images=tuple(parts.values()))]
    if channels == 1:  # numbered images of one channel, not channels
        return [Input(id=stem(path), images=(path,)) for path in parts.values()]
    have = ", ".join(f"{index:04d}" for index in parts)
    where = next(iter(parts.values())).parent / name
    problem = (
        f"{where}: channels: found {have}, expected 0000 to {channels - 1:04d}. Add or remove "
        "files."
    )
    return [Input(id=name, images=tuple(parts.values()), problem=problem)]


def _distinct(cases: list[Input]) -> list[Input]:
    """Two images that would be written to one file: the second is a problem."""
    seen: dict[str, Input] = {}
    result = []
    for case in cases:
        first = seen.setdefault(case.output, case)
        if first is not case:
            problem = (
                f"{case.images[0]}: its prediction would be called {case.output}, as that of "
                f"{first.images[0]}. Rename one of them."
            )
            case = replace(case, problem=problem)
        result.append(case)
    return result
