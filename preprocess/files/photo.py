"""PNG, BMP and JPEG by Pillow; by imagecodecs where that changes pixels: it cuts PNG of 16 bits a
colour to 8."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files import colours
from segfleet.preprocess.files.faults import check_size

ORIENTATION = 0x0112  # of EXIF
PNG = b"\x89PNG\r\n\x1a\n"
WORDS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # PNG chunks in which EXIF or XMP may be
COLOURED = (2, 4, 6)  # PNG colour types: R G B, grey with alpha, R G B with alpha


def read_photo(data: bytes, path: Path, label: bool) -> tuple[np.ndarray, Geometry]:
    """(C, 1, Y, X) and its grid; opacity is dropped. Raises ImageError, and what Pillow raises."""
    picture = _opened(io.BytesIO(data))
    width, height = picture.size
    depth = 2 if _is_deep(data) else 1
    # formats without compression hold what they say, JPEG far more than any other
    check_size(path, (height, width, len(picture.getbands())), depth)
    orientation = _orientation(picture)
    if _is_deep(data):
        import imagecodecs

        array = np.moveaxis(imagecodecs.png_decode(data), -1, 0)
        array = array[: 1 if len(array) == 2 else 3]
    elif picture.mode == "1" and data[:2] == b"BM" and data[28] > 1:
        # black and white in a byte each, which Pillow takes for bits
        import imagecodecs

        array = imagecodecs.bmp_decode(data, asrgb=False)[None] * np.uint8(1 if label else 255)
    else:
        picture.load()
        array = _pixels(picture, label)
    array = colours.upright(array[:, None], orientation)
    return array, Geometry(shape=array.shape[1:], file=FileFacts(dims=2))


def peek_photo(path: Path) -> tuple[int, int, int, int]:
    """(C, 1, Y, X) from the header alone, with opacity. Raises anything."""
    with _opened(path) as picture:
        width, height = picture.size
        if _orientation(picture) in colours.LYING:
            width, height = height, width
        return (3 if picture.mode in ("P", "CMYK") else len(picture.getbands()), 1, height, width)


def _opened(source: Any) -> Any:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # memory is limited by `check_size`, for this machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(source)


def _orientation(picture: Any) -> int:
    try:
        if picture.format == "PNG" and not _has_words(picture.fp):
            return 1
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF that cannot be read says nothing
        return 1


def _has_words(file: Any) -> bool:
    """Whether a PNG has a chunk that may say an orientation. Pillow would decode all pixels to look
    for one behind them, which takes longer than all else about a header."""
    place = file.tell()
    try:
        file.seek(len(PNG))
        while len(head := file.read(8)) == 8:
            if head[4:] in WORDS:
                return True
            if head[4:] == b"IEND":
                return False
            file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        return True  # cut off, or no list of chunks: as Pillow finds it
    finally:
        file.seek(place)


def _is_deep(data: bytes) -> bool:
    return data[:8] == PNG and len(data) > 25 and data[24] == 16 and data[25] in COLOURED


def _pixels(picture: Any, label: bool) -> np.ndarray:
    """(C, Y, X)."""
    if picture.mode == "1":
        return np.asarray(picture.convert("L"))[None] // (255 if label else 1)
    if picture.mode == "P":
        table = np.asarray(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        index = np.asarray(picture)[None, None]
        return colours.by_palette(index, table, label)[:, 0]
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA", "RGBa", "RGBX"):
        picture = picture.convert("RGB")
    if picture.mode in ("RGBA", "LA", "La"):
        return np.moveaxis(np.asarray(picture)[..., :-1], -1, 0)
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
