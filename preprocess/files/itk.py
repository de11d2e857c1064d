"""NRRD and MetaImage through SimpleITK. The text header is read first: it says how much memory the
voxels take, and in which other files they lie.

Source: the NRRD format's definition (teem.sourceforge.net/nrrd/format.html), ITK's MetaIO.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.faults import ImageError, check_size, damaged, is_regular, read_bytes

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world axes seen from NIfTI's, and back
WIDTHS = {  # bytes of a value: NRRD's and MetaImage's names
    1: "signed char int8 int8_t uchar unsigned char uint8 uint8_t met_char met_uchar",
    2: "short int16 int16_t ushort uint16 uint16_t met_short met_ushort",
    4: "int int32 int32_t uint uint32 uint32_t float met_int met_uint met_float met_long met_ulong",
    8: "longlong int64 int64_t ulonglong uint64 uint64_t double met_double met_long_long "
    "met_ulong_long",
}
SHORT_NAMES = {name: width for width, names in WIDTHS.items() for name in names.split()}
LONGEST_HEADER = 2**20
MOST_AXES = 5  # SimpleITK is not asked about others: it crashes where they are negative
MEND = "Export the image again with a sound header."


def read_itk(data: bytes, path: Path) -> tuple[np.ndarray, Geometry]:
    """(C, Z, Y, X) and its grid. Raises ImageError, and RuntimeError of SimpleITK."""
    import SimpleITK as sitk

    header = header_of(data, path)
    shape, width = _declared(header, path)
    stored = len(data) + sum(p.stat().st_size for p in detached(path, header) if is_regular(p))
    size = check_size(path, shape, width, stored)
    if not _is_packed(header) and size > stored:
        raise damaged(path, f"{stored} bytes, its header speaks of {size}")
    for other in detached(path, header):
        read_bytes(other)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if data[:4] == b"NRRD" else "MetaImageIO")
    picture = reader.Execute()
    array = sitk.GetArrayFromImage(picture)
    if picture.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif picture.GetDimension() == 3:
        array = array[None]
    if picture.GetDimension() == 2:
        array = array[:, None] if array.ndim == 3 else array[None, None]
    if array.ndim != 4:
        found = f"{picture.GetDimension()} axes in {path.name}"
        raise ImageError(path, "shape", found, "2 or 3 axes, or a list of channels", MEND)
    return array, _grid(picture, array.shape[1:], path)


def peek_itk(path: Path) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) from the header alone. Raises anything."""
    import SimpleITK as sitk

    with open(path, "rb") as file:
        _declared(header_of(file.read(LONGEST_HEADER), path), path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    x, y, z, *rest = (*reader.GetSize(), 1, 1)[: max(3, reader.GetDimension())]
    return (reader.GetNumberOfComponents() * int(np.prod(rest)), z, y, x)


def header_of(data: bytes, path: Path) -> dict[str, str]:
    """The fields of the text header, names in lower case. Raises ImageError."""
    if data[:4] == b"NRRD":
        end = re.search(rb"\r?\n\r?\n", data[:LONGEST_HEADER])
        text, mark = data[: end.start() if end else LONGEST_HEADER], ":"
    else:
        end = re.search(rb"(?i)elementdatafile\s*=[^\n]*", data[:LONGEST_HEADER])
        if end is None:
            raise damaged(path, "no header of its kind")
        text, mark = data[: end.end()], "="
    lines = text.decode("utf-8", "replace").splitlines()
    pairs = [line.partition(mark) for line in lines if not line.startswith("#")]
    return {key.strip().lower(): value.strip().lstrip("=") for key, _, value in pairs if value}


def detached(path: Path, header: dict[str, str] | None = None) -> list[Path]:
    """The files the voxels lie in, if they lie in others than the header; none where that cannot be
    told, which reading the image then explains."""
    if header is None:
        try:
            with open(path, "rb") as file:
                header = header_of(file.read(LONGEST_HEADER), path)
        except (OSError, ImageError):
            return []
    listed = header.get("data file") or header.get("datafile") or header.get("elementdatafile")
    if not listed or listed.upper() == "LOCAL":
        return []
    words = listed.split()
    if words[0].upper() == "LIST":
        text = path.read_bytes()[:LONGEST_HEADER].decode("utf-8", "replace")
        _, _, names = re.split(r"(?i)((?:data ?file|elementdatafile)[ \t]*[:=][^\n]*\n)", text)[:3]
        files = [line.strip() for line in names.splitlines() if line.strip()]
    elif "%" in words[0] and len(words) >= 3:
        first, last, step = (int(w) for w in (*words[1:3], *words[3:4], "1")[:3])
        numbers = range(first, last + (1 if step > 0 else -1), step or 1)[:100_000]
        files = [words[0] % number for number in numbers]
    else:
        files = [listed]
    return [path.parent / name for name in files]


def _declared(header: dict[str, str], path: Path) -> tuple[list[int], int]:
    """Sizes of all axes and bytes of a value. Raises ImageError."""
    sizes = header.get("sizes") or header.get("dimsize") or ""
    kind = (header.get("type") or header.get("elementtype") or "").lower()
    channels = header.get("elementnumberofchannels", "1")
    numbers = [*sizes.split(), channels]
    if not sizes or not all(n.isdecimal() and len(n) < 12 and int(n) for n in numbers):
        found = f"'{' '.join(numbers)[:60]}' in {path.name}"
        raise ImageError(path, "sizes", found, "whole numbers of 1 or more", MEND)
    plain = re.sub(r"\b(unsigned|signed) (?=short|int|long)|(?<=short) int\b", "", kind).strip()
    width = SHORT_NAMES.get(plain) or SHORT_NAMES.get(plain.replace("_array", ""))
    if width is None:
        width = 8 if "long" in plain else 1 if "char" in plain else 0
    if not width:
        found = f"'{kind[:40]}' in {path.name}"
        raise ImageError(path, "voxel type", found, "integers or real numbers", MEND)
    axes = header.get("dimension") or header.get("ndims") or ""
    if axes != str(len(sizes.split())) or not 1 <= int(axes) <= MOST_AXES:
        found = f"'{axes[:20]}' of {len(sizes.split())} in {path.name}"
        raise ImageError(path, "number of axes", found, f"1 to {MOST_AXES}, as sizes has", MEND)
    return [int(n) for n in numbers], width


def _is_packed(header: dict[str, str]) -> bool:
    packed = header.get("encoding", "raw").lower() != "raw"  # text and hex are longer, never less
    return packed or header.get("compresseddata", "false").lower() == "true"


def _grid(picture: Any, shape: tuple[int, ...], path: Path) -> Geometry:
    dims = picture.GetDimension()
    direction = np.asarray(picture.GetDirection()).reshape(dims, dims)
    affine, n = np.eye(4), min(dims, 3)
    affine[:n, :n] = direction[:n, :n] * np.asarray(picture.GetSpacing())[:n]
    affine[:n, 3] = picture.GetOrigin()[:n]
    spacing = (*picture.GetSpacing()[:3], 1.0)[:3]
    if not np.isfinite(affine).all() or not abs(np.linalg.det(direction)) > 1e-6:
        found = f"directions that are singular or not finite in {path.name}"
        raise ImageError(path, "affine", found, "three directions", MEND)
    rows = tuple(tuple(float(v) for v in row) for row in LPS @ affine)
    return Geometry(
        shape=shape, spacing=spacing[::-1], affine=rows, file=FileFacts(dims=min(dims, 3))
    )
