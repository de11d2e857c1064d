"""Probabilities beside labels: one compressed NPZ per image, as nnU-Net has it, so that its tools
read them too."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from segfleet.core.files import replacing

NAME = "probabilities"  # np.load(path)[NAME]


def write_probabilities(path: Path, array_KZYX: np.ndarray) -> None:
    """Write `array_KZYX` (K, Z, Y, X) slice by slice, whole or not at all. K: the classes,
    background first, or the regions of a sigmoid network."""
    entry = zipfile.ZipInfo(f"{NAME}.npy")  # with a fixed date: same values, same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    with (
        replacing(path, suffix=".npz") as temporary,
        zipfile.ZipFile(temporary, "w", compresslevel=1) as whole,
        whole.open(entry, "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array_KZYX))
        for volume in array_KZYX:
            for plane in volume:
                file.write(plane.tobytes())
