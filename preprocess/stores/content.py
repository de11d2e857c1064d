"""What a case is known by: the hash of its stored arrays, the same whatever format stores them."""

from __future__ import annotations

import hashlib

import numpy as np


def content_sha256(image: np.ndarray, label: np.ndarray) -> str:
    """sha256 over dtype, shape and little-endian bytes of the *stored* image (C, Z, Y, X) and label
    (Z, Y, X)."""
    digest = hashlib.sha256()
    for array in (image, label):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
