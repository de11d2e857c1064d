"""The CUDA kernels of `mamba_ssm`, when that package is installed with them."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

LARGEST_STATE = 256  # of its kernels


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("mamba_ssm") is None:
        return "package mamba_ssm is not installed"
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return (
            "mamba_ssm was installed without its Mamba-1 kernels (build it with "
            "MAMBA_KEEP_CUDA_BUILD=TRUE)"
        )
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except Exception as problem:
        # a wheel for another torch fails in many ways, an undefined symbol among them
        message = str(problem).splitlines() or [type(problem).__name__]
        return f"mamba_ssm does not import: {message[0]}"
    return ""


def unavailable(device: torch.device) -> str:
    """Why this back end cannot run on `device`; empty: it can."""
    return _missing() if device.type == "cuda" else "its kernels are for CUDA tensors"


def fits(u: Tensor, A: Tensor) -> bool:
    """Whether the kernels take these types and this state size."""
    return u.dtype in (torch.float32, torch.float16, torch.bfloat16) and A.shape[1] <= LARGEST_STATE


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None,
    softplus: bool, return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The scan with mamba_ssm's own autograd; it wants sequences in u's type, contiguous in time,
    and parameters in float32."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def sequence(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.to(u.dtype).contiguous()

    B, C = (m.float() if m.ndim == 2 else sequence(m) for m in (B, C))
    D, bias = (x if x is None else x.float() for x in (D, bias))
    u, delta, z = sequence(u), sequence(delta), sequence(z)
    return selective_scan_fn(u, delta, A.float(), B, C, D, z, bias, softplus, return_last_state)
