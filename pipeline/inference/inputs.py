"""An image that is to be segmented, and where its labels go. Needs no torch, so it can be asked
before a job waits in a queue."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts, parse_json, read_file, write_atomically
from segfleet.core.litter import remove_folders
from segfleet.core.parallel import Apart, Died
from segfleet.core.partial import remove_partial
from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.dicom import read_series
from segfleet.preprocess.files.faults import crashed
from segfleet.preprocess.files.images import ENDINGS, NIFTI, peek, read_image, sources
from segfleet.preprocess.files.npy import read_npy
from segfleet.preprocess.files.writer import WRITABLE
from segfleet.preprocess.readers.base import CaseRef, RawReader
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import CaseEntry

# of the folder; of every file in it: what it was made of
RECORD, NOTES = "predictions.json", ".predictions"
# a prediction is one file, whatever its image is made of
INSTEAD = {".mhd": ".mha", ".nhdr": ".nrrd"}
FLAT = (".png", ".bmp")
SEG, SEG_NRRD = "dicom-seg", "seg-nrrd"


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
            INSTEAD.get(kind) or (".png" if kind or is_npy(self.images[0]) else ".nii.gz")
        )

    @property
    def probabilities(self) -> str:
        """Name of the file of its probabilities, if they are wanted."""
        return f"{self.id}.npz"

    def read(self) -> tuple[np.ndarray, Geometry]:
        """(C, Z, Y, X) and its grid, as the layouts read such files. Raises ImageError."""
        first = self.images[0]
        if is_npy(first):
            array = read_npy(first, 3 if peek(first)[0] > 1 else 2)
            image = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
            file = FileFacts(dims=2)
            image = np.ascontiguousarray(image[:, None], np.float32)
            return image, Geometry(shape=image.shape[1:], file=file)
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
            return apart(type(self).read, self)
        except Died:
            raise crashed(self.images[0]) from None

    def content(self) -> str:
        """sha256 of everything that is read of this image. Raises OSError."""
        files = dict.fromkeys(file for path in self.images for file in sources(path))
        return hashlib.sha256(
            "".join(str(file_facts(path)["sha256"]) for path in files).encode()
        ).hexdigest()


def is_npy(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


@dataclass(frozen=True, kw_only=True)
class LayoutInput(Input):
    """A case of a raw data set, read as its layout reads it."""

    reader: RawReader
    ref: CaseRef

    def read(self) -> tuple[np.ndarray, Geometry]:
        return self.reader.image(self.ref)

    def content(self) -> str:
        return hashlib.sha256((super().content() + self.ref.said).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoreInput(Input):
    """A case of a store. Its image is preprocessed already; the raw one is not there."""

    store: ShardStore
    entry: CaseEntry

    @property
    def geometry(self) -> Geometry:
        """Of the raw image."""
        entry, dims = self.entry, self.store.manifest.dataset.dims
        file = FileFacts(dims=dims)
        return Geometry(
            shape=entry.raw_shape, spacing=entry.raw_spacing, affine=entry.affine, file=file
        )

    @property
    def output(self) -> str:
        """The ending is that of the data set's own predictions where labels survive it."""
        if self.format == SEG_NRRD:
            return f"{self.id}.seg.nrrd"
        dataset = self.store.manifest.dataset
        flat = dataset.dims == 2
        fits = WRITABLE if flat else tuple(end for end in WRITABLE if end not in FLAT)
        kind = dataset.file_ending
        return self.id + (kind if kind in fits else ".png" if flat else ".nii.gz")

    def content(self) -> str:
        return f"{self.store.manifest.id} {self.entry.sha256}"


def check_out(out: Path, cases: list[Input], run: str) -> str | None:
    """Who made the predictions in `out`, if there are any. Raises InputError if new ones of `run`
    would mix with those of another run, or overwrite images."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, expected a folder")
    images = {os.path.realpath(path) for case in cases for path in case.images}
    for case in cases:
        if os.path.realpath(out / case.output) in images:
            raise InputError(
                f"out: the prediction {case.output} would overwrite the image in {out}; choose "
                "another folder"
            )
    record = out / RECORD
    try:
        made_by = str(parse_json(read_file(record))["made_by"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"out: {record} is damaged; choose another folder, or remove the file if the "
            "predictions may be kept"
        ) from None
    if made_by.partition(" ")[0] != run.partition(" ")[0]:
        raise InputError(
            f"out: {out} holds predictions made by {made_by!r}, expected {run!r}; choose another "
            "folder"
        )
    return made_by


def prepare_folder(out: Path, cases: list[Input], made_by: str) -> None:
    """Make the folder, and note whose predictions it holds: "run, checkpoint and settings". Raises
    InputError as `check_out` does."""
    earlier = check_out(out, cases, made_by)
    if earlier not in (None, made_by):
        raise InputError(
            f"out: {out} holds predictions made by {earlier!r}, expected {made_by!r}; choose "
            "another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out, out / NOTES):
        remove_partial(folder)
    remove_folders()
    if earlier is None:
        write_atomically(out / RECORD, json.dumps({"made_by": made_by}))


def is_made(out: Path, case: Input, identity: dict[str, Any]) -> bool:
    """Whether the prediction of `case` is in `out`, was made of `identity` and is as it was
    written. Raises InputError for a file that is no prediction of ours."""
    path = out / case.output
    if not path.exists():
        return False
    try:
        noted = parse_json(read_file(_note(out, case)))
    except FileNotFoundError:
        mend = "Move it away or choose another folder."
        raise InputError(
            f"{path} is there already, and no note says what it was made of. {mend}"
        ) from None
    except ValueError:
        sys.stderr.write(f"segfleet: {_note(out, case)} is damaged; {path.name} is made again\n")
        return False
    if not isinstance(noted, dict) or not noted.get("files"):
        return False  # its writer was killed
    if noted.pop("files") != _written(out, case):
        raise InputError(
            f"{path} is not as it was written: damaged, or edited by hand. Move it away to have it "
            "made again, or choose another folder."
        )
    if "probabilities" not in identity:  # more than is wanted
        noted.pop("probabilities", None)
    return noted == identity


def forget(out: Path, case: Input) -> None:
    """Remove an older prediction of `case`, then its note: no note ever vouches for a file it was
    not written for."""
    for name in (case.output, case.probabilities):
        (out / name).unlink(missing_ok=True)
    _note(out, case).parent.mkdir(exist_ok=True)
    write_atomically(_note(out, case), "{}")  # ours, but of nothing: a kill may leave a file


def vouch(out: Path, case: Input, identity: dict[str, Any]) -> None:
    """Note what the prediction of `case`, which is on disk now, was made of, with its hash. One
    note per file, so ranks never write to the same one."""
    write_atomically(_note(out, case), json.dumps({**identity, "files": _written(out, case)}))


def _written(out: Path, case: Input) -> dict[str, Any]:
    """The files of a prediction: probabilities may lie beside it, and a stack of slices has its
    spacing there."""
    paths = [out / case.output, out / case.probabilities]
    if paths[0].name.lower().endswith((".tif", ".tiff")):
        paths.append(out / f"{case.id}.json")
    return {path.name: file_facts(path) for path in paths if path.is_file()}


def _note(out: Path, case: Input) -> Path:
    return out / NOTES / f"{case.output}.json"
