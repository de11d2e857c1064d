"""The compiled CPU kernel: `selective_scan.cpp`, built on first use, called without copying or
converting its inputs."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from segfleet.models.scan import build, chunked
from segfleet.models.scan.inputs import ScanInputs

SOURCE = Path(__file__).with_name("selective_scan.cpp")
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LARGEST_STATE = 512
PER_THREAD = 1 << 18  # states a thread must have to compute before it is worth waking
# independent pieces of work the backward pass is cut into at least, where channels allow; never
# depends on the machine
PIECES = 32

_COUNTS = (
    "batch",
    "channels",
    "groups",
    "length",
    "state",
    "chunk",
    "chunks",
    "softplus",
    "threads",
    "blocks",
)
_ARRAYS = (
    *("u", "delta", "A", "B", "C", "D", "z", "bias", "out", "ends", "grad_out", "grad_last"),
    *(
        "du",
        "ddelta",
        "dA",
        "dB",
        "dC",
        "dD",
        "dz",
        "dbias",
        "flow",
        "sums",
        "const_B",
        "const_C",
        "block_B",
        "block_C",
    ),
)


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("constant", ctypes.c_int64),
        ("stride", ctypes.c_int64 * 4),
    ]


class _Scan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _COUNTS] + [(name, _Array) for name in _ARRAYS]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    try:
        library = build.load(SOURCE)
    except build.BuildError as error:
        return None, str(error)
    for function in (library.segfleet_scan_forward, library.segfleet_scan_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Scan)], ctypes.c_int64
    library.segfleet_scan_size.restype = ctypes.c_int64
    assert library.segfleet_scan_size() == ctypes.sizeof(_Scan)
    return library, ""


def unavailable(device: torch.device) -> str:
    """Why this back end cannot run on `device`; empty: it can. The first call compiles, some
    seconds."""
    return _library()[1] if device.type == "cpu" else "it is for CPU tensors"


def forward(s: ScanInputs) -> tuple[Tensor, Tensor]:
    """As `chunked.forward`."""
    if s.A.shape[1] > LARGEST_STATE:
        return chunked.forward(s)
    out = torch.empty(s.u.shape, dtype=s.u.dtype)
    ends = torch.empty(s.state_shape(), dtype=s.dtype)
    _call("segfleet_scan_forward", s, 1, out=out, ends=ends)
    return out, ends


def backward(
    s: ScanInputs, grad_out: Tensor, grad_last: Tensor | None, ends: Tensor
) -> dict[str, Tensor]:
    """As `chunked.backward`; every gradient is bit for bit the same with any number of threads."""
    if s.A.shape[1] > LARGEST_STATE:
        return chunked.backward(s, grad_out, grad_last, ends)
    batch, channels, length, state = s.sizes
    gradients = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in s.tensors.items()}
    blocks = max(1, min(channels // s.groups, PIECES // (batch * s.groups * s.chunks)))
    scratch = {"flow": s.state_shape(), "sums": (2, *s.state_shape()[:3])}
    for name, matrix in (("B", s.B), ("C", s.C)):
        if matrix.ndim == 2:
            scratch[f"const_{name}"] = s.state_shape()
        elif blocks > 1:
            scratch[f"block_{name}"] = (blocks, *matrix.shape)
    arrays = {name: torch.empty(shape, dtype=s.dtype) for name, shape in scratch.items()}
    arrays |= {f"d{name}": x for name, x in gradients.items()}
    _call(
        "segfleet_scan_backward",
        s,
        blocks,
        ends=ends.contiguous(),
        grad_out=grad_out,
        grad_last=grad_last,
        **arrays,
    )
    return gradients


def _call(function: str, s: ScanInputs, blocks: int, **further: Tensor | None) -> None:
    batch, channels, length, state = s.sizes
    threads = max(
        1, min(torch.get_num_threads(), batch * channels * length * max(state, 4) // PER_THREAD)
    )
    counts = (
        batch,
        channels,
        s.groups,
        length,
        state,
        s.chunk,
        s.chunks,
        s.softplus,
        threads,
        blocks,
    )
    scan = _Scan(**dict(zip(_COUNTS, counts, strict=True)))
    for name, x in {**s.tensors, **further}.items():
        if x is not None:
            stride = (ctypes.c_int64 * 4)(*x.stride()[:4])
            setattr(
                scan,
                name,
                _Array(
                    data=x.data_ptr(),
                    type=TYPES[x.dtype],
                    constant=name in ("B", "C") and x.ndim == 2,
                    stride=stride,
                ),
            )
    failed = getattr(_library()[0], function)(ctypes.byref(scan))
    assert not failed, f"{function} returned {failed}"
