"""The compiled kernels of augmentation (`kernels.cpp`), built on first use. Without a compiler numpy
and torch do the same operations in the same order: the same bits, some five times slower."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-ffp-contract=off")  # a fused multiply-add rounds once instead of twice
POINTER, COUNT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
FUNCTIONS = {
    "resample": (POINTER, POINTER, COUNT, *(POINTER,) * 6),
    "widen": (POINTER, POINTER, COUNT),
    "moments": (POINTER, COUNT, POINTER),
    "affine": (POINTER, COUNT, *(REAL,) * 5),
    "power": (POINTER, COUNT, *(REAL,) * 4),
    "blur": (POINTER, POINTER, COUNT, POINTER, COUNT),
}
log = logging.getLogger("segfleet.data")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels as segfleet_*; None where they cannot be built, which the log says once."""
    from segfleet.models.scan import build

    try:
        found = build.load(SOURCE, *FLAGS)
    except build.BuildError as error:
        log.warning("augmentation runs without its compiled kernels, some times slower: %s", error)
        return None
    for name, types in FUNCTIONS.items():
        function = getattr(found, f"segfleet_{name}")
        function.restype, function.argtypes = None, types
    return found


def sizes(*numbers: int) -> ctypes.Array:
    return (COUNT * len(numbers))(*numbers)


def to_float32(stored: np.ndarray, scale: float, out: np.ndarray) -> None:
    """What `shard_reader.to_float32` gives, the same bits, into `out`, C-contiguous of the same
    shape; halves several times as fast."""
    kernels = library() if stored.dtype == np.float16 and stored.flags.c_contiguous else None
    if kernels is not None:
        kernels.segfleet_widen(stored.ctypes.data, out.ctypes.data, out.size)
    elif stored.dtype.kind in "iu":
        np.multiply(stored, np.float32(scale), out=out, dtype=np.float32)
    else:
        np.copyto(out, stored)


def scratch(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array whose memory the next call of this thread uses again: fresh memory costs more
    than what is done with it."""
    size = int(np.prod(shape))
    if size > len(getattr(_memory, "buffer", ())):
        _memory.buffer = np.empty(size, np.float32)
    return _memory.buffer[:size].reshape(shape)


_memory = threading.local()
