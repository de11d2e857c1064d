"""Arrays that NumPy saved: H x W, or H x W x C."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.files.faults import ImageError, check_size, read_bytes

HEADERS = {  # version 3 is that of named fields, which are no image
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npy(path: Path, dims: int, digest: Any = None) -> np.ndarray:
    """A real array of `dims` axes. Raises ImageError; never unpickles."""
    data = read_bytes(path)
    if digest is not None:
        digest.update(data)
    try:
        with io.BytesIO(data) as file:
            version = np.lib.format.read_magic(file)
            header = HEADERS[version](file)
        shape, dtype = header[0], header[2]
        check_size(path, shape, max(1, dtype.itemsize), len(data))
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ImageError:
        raise
    except Exception as error:
        message = str(error).splitlines() or [type(error).__name__]
        found = f"{path.name} damaged or truncated ({message[0][:80]})"
        raise ImageError(
            path, "file", found, "an array of numbers", "Write or copy the file again."
        ) from None
    if array.dtype.kind not in "buif":
        raise ImageError(
            path, "voxel type", str(array.dtype), "integers or real numbers", "Convert the file."
        )
    if array.ndim != dims or not array.size:
        shape = "x".join(map(str, array.shape))
        raise ImageError(
            path,
            f"shape of {path.name}",
            shape,
            "HxWx3" if dims == 3 else "HxW",
            "Write the file again.",
        )
    return array
