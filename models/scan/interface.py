"""The one public function: the selective scan under the name and signature of `mamba_ssm`."""

from __future__ import annotations

import torch
from torch import Tensor

from segfleet.models.scan import backends
from segfleet.models.scan.inputs import check_inputs


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba-1 (arXiv 2312.00752), differentiable in every tensor.

    For each batch entry and channel, with h = 0 before the first step:
    d = softplus(delta + delta_bias), h = exp(d A) h + d B u, y = C h + D u, out = y silu(z).

    u, delta, z: (batch, channels, length). A: (channels, state), real. B, C: (batch, state,
    length), (batch, groups, state, length) with groups of neighbouring channels, or constant
    (channels, state). D, delta_bias: (channels,). Any strides; float32, bfloat16, float16 (computed
    in float32) or float64. Returns out (batch, channels, length) in u's type and, if asked, the
    last state (batch, channels, state) in float32 (float64 for float64), through which gradients
    flow too.

    backend: auto, mamba_ssm (CUDA kernels of that package), triton, native (compiled C++ for the
    CPU) or chunked (plain torch); for auto the environment variable SEGFLEET_SCAN names one, else
    device and availability decide. Raises ModelError for tensors that do not fit together and for a
    back end that cannot run here.
    """
    check_inputs(u, delta, A, B, C, D, z, delta_bias)
    if (
        u.is_cuda
        and not torch.compiler.is_compiling()
        and backends.choose(backend, u.device) == "mamba_ssm"
    ):
        external = backends.load("mamba_ssm")
        if external.fits(u, A) and not (return_last_state and torch.is_grad_enabled()):
            return external.scan(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
            )
    B, C = _same_groups(B, C), _same_groups(C, B)
    out, states = torch.ops.segfleet.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend
    )
    return (out, states[:, :, -1]) if return_last_state else out


def _same_groups(x: Tensor, other: Tensor) -> Tensor:
    """x as (batch, groups, state, length) with as many groups as `other`, or the constant x."""
    if x.ndim == 2:
        return x
    x = x.unsqueeze(1) if x.ndim == 3 else x
    groups = other.shape[1] if other.ndim == 4 else 1
    return x.expand(-1, groups, -1, -1) if x.shape[1] == 1 and groups > 1 else x
