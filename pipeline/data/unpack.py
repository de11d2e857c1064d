"""Boxes of a store as the loader wants them: read, checked, decoded and converted in one compiled
pass (`unpack.cpp`) over the chunks. Without it `PackedArray.fill` does the same, chunk by chunk."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

import numpy as np

from segfleet.pipeline.data.kernels import COUNT, POINTER, REAL, sizes
from segfleet.preprocess.stores.packed import PackedArray
from segfleet.preprocess.stores.shard_reader import DamagedShard

SOURCE = Path(__file__).with_name("unpack.cpp")
KINDS = {"float16": 0, "uint8": 1, "int16": 2, "float32": 3}  # as in unpack.cpp, to float32
AS_STORED = {1: 4, 2: 5, 4: 3}  # by bytes of a voxel
log = logging.getLogger("segfleet.data")


@functools.cache
def library() -> tuple[ctypes.CDLL, dict[str, tuple[ctypes.c_void_p, ctypes.c_void_p]]] | None:
    """The compiled pass, and by codec what it calls: blosc's functions for a whole chunk and for
    some of its items; Zstandard's for a whole frame and for the memory that needs. None where they
    cannot be had, which the log says once."""
    from numcodecs import blosc, zstd

    from segfleet.models.scan import build

    try:
        kernels = build.load(SOURCE, "-O3", "-ffp-contract=off")
        functions = {
            "blosc": _pair(blosc.__file__, "blosc_decompress_ctx", "blosc_getitem"),
            "zstd": _pair(zstd.__file__, "ZSTD_decompressDCtx", "ZSTD_createDCtx"),
        }
    except (build.BuildError, OSError, AttributeError) as error:
        log.warning("the loader reads without its compiled pass, some times slower: %s", error)
        return None
    kernels.segfleet_unpack.restype = COUNT
    kernels.segfleet_unpack.argtypes = (
        ctypes.c_int,
        *(POINTER,) * 2,
        ctypes.c_int,
        *(POINTER,) * 6,
        COUNT,
        REAL,
        *(POINTER,) * 2,
    )
    kernels.segfleet_crc32c.restype = ctypes.c_uint32
    kernels.segfleet_crc32c.argtypes = (POINTER, COUNT)
    return kernels, functions


def _pair(file: str, *names: str) -> tuple[ctypes.c_void_p, ...]:
    codec = ctypes.CDLL(file)
    return tuple(ctypes.cast(getattr(codec, name), POINTER) for name in names)


def unpack(
    array: PackedArray,
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    out: np.ndarray,
    scale: float,
) -> None:
    """As `PackedArray.fill`, the same bits."""
    if out.dtype == array.dtype:
        kind = AS_STORED.get(out.itemsize)
    else:
        kind = KINDS.get(array.dtype.name) if out.dtype == np.float32 else None
    fits = kind is not None and out.strides[-1] == out.itemsize and min(size) > 0
    if not isinstance(array, PackedArray) or not fits or (loaded := library()) is None:
        return PackedArray.fill(array, start, size, out, scale)
    kernels, functions = loaded
    four = out if out.ndim == 4 else out[None]
    code = kernels.segfleet_unpack(
        array.codec == "zstd",
        *functions[array.codec],
        array.file.number,
        array.index.ctypes.data,
        None if array.sums is None else array.sums.ctypes.data,
        sizes(*array.index.shape[:3]),
        sizes(*(array.lead or (1,)), *array.chunk),
        sizes(*start),
        sizes(*size),
        kind,
        scale,
        out.ctypes.data,
        sizes(*(stride // out.itemsize for stride in four.strides[:3])),
    )
    if code > 0:
        place = tuple(int(i) for i in np.unravel_index(code - 1, array.index.shape[:3]))
        raise DamagedShard(f"{array.name}: checksum of chunk {place}")
    if code < 0:
        raise OSError(-code, os.strerror(-code))
