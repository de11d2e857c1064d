"""TIFF pictures and stacks by tifffile, with imagecodecs for every compression; their spacing
stands in a JSON file beside them (nnU-Net's convention)."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files import colours
from segfleet.preprocess.files.codestreams import HEAD, check_own_size
from segfleet.preprocess.files.faults import ImageError, check_size, damaged, is_regular, read_bytes

# compressions whose strips and tiles have headers of their own
PICTURES = (
    "JPEG", "OJPEG", "ALT_JPEG", "JPEG_99", "JPEG_LOSSY", "JPEG2000", "JPEG_2000_LOSSY", "PNG",
    "WEBP",
    "APERIO_JP2000_RGB", "APERIO_JP2000_YCBC", "WEBP_DEPRECATED",
)  # fmt: skip


def read_tiff(data: bytes, path: Path, label: bool) -> tuple[np.ndarray, Geometry]:
    """(C, Z, Y, X), colours as R, G, B, and its grid. Raises ImageError."""
    import tifffile

    check_chain(io.BytesIO(data), path)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if not file.series:
            raise damaged(path, "no picture in it")
        series, page = file.series[0], file.series[0].keyframe
        shape, order = axes_of(series.shape, series.axes)
        dtype = series.dtype or np.dtype("V")
        check_size(path, shape, max(1, dtype.itemsize), len(data))
        check_chunks(data, series, path)
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            found = f"{path.name} with unsupported compression {page.compression.name}"
            mend = "Save it uncompressed, or with deflate, or `pip install imagecodecs`."
            expected = "a compression that is known here"
            raise ImageError(path, "file", found, expected, mend) from None
        array = np.asarray(array).transpose(order).reshape(shape)
        array = _meaning(array, page, path, label)
        orientation = page.tags.valueof("Orientation", 1)
    array = colours.upright(array, orientation)
    file = FileFacts(dims=2 if array.shape[1] == 1 else 3)
    return array, Geometry(shape=array.shape[1:], spacing=_spacing(path), file=file)


def peek_tiff(path: Path) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) from the header alone, colours as three channels. Raises anything."""
    import tifffile

    with open(path, "rb") as raw:
        check_chain(raw, path)
    with tifffile.TiffFile(path) as file:
        series, page = file.series[0], file.series[0].keyframe
        c, z, y, x = axes_of(series.shape, series.axes)[0]
        c -= _alphas(page, c)
        if page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED):
            c = 3
        if page.tags.valueof("Orientation", 1) in colours.LYING:
            y, x = x, y
        return c, z, y, x


def check_chunks(data: bytes, series: Any, path: Path) -> None:
    """Raises ImageError where a strip or tile that is a picture of its own (JPEG and the like) says
    that it is larger than its place: decoders ask for the memory that it speaks of."""
    for page in series.pages:
        if page is None or page.keyframe.compression.name not in PICTURES:
            continue
        size = page.keyframe.chunks  # of a strip or tile; colours are the last axis, or the first
        contiguous = page.keyframe.planarconfig == 1 and len(size) > 2
        height, width = size[-3:-1] if contiguous else size[-2:]
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            head = data[offset : offset + min(count, HEAD)]
            check_own_size(head, width, height, "a tile", path)


def check_chain(file: Any, path: Path) -> None:
    """Raises ImageError where the list of pages runs in a circle or out of the file: libraries
    follow it for ever."""
    file.seek(0)
    start = file.read(16)
    order = {b"II": "little", b"MM": "big"}.get(start[:2])
    if order is None:
        raise damaged(path, "no TIFF mark in its header")

    def number(data: bytes) -> int:
        return int.from_bytes(data, order)

    big = number(start[2:4]) == 43
    width, counted, tag = (8, 8, 20) if big else (4, 2, 12)
    at, seen = number(start[8:16] if big else start[4:8]), set()
    while at:
        if at in seen:
            raise damaged(path, "its pages follow each other in a circle")
        seen.add(at)
        file.seek(at)
        tags = number(file.read(counted))
        if tags > 4096:
            raise damaged(path, f"a page of {tags} tags")
        file.seek(at + counted + tags * tag)
        following = file.read(width)
        if len(following) < width:
            break  # cut off behind this page: reading it reports that
        at = number(following)
    file.seek(0)


