"""DICOM series, one folder per case, each with a label volume (NIfTI, NRRD, MHA) on the grid of the
series."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import LPS, ImageError
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    RawReader,
    duplicates,
    natural,
    number,
    patient_of,
    read_json,
    visible,
)
from segfleet.preprocess.readers.pairs import pictures
from segfleet.preprocess.readers.places import locate, subfolders
from segfleet.preprocess.stores.manifest import Dataset

VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha")
MODALITY, POSITION = "0008|0060", "0020|0032"


class Reader(RawReader):
    about = "Your own DICOM series, 3D, with a label volume each."
    layout = "images/CASE/*.dcm (one series per case) with labels/CASE.nii.gz; optionally labels.json with the classes"
    facts = Facts(dims="3D", modality="CT, MRI, PET")

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        self.folder = locate(
            self.root, lambda p: any(_slices(case) for case in _cases(p)), self.layout
        )

    @cached_property
    def modality(self) -> str:
        for case in _cases(self.folder):
            for path in _slices(case)[:1]:
                return _tags(path).get(MODALITY, "").strip() or "image"
        return "image"

    def dataset(self) -> Dataset:
        file = self.folder / "labels.json"
        labels = {"background": 0, "foreground": 1}
        if file.is_file():
            labels = {
                str(name): number(value, name, file) for name, value in read_json(file).items()
            }
            if labels.get("background") != 0 or len(labels) < 2:
                raise InputError(
                    f'{file}: found {labels}, expected {{"background": 0, "name": 1, ...}}'
                )
        return Dataset(
            name=self.root.resolve().name,
            reader="dicom",
            dims=3,
            channels=(self.modality,),
            labels=labels,
        )

    def refs(self) -> list[CaseRef]:
        labels = {
            path.name.partition(".")[0]: path for path in pictures(self.folder / "labels", VOLUMES)
        }
        series = {case.name: _slices(case) for case in _cases(self.folder)}
        refs = []
        for case in sorted({*labels, *series}, key=natural):
            files = series.get(case) or [self.folder / "images" / case / "*.dcm"]
            label = labels.get(case, self.folder / "labels" / f"{case}.nii.gz")
            refs.append(
                CaseRef(id=case, group=patient_of(case), images=tuple(files), labels=(label,))
            )
        return refs

    def problems(self) -> list[Problem]:
        paths = pictures(self.folder / "labels", VOLUMES)
        return duplicates([path.name.partition(".")[0] for path in paths])

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        for path in ref.images:
            data = path.read_bytes()
            if digest is not None:
                digest.update(data)
        return read_series(ref.images)


def read_series(paths: tuple[Path, ...]) -> tuple[np.ndarray, Geometry]:
    """image (1, Z, Y, X) of the slices of one folder, ordered by position, with rescale slope and
    intercept applied. Raises ImageError."""
    import SimpleITK as sitk

    folder = paths[0].parent
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        mend = "Copy missing files again, or put each series into a folder of its own."
        raise ImageError(folder, "series", f"{len(series)} in {folder.name}", "1", mend)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    if lost := sorted({path.name for path in paths} - {Path(file).name for file in files}):
        found = f"{lost[0]} damaged or of another series" + (
            f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        )
        raise ImageError(
            folder, "file", found, "slices of one series", "Copy or export the files again."
        )
    _even(folder, files)
    try:
        picture = sitk.ReadImage(files)
        array = sitk.GetArrayFromImage(picture)
    except RuntimeError as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1][:120]
        found = f"a slice damaged or truncated, or slices of different size ({reason})"
        raise ImageError(
            folder, "file", found, "a readable series", "Copy or export the files again."
        ) from None
    if array.ndim != 3:
        raise ImageError(
            folder,
            "image",
            f"an array of {array.ndim} axes",
            "grey slices",
            "Export the series without colours.",
        )
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(picture.GetDirection()).reshape(3, 3) * np.asarray(
        picture.GetSpacing()
    )
    affine[:3, 3] = picture.GetOrigin()
    rows = tuple(tuple(float(v) for v in row) for row in LPS @ affine)
    image = array[None].astype(np.float32) if array.dtype.kind == "f" else array[None]
    return image, Geometry(shape=array.shape, spacing=picture.GetSpacing()[::-1], affine=rows)


def _even(folder: Path, files: tuple[str, ...]) -> None:
    """Raises ImageError where a slice is missing: a gap between positions."""
    positions = [
        np.array([float(v) for v in text.split("\\")])
        for file in files
        if (text := _tags(Path(file)).get(POSITION))
    ]
    if len(positions) < 3 or len(positions) < len(files):
        return
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if steps.max() > 1.5 * np.median(steps):
        at = Path(files[int(steps.argmax()) + 1]).name
        found, expected = (
            f"{steps.max():.4g} mm before {at}",
            f"{np.median(steps):.4g} mm everywhere",
        )
        raise ImageError(folder, "slice distance", found, expected, "Copy the missing slices.")


def _tags(path: Path) -> dict[str, str]:
    """The text tags of one file; none if it cannot be read, which reading the series then
    explains."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        return {
            key: reader.GetMetaData(key)
            for key in (MODALITY, POSITION)
            if reader.HasMetaDataKey(key)
        }
    except RuntimeError:
        return {}


def _cases(folder: Path) -> list[Path]:
    images = folder / "images"
    return sorted(subfolders(images), key=lambda p: natural(p.name)) if images.is_dir() else []


def _slices(case: Path) -> list[Path]:
    return [
        path
        for path in visible(case)
        if path.is_file()
        and path.suffix.lower() in (".dcm", ".ima", "")
        and path.name != "DICOMDIR"
    ]
