"""Black and white masks: which pixels are white, and whether a picture is such a mask at all.

White is the largest value of a file (0/1 and 0/255 occur), 255 in a JPEG, whose compression rings
around black too. Classes are not to be lost in it: numbers with two or more of them beside 0, and
areas of an even grey, are no mask; grey along the border between black and white is one that was
smoothed. A picture with a palette is what its colours show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.faults import ImageError
from segfleet.preprocess.files.images import ending, read_file

LOSSY = (".jpg", ".jpeg")
FEW = 4  # values of a lossless mask that are classes, not smoothing
FAINT = 32  # a JPEG mask below holds no white, but numbers of classes
NUMBERED = 16  # up to so many values, each counts by itself
DARK, BRIGHT = 0.1, 0.9  # of white: between them a pixel is neither
UNDECIDED = 0.1  # share of pixels a mask may have that are neither black nor white
EVEN = 8  # grey levels within 3 x 3 pixels that still are one area
LEAST_AREA = 5e-4  # share of pixels that makes an area
DECLARE = "Declare the classes in a labels.json, or save a black and white mask."


def read_mask(path: Path, digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """Bool (1, Y, X): above half of white; the geometry's `file.white` is white. Raises
    ImageError for what is no mask."""
    grey, geometry = read_grey(path, digest)
    lossy = ending(path) in LOSSY
    values = np.unique(grey)
    white = 255.0 if lossy else float(values[-1])
    if lossy and 0 < values[-1] < FAINT and _numbered(grey):
        found = f"no value above {values[-1]:g} in {path.name}"
        mend = f"Classes do not survive JPEG: save them as PNG. {DECLARE}"
        raise ImageError(path, "mask values", found, "black and white", mend)
    if lossy or len(values) > 2 or len(values) == 2 and values[0] != 0:
        _judge(grey, values, white, lossy, path)
    file = replace(geometry.file, white=int(white) if grey.any() else 0)
    return grey > white / 2, replace(geometry, file=file)


def read_grey(
    path: Path, digest: Any = None, *, label: bool = False
) -> tuple[np.ndarray, Geometry]:
    """(1, Y, X): one channel of a mask that may have been saved in colour. Raises ImageError if the
    colours differ, and are not just black and another one. `label`: indices of a palette count, not
    its colours."""
    array, geometry = read_file(path, digest, label=label)
    array = array[: {2: 1, 4: 3}.get(len(array), len(array))]  # without opacity
    if len(array) > 1:
        low, high = array.min(axis=0).astype(np.int64), array.max(axis=0).astype(np.int64)
        if ((high - low) > 32).mean() > 0.01 or not label and _two_colours(array):
            if not _two_colours(array):
                found = f"{len(array)} that differ in {path.name}"
                raise ImageError(path, "label channels", found, "1", DECLARE)
            return (high > 0).astype(np.uint8) * np.uint8(255), geometry
        array = array[:1]
    return array[0], geometry


def _two_colours(array_CZYX: np.ndarray) -> bool:
    """Whether there is black and one other colour, which is not a grey."""
    lit = array_CZYX.any(axis=0)
    if not lit.any() or lit.all():
        return False
    shown = array_CZYX[:, lit]
    return bool((shown == shown[:, :1]).all() and len(set(shown[:, 0].tolist())) > 1)


def _judge(grey: np.ndarray, values: np.ndarray, white: float, lossy: bool, path: Path) -> None:
    few = len(values) <= FEW or white < 128
    if few and not lossy:
        shown = ", ".join(f"{value:g}" for value in values[:8])
        more = f" and {len(values) - 8} more" if len(values) > 8 else ""
        found = f"the values {shown}{more} in {path.name}"
        raise ImageError(path, "mask values", found, "0 and one other", DECLARE)
    exact = not lossy and len(values) <= NUMBERED
    black, bright = (
        (grey == 0, grey == white) if exact else (grey < DARK * white, grey > BRIGHT * white)
    )
    neither = ~(black | bright)
    if (share := float(neither.mean())) > UNDECIDED:
        found = f"{share:.0%} of the pixels of {path.name} neither black nor white"
        mend = f"Perhaps it is the image itself: put the mask there. {DECLARE}"
        raise ImageError(path, "mask values", found, "a black and white mask", mend)
    if neither.any() and (area := _areas(grey, black, bright, neither)).sum() > max(
        8, LEAST_AREA * grey.size
    ):
        found = f"areas of grey {np.median(grey[area]):g} in {path.name}"
        raise ImageError(path, "mask values", found, "a black and white mask", DECLARE)


def _numbered(grey: np.ndarray) -> bool:
    """Whether dark pixels are even areas, as numbers of classes are, and no noise."""
    from scipy import ndimage

    low, high = (f(grey, (1, 5, 5)) for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    area = int(((low > 0) & (high - low <= 2)).sum())
    return area > max(8, LEAST_AREA * grey.size)


def _areas(
    grey: np.ndarray, black: np.ndarray, bright: np.ndarray, neither: np.ndarray
) -> np.ndarray:
    """Pixels of an even grey that is no smoothed border: not both black and white lie within two
    pixels."""
    from scipy import ndimage

    reach = (1, 5, 5)
    border = ndimage.maximum_filter(black, reach) & ndimage.maximum_filter(bright, reach)
    spread = ndimage.maximum_filter(grey, (1, 3, 3)).astype(np.float32)
    spread -= ndimage.minimum_filter(grey, (1, 3, 3))
    return neither & ~border & (spread <= EVEN)