def axes_of(shape: Sequence[int], axes: str) -> tuple[tuple[int, int, int, int], list[int]]:
    """The (C, Z, Y, X) shape of a series and the order of its axes that leads there."""
    channels = [i for i, axis in enumerate(axes) if axis in "SC"]
    space = [i for i in range(len(axes)) if i not in channels]
    sizes = [1, 1, 1, *(shape[i] for i in space)]
    return (
        math.prod(shape[i] for i in channels),
        math.prod(sizes[:-2]),
        *sizes[-2:],
    ), channels + space


def _meaning(array_CZYX: np.ndarray, page: Any, path: Path, label: bool) -> np.ndarray:
    """What the stored numbers show, by the table of `colours`. Raises ImageError for a colour space
    that cannot be known."""
    kind = page.photometric.name
    if count := _alphas(page, len(array_CZYX)):
        array_CZYX = array_CZYX[: len(array_CZYX) - count]
    bits = page.bitspersample if isinstance(page.bitspersample, int) else page.bitspersample[0]
    if array_CZYX.dtype.kind == "b":
        shown = array_CZYX ^ (kind == "MINISWHITE")
        return shown.astype(np.uint8) * np.uint8(1 if label else 255)
    if kind == "MINISWHITE" and array_CZYX.dtype.kind == "u":
        return array_CZYX.dtype.type(2**bits - 1) - array_CZYX
    if kind == "PALETTE":
        table = page.colormap  # (3, 2 ** bits) of 16 bits
        if table is None:
            raise ImageError(
                path, "colours", f"no palette in {path.name}", "one", "Save it as RGB."
            )
        return colours.by_palette(array_CZYX, _eight_bits(table).T, label)
    if kind in ("SEPARATED", "CIELAB", "ICCLAB", "YCBCR"):
        decoded = kind == "YCBCR" and page.compression.name in colours.DECODED_TO_RGB
        return array_CZYX if decoded else colours.to_rgb(array_CZYX, kind, path)
    if kind in ("RGB", "MINISBLACK", "MINISWHITE", "CFA", "LINEAR_RAW", "MASK", "DEPTH_MAP"):
        return array_CZYX
    found = f"{kind} in {path.name}"
    mend = "Save the picture as RGB or grey."
    raise ImageError(path, "colour space", found, "grey, RGB, CMYK, Lab or YCbCr", mend)


def _alphas(page: Any, channels: int) -> int:
    """Channels at the end that are opacity. Those marked as nothing in particular are kept, as
    microscopes write them, unless they follow three colours."""
    marks = [int(mark) for mark in page.extrasamples or ()]
    if page.photometric.name not in ("RGB", "MINISBLACK", "MINISWHITE", "SEPARATED", "YCBCR"):
        return 0
    return min(sum(mark in (1, 2) for mark in marks), channels - 1)


def _eight_bits(table: np.ndarray) -> np.ndarray:
    """A palette of 16 bits as 8: most writers multiply by 257, some by 256, some not at all."""
    return (table if table.max(initial=0) < 256 else table >> 8).astype(np.uint8)


def sidecars(path: Path) -> list[Path]:
    """CASE.json beside CASE.tif, and beside CASE_0000.tif, where they speak of spacing: other
    programs put files of that name there too. The first counts."""
    name = path.name.rpartition(".")[0]
    stems = dict.fromkeys((name, name[:-5] if re.search(r"_\d{4}$", name) else name))
    files = [path.with_name(f"{stem}.json") for stem in stems]
    return [file for file in files if is_regular(file) and _says_spacing(file)]


def _says_spacing(file: Path) -> bool:
    """A file that is no JSON at all may be a damaged one of ours."""
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(document, dict) and "spacing" in document


def _spacing(path: Path) -> tuple[float, float, float]:
    """(z, y, x) in mm; 1 without a file that says it. Raises ImageError."""
    if not (files := sidecars(path)):
        return (1.0, 1.0, 1.0)
    file = files[0]
    try:
        spacing = [float(s) for s in json.loads(read_bytes(file))["spacing"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        expected = '{"spacing": [z, y, x]}, numbers of mm'
        found = f"no such numbers in {file.name}"
        raise ImageError(path, "spacing", found, expected, "Write the file again.") from None
    return tuple([1.0] * (3 - len(spacing)) + spacing)[-3:]
