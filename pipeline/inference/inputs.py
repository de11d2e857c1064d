"""Which images are to be segmented, and where their labels go. Needs no torch, so it can be asked
before a job waits in a queue."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts, write_atomically
from segfleet.core.parallel import Apart, Died
from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.dicom import is_dicom, read_series
from segfleet.preprocess.files.dicom_seg import check_highdicom
from segfleet.preprocess.files.faults import crashed, instead_of_file
from segfleet.preprocess.files.images import ENDINGS, NIFTI, ending, peek, read_image, sources, stem
from segfleet.preprocess.files.npy import read_npy
from segfleet.preprocess.files.writer import WRITABLE
from segfleet.preprocess.readers.base import natural, visible
from segfleet.preprocess.readers.places import subfolders

# of the folder; of every file in it: what it was made of
RECORD, NOTES = (
    "predictions.json",
    ".predictions",
)
READABLE = (*ENDINGS, ".npy")
# a prediction is one file, whatever its image is made of
INSTEAD = {".mhd": ".mha", ".nhdr": ".nrrd"}
SEG, SEG_NRRD = "dicom-seg", "seg-nrrd"
FORMATS = ("", SEG, SEG_NRRD)
CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One image to segment: its files, one per channel or one for all. `problem` says why it cannot
    be used."""

    id: str
    images: tuple[Path, ...]
    problem: str = ""
    format: str = ""  # of the label file: "" (the image's) | "dicom-seg" | "seg-nrrd"

    @property
    def output(self) -> str:
        """Name of the label file: the image's own ending if labels survive it; a DICOM series gets
        a NIfTI volume, any other picture a .png; .dcm for a DICOM SEG."""
        if self.format == SEG:
            return f"{self.id}.dcm"
        if self.format == SEG_NRRD:
            return f"{self.id}.seg.nrrd"
        name = self.images[0].name.lower()
        kind = next((end for end in ENDINGS if name.endswith(end)), "")
        if kind in WRITABLE:
            return self.id + kind
        return self.id + (
            INSTEAD.get(kind) or (".png" if kind or _is_npy(self.images[0]) else ".nii.gz")
        )

    @property
    def probabilities(self) -> str:
        """Name of the file of its probabilities, if they are wanted."""
        return f"{self.id}.npz"

    def read(self) -> tuple[np.ndarray, Geometry]:
        """(C, Z, Y, X) and its grid, as the layouts read such files. Raises ImageError."""
        first = self.images[0]
        if _is_npy(first):
            array = read_npy(first, 3 if peek(first)[0] > 1 else 2)
            image = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
            facts = FileFacts(dims=2)
            image = np.ascontiguousarray(image[:, None], np.float32)
            return image, Geometry(shape=image.shape[1:], file=facts)
        if not first.name.lower().endswith(ENDINGS):
            return read_series(self.images)
        return read_image(self.images)

    def read_apart(self, apart: Apart) -> tuple[np.ndarray, Geometry]:
        """As `read`, in another process where a library of C code decodes the files: a damaged
        file that makes it crash is a problem of this image, not the end of all."""
        name = self.images[0].name.lower()
        if name.endswith(NIFTI) or name.endswith(".npy"):
            return self.read()
        try:
            return apart(Input.read, self)
        except Died:
            raise crashed(self.images[0]) from None

    def content(self) -> str:
        """sha256 of everything that is read of this image. Raises OSError."""
        files = dict.fromkeys(file for path in self.images for file in sources(path))
        return hashlib.sha256(
            "".join(str(file_facts(path)["sha256"]) for path in files).encode()
        ).hexdigest()


def _is_npy(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def collect(inputs: Sequence[str | Path], channels: int, format: str = "") -> list[Input]:
    """The images among files and folders, in natural order. CASE_0000, CASE_0001, ... are channels
    of CASE when exactly the channels of the data set are there, or only 0000 (one channel, or all
    in one file); any other file is an image of its own. A folder of DICOM files is one image, and
    so is each folder of them in a folder.

    `format` of the labels: "dicom-seg" only goes with DICOM images. Raises InputError when a path
    does not exist or nothing is found.
    """
    if format not in FORMATS:
        raise InputError(f"format: found '{format}', expected dicom-seg, seg-nrrd, or none")
    if format == SEG:
        check_highdicom()
    files: list[Path] = []
    alone: list[Input] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise InputError(f"input: found no file or folder {path}")
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in visible(path) if not p.is_dir()]
        known = [p for p in inside if p.name.lower().endswith(READABLE)]
        files += known
        series = [path, *subfolders(path)] if not known else ()
        alone += [
            Input(id=folder.resolve().name, images=tuple(slices))
            for folder in series
            if (slices := [p for p in visible(folder) if is_dicom(p)])
        ]
    if not files and not alone:
        where = ", ".join(map(str, inputs)) or "nothing"
        raise InputError(
            f"input: found no image in {where}; expected files ending in {', '.join(READABLE)}, or "
            "folders of DICOM files"
        )
    cases: dict[tuple[Path, str, str], dict[int, Path]] = {}
    for path in dict.fromkeys(files):
        if not path.name.lower().endswith(ENDINGS):
            if not _is_npy(path) and not is_dicom(path):
                ending(path)  # raises: what this is nobody knows
            alone.append(Input(id=path.stem, images=(path,)))
            continue
        match = CHANNEL.fullmatch(stem(path))
        if match:
            cases.setdefault((path.parent, match[1], ending(path)), {})[int(match[2])] = path
        else:
            alone.append(Input(id=stem(path), images=(path,)))
    for (_, name, _), parts in cases.items():
        alone += _channels(name, dict(sorted(parts.items())), channels)
    alone = [_looked_at(replace(one, format=format)) for one in alone]
    return _distinct(sorted(alone, key=lambda one: natural(one.id)))


