"""What a picture's numbers show, the same in every container: palettes, ink, Lab, YCbCr, opacity,
and which side is up.

    stored as                as an image                as a label
    1 bit                    0, 255                     0, 1
    grey, any bits           as it is                   as it is
    palette                  R, G, B                    the index; what its colours show, for a mask
    R, G, B                  as it is                   must be grey
    grey or R, G, B + alpha  without alpha              without alpha
    C, M, Y, K               R, G, B (255 - C)(255 - K) / 255
    CIE Lab                  R, G, B (sRGB, by LittleCMS)
    YCbCr                    R, G, B (JFIF)
    orientation 2 to 8       turned as it is shown      turned likewise
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segfleet.preprocess.files.faults import ImageError

LYING = (5, 6, 7, 8)  # orientations that exchange rows and columns
DECODED_TO_RGB = ("JPEG", "OJPEG", "JPEG_LOSSY", "APERIO_JP2000_YCBC")  # by the codec itself


def upright(array_CZYX: np.ndarray, orientation: int) -> np.ndarray:
    """Rows from top to bottom, columns from left to right, by the orientation of EXIF and TIFF."""
    if orientation not in range(2, 9):
        return array_CZYX
    if orientation in LYING:
        array_CZYX = array_CZYX.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        array_CZYX = array_CZYX[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array_CZYX = array_CZYX[..., ::-1]
    return array_CZYX


def by_palette(index_CZYX: np.ndarray, table: np.ndarray, label: bool) -> np.ndarray:
    """The colours (3, Z, Y, X) of indices (1, Z, Y, X) into `table` (n, 3) uint8. For a label the
    indices, as classes are stored; see `shown` for masks."""
    if label:
        return index_CZYX
    full = np.zeros((max(len(table), int(index_CZYX.max(initial=0)) + 1), 3), np.uint8)
    full[: len(table)] = table
    return np.moveaxis(full[index_CZYX[0]], -1, 0)


def to_rgb(array_CZYX: np.ndarray, kind: str, path: Path) -> np.ndarray:
    """(3, Z, Y, X) uint8 of ink, Lab or YCbCr of 8 bits. Raises ImageError for other depths."""
    channels = 4 if kind == "SEPARATED" else 3
    if array_CZYX.dtype != np.uint8 or len(array_CZYX) != channels:
        found = f"{kind} of {array_CZYX.dtype}, {len(array_CZYX)} channels in {path.name}"
        mend = "Save the picture as RGB."
        raise ImageError(path, "colour space", found, f"8 bits, {channels} channels", mend)
    if kind == "SEPARATED":
        ink, black = 255 - array_CZYX[:3].astype(np.uint16), 255 - array_CZYX[3].astype(np.uint16)
        return ((ink * black + 127) // 255).astype(np.uint8)
    if kind in ("CIELAB", "ICCLAB"):
        return _lab(array_CZYX, kind)
    luma, blue, red = (channel.astype(np.float32) for channel in array_CZYX)
    blue, red = blue - 128, red - 128
    rgb = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return np.clip(np.rint(np.stack(rgb)), 0, 255).astype(np.uint8)


def _lab(array_CZYX: np.ndarray, kind: str) -> np.ndarray:
    """CIE Lab stores a and b as signed numbers, ICC's Lab as 128 more; Pillow's is the former."""
    from PIL import Image, ImageCms

    if kind == "ICCLAB":
        array_CZYX = np.concatenate([array_CZYX[:1], array_CZYX[1:] ^ 128])
    white, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(white, srgb, "LAB", "RGB")
    out = np.empty_like(array_CZYX)
    for z in range(array_CZYX.shape[1]):
        flat = Image.frombytes(
            "LAB",
            array_CZYX.shape[:1:-1],
            np.ascontiguousarray(np.moveaxis(array_CZYX[:, z], 0, -1)).tobytes(),
        )
        out[:, z] = np.moveaxis(np.asarray(ImageCms.applyTransform(flat, transform)), -1, 0)
    return out
