"""The compiled kernels of augmentation (`kernels.cpp`), built on first use. Without a compiler
numpy and torch do the same operations in the same order: the same bits, some five times slower."""

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
    "noise": (POINTER, COUNT, REAL, ctypes.c_uint64),
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
        kernels = build.load(SOURCE, *FLAGS)
    except build.BuildError as error:
        log.warning("augmentation runs without its compiled kernels, some times slower: %s", error)
        return None
    for name, types in FUNCTIONS.items():
        function = getattr(kernels, f"segfleet_{name}")
        function.restype, function.argtypes = None, types
    return kernels


def sizes(*numbers: int) -> ctypes.Array:
    return (COUNT * len(numbers))(*numbers)


def scratch(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """An array whose memory the next call of this thread for the type uses again: fresh memory
    costs more than what is done with it."""
    size = int(np.prod(shape))
    held = getattr(_memory, dtype.__name__, None)
    if held is None or size > len(held):
        held = np.empty(size, dtype)
        setattr(_memory, dtype.__name__, held)
    return held[:size].reshape(shape)


_memory = threading.local()