def _looked_at(one: Input) -> Input:
    """With a problem where a file is none: a pipe would be waited for."""
    for path in () if one.problem else one.images:
        if found := instead_of_file(path):
            return replace(one, problem=f"{path}: found {found}, expected a file")
        if one.format == SEG and path.name.lower().endswith(READABLE):
            return replace(one, problem=f"{path}: a DICOM SEG needs a DICOM series, found a file")
    return one


def _channels(name: str, parts: dict[int, Path], channels: int) -> list[Input]:
    if set(parts) in ({0}, set(range(channels))):
        return [Input(id=name, images=tuple(parts.values()))]
    if channels == 1:  # numbered images of one channel, not channels
        return [Input(id=stem(path), images=(path,)) for path in parts.values()]
    have = ", ".join(f"{index:04d}" for index in parts)
    where = next(iter(parts.values())).parent / name
    problem = f"{where}: channels: found {have}, expected 0000 to {channels - 1:04d}. Add or remove files."
    return [Input(id=name, images=tuple(parts.values()), problem=problem)]


def _distinct(found: list[Input]) -> list[Input]:
    """Two images that would be written to one file: the second is a problem."""
    seen: dict[str, Input] = {}
    result = []
    for one in found:
        first = seen.setdefault(one.output, one)
        if first is not one:
            problem = f"{one.images[0]}: its prediction would be called {one.output}, as that of {first.images[0]}. Rename one of them."
            one = replace(one, problem=problem)
        result.append(one)
    return result


def check_out(out: Path, found: list[Input], run: str) -> str | None:
    """Who made the predictions in `out`, if there are any. Raises InputError if new ones of `run`
    would mix with those of another run, or overwrite images."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, expected a folder")
    images = {os.path.realpath(path) for one in found for path in one.images}
    for one in found:
        if os.path.realpath(out / one.output) in images:
            raise InputError(
                f"out: the prediction {one.output} would overwrite the image in {out}; choose "
                "another folder"
            )
    record = out / RECORD
    try:
        known = json.loads(record.read_text(encoding="utf-8"))["made_by"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"out: {record} is damaged; choose another folder, or remove the file if the "
            "predictions may be kept"
        ) from None
    if known.partition(" ")[0] != run.partition(" ")[0]:
        raise InputError(
            f"out: {out} holds predictions made by {known!r}, expected {run!r}; choose another "
            "folder"
        )
    return known


def claim(out: Path, found: list[Input], made_by: str) -> None:
    """Make the folder, and note whose predictions it holds: "run, checkpoint and settings". Raises
    InputError as `check_out` does."""
    known = check_out(out, found, made_by)
    if known not in (None, made_by):
        raise InputError(
            f"out: {out} holds predictions made by {known!r}, expected {made_by!r}; choose "
            "another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    if known is None:
        write_atomically(out / RECORD, json.dumps({"made_by": made_by}))


def is_made(out: Path, one: Input, facts: dict[str, Any]) -> bool:
    """Whether the prediction of `one` is in `out`, was made of `facts` and is as it was written.
    Raises InputError for a file that is no prediction of ours."""
    path = out / one.output
    if not path.exists():
        return False
    try:
        known = json.loads(_note(out, one).read_text(encoding="utf-8"))
    except FileNotFoundError:
        mend = "Move it away or choose another folder."
        raise InputError(
            f"{path} is there already, and no note says what it was made of. {mend}"
        ) from None
    except ValueError:
        return False
    if not isinstance(known, dict) or not known.get("files"):
        return False  # its writer was killed
    if known.pop("files") != _written(out, one):
        raise InputError(
            f"{path} is not as it was written: damaged, or edited by hand. Move it away to have it "
            "made again, or choose another folder."
        )
    if "probabilities" not in facts:  # more than is wanted
        known.pop("probabilities", None)
    return known == facts


def forget(out: Path, one: Input) -> None:
    """Remove an older prediction of `one`, then its note: no note ever vouches for a file it was
    not written for."""
    for name in (one.output, one.probabilities):
        (out / name).unlink(missing_ok=True)
    _note(out, one).parent.mkdir(exist_ok=True)
    write_atomically(_note(out, one), "{}")  # ours, but of nothing: a kill may leave a file


def vouch(out: Path, one: Input, facts: dict[str, Any]) -> None:
    """Note what the prediction of `one`, which is on disk now, was made of, with its hash. One note
    per file, so ranks never write to the same one."""
    write_atomically(_note(out, one), json.dumps({**facts, "files": _written(out, one)}))


def _written(out: Path, one: Input) -> dict[str, Any]:
    """The files of a prediction: probabilities may lie beside it, and a stack of slices has its
    spacing there."""
    paths = [out / one.output, out / one.probabilities]
    if paths[0].name.lower().endswith((".tif", ".tiff")):
        paths.append(out / f"{one.id}.json")
    return {path.name: file_facts(path) for path in paths if path.is_file()}


def _note(out: Path, one: Input) -> Path:
    return out / NOTES / f"{one.output}.json"
