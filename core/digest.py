"""Content hashes: of arrays, the same whatever format stores them, and of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np


def content_sha256(image: np.ndarray, label: np.ndarray) -> str:
    """sha256 over dtype, shape and little-endian bytes of the *stored* image (C, Z, Y, X) and label (Z, Y, X)."""
    digest = hashlib.sha256()
    for array in (image, label):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def file_facts(path: Path) -> dict[str, int | str]:
    """{"bytes": size, "sha256": hex} of one file: what the manifest keeps about it. Raises OSError."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
