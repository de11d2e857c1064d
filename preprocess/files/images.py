"""Single image files in and out of arrays: NIfTI, NRRD, MHA, TIFF, PNG, BMP, JPEG.

Arrays have axes (z, y, x), the reverse of the file order; a 2D image has one slice. Every file is
read whole before it is decoded, so that a truncated or damaged one is noticed (the checksum of a
gzip stream stands at its end) and hashed in passing, with all files that its values or its grid
come from (`sources`).
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files import itk, nifti, photo, tiff
from segfleet.preprocess.files.faults import ImageError, damaged, is_regular, read_bytes
from segfleet.preprocess.files.grids import disagreement
from segfleet.preprocess.files.itk import LPS as LPS

NIFTI, ITK, TIFF = (".nii.gz", ".nii"), (".nrrd", ".nhdr", ".mha", ".mhd"), (".tif", ".tiff")
NATURAL = (".png", ".bmp", ".jpg", ".jpeg")  # 2D, several channels in one file, no geometry
ENDINGS = (*NIFTI, *ITK, *TIFF, *NATURAL)
VOLUMES = (*NIFTI, *ITK)
NEARLY = 5e-3  # off an integer by less: a label's rounding, as scaling into 8 bits leaves it
SMALLEST, LARGEST = 1e-7, 1e4  # mm that a voxel may measure: from electron microscopes up


def ending(path: Path) -> str:
    """The ending of a file name as this module knows it. Raises InputError with the legal ones."""
    name = os.path.basename(path).lower()  # a new Path for every question costs more than reading
    for legal in ENDINGS:
        if name.endswith(legal):
            return legal
    raise InputError(f"{path}: the file ending is none of: {', '.join(ENDINGS)}")


def stem(path: Path) -> str:
    """The name less its ending, in one spelling (NFC): systems differ in how they store accents."""
    return unicodedata.normalize("NFC", os.path.basename(path)[: -len(ending(path))])


def sources(path: Path) -> list[Path]:
    """All files that one is read with: itself, voxels that lie elsewhere, spacing beside it. Those
    that are missing are left to reading it."""
    path = Path(path)
    name = path.name.lower()
    files = [path]
    if name.endswith(ITK):
        files += itk.detached(path)
    elif name.endswith(TIFF):
        files += tiff.sidecars(path)
    return files


def read_image(paths: Sequence[Path], digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """Read the channels of one image. Raises ImageError.

    Args:
        paths: one file per channel, or one file that holds all of them (4D NIfTI, RGB).
        digest: a hashlib object that is fed the bytes of the files.

    Returns:
        image_CZYX in the file's integer type or float32, and the grid all channels lie on.
    """
    parts, first = [], None
    for path in paths:
        part, geometry = read_file(path, digest)
        if first is None:
            first = geometry
        elif difference := disagreement(geometry, first):
            field, found, expected = difference
            expected = f"{expected} as in {Path(paths[0]).name}"
            raise ImageError(
                path,
                f"{field} of channel {Path(path).name}",
                found,
                expected,
                "Put all channels on one grid.",
            )
        parts.append(part)
    if first is None:
        raise InputError("image: found no file to read")
    image = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return image, first


def read_label(
    path: Path, digest: Any = None, names: Mapping[str, int] | None = None
) -> tuple[np.ndarray, Geometry]:
    """label_ZYX as the file stores it (integers, or floats that ought to be), and its grid. Values
    that miss an integer by a rounding error are that integer, with a warning. Named segments (3D
    Slicer's) get the values of `names`. Raises ImageError."""
    array, geometry = read_file(path, digest, label=True)
    if Path(path).name.lower().endswith(".seg.nrrd"):
        from segfleet.preprocess.files.segments import from_seg_nrrd

        return from_seg_nrrd(Path(path), read_bytes(path), array, geometry, names or {})
    if len(array) > 1 and all(np.array_equal(array[0], other) for other in array[1:]):
        array = array[:1]  # a grey mask saved as RGB
    if len(array) != 1:
        raise ImageError(
            path,
            "label channels",
            str(len(array)),
            "1",
            "Save the label as one channel of class numbers.",
        )
    return rounded(array[0], geometry)


def rounded(label_ZYX: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, Geometry]:
    """Floats within `NEARLY` of integers as these integers, and a warning where any was off; others
    as they are, for the check to report."""
    if label_ZYX.dtype.kind != "f":
        return label_ZYX, geometry
    whole = np.rint(label_ZYX)
    with np.errstate(invalid="ignore"):
        off = float(np.abs(label_ZYX - whole).max(initial=0.0))
        low, high = float(whole.min(initial=0)), float(whole.max(initial=0))
    if not off <= NEARLY or not (-(2**31) <= low and high < 2**31):
        return label_ZYX, geometry
    if off:
        found = f"values off by up to {off:.2g} from {_few(np.unique(whole))}"
        mend = "They are taken as these integers; save the label as integers."
        warning = ("label values", found, "integers", mend)
        file = replace(geometry.file, warnings=(*geometry.file.warnings, warning))
        geometry = replace(geometry, file=file)
    small = np.uint8 if 0 <= low and high < 256 else np.int32
    return whole.astype(small), geometry


def read_file(
    path: Path, digest: Any = None, *, label: bool = False
) -> tuple[np.ndarray, Geometry]:
    """One file as (C, Z, Y, X). Raises ImageError; names the file whatever the decoder complains
    about."""
    path, kind = Path(path), ending(path)
    data = read_bytes(path)
    if digest is not None:
        digest.update(data)
        for other in sources(path)[1:]:
            digest.update(read_bytes(other))
    try:
        if kind in NIFTI:
            array, geometry = nifti.read_nifti(data, path)
        elif kind in ITK:
            array, geometry = itk.read_itk(data, path)
        elif kind in TIFF:
            array, geometry = tiff.read_tiff(data, path, label)
        else:
            array, geometry = photo.read_photo(data, path, label)
    except ImageError:
        raise
    except NotImplementedError as error:
        found, expected = f"{path.name}: {_short(error)}", "a picture of a usual kind"
        raise ImageError(path, "file", found, expected, "Save it uncompressed, as RGB.") from None
    except Exception as error:  # decoders raise anything when a file is not what its name says
        raise damaged(path, _short(error)) from None
    if not all(math.isfinite(s) and SMALLEST <= s <= LARGEST for s in geometry.spacing):
        found = f"{'x'.join(f'{s:g}' for s in geometry.spacing)} in {path.name}"
        expected = f"numbers between {SMALLEST:g} and {LARGEST:g} (mm)"
        raise ImageError(path, "spacing", found, expected, "Correct the header.")
    if array.dtype.kind not in "buif":
        raise ImageError(
            path,
            "voxel type",
            f"{array.dtype} in {path.name}",
            "integers or real numbers",
            "Convert the file.",
        )
    if not array.size:
        raise ImageError(
            path,
            "shape",
            f"{array.shape} in {path.name}",
            "at least one voxel",
            "Export the image again.",
        )
    return _plain(array), geometry


def peek(path: Path) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) from the header alone; zeros where the file cannot be read, which reading it
    then explains."""
    path = Path(path)
    if not is_regular(path):
        return (0, 0, 0, 0)
    try:
        if path.suffix.lower() == ".npy":
            height, width, *channels = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return (math.prod(channels), 1, height, width)
        kind = next((suffix for suffix in ENDINGS if path.name.lower().endswith(suffix)), "")
        if kind in NIFTI:
            return nifti.peek_nifti(path)
        if kind in ITK:
            return itk.peek_itk(path)
        if kind in TIFF:
            return tiff.peek_tiff(path)
        if kind in NATURAL:
            return photo.peek_photo(path)
        from segfleet.preprocess.files.dicom import peek_slice

        return peek_slice(path)
    except Exception:
        return (0, 0, 0, 0)


def _plain(array: np.ndarray) -> np.ndarray:
    """Native byte order, contiguous; booleans as uint8 and every float as float32."""
    if array.dtype.kind == "b":
        return np.ascontiguousarray(array, np.uint8)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(array, np.float32)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return array if array.flags.writeable else array.copy()


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return re.sub(r" <_io\.\w+ object at 0x[0-9a-f]+>", "", text)[:120]


def _few(values: np.ndarray) -> str:
    texts = [f"{value:g}" for value in values[:6]]
    return ", ".join(texts) + (" ..." if len(values) > 6 else "")
