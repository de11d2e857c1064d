"""The selective scan as a torch operator: traced by torch.compile as one node, differentiable
once."""

from __future__ import annotations

import torch
from torch import Tensor

from segfleet.models.scan import backends
from segfleet.models.scan.inputs import ScanInputs

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias")
# Spelt out: which annotations torch can read differs from version to version.
SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "bool softplus, str backend"
)


def _inputs(u, delta, A, B, C, D, z, bias, softplus) -> ScanInputs:
    return ScanInputs(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias, softplus=softplus)


@torch.library.custom_op(
    "segfleet::selective_scan", mutates_args=(), schema=f"({SCAN}) -> (Tensor, Tensor)"
)
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, softplus: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, D, L) and the states at the end of every chunk (B, D, K, N); of these only the
    last may be given a gradient."""
    name = backends.choose(backend, u.device, own_only=True)
    return backends.load(name).forward(_inputs(u, delta, A, B, C, D, z, bias, softplus))


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, backend):
    s = _inputs(u, delta, A, B, C, D, z, bias, softplus)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty(
        s.state_shape(), dtype=s.dtype, device=u.device
    )


@torch.library.custom_op(
    "segfleet::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_last, Tensor states, {SCAN}) -> Tensor[]",
)
def selective_scan_backward(
    grad_out: Tensor, grad_last: Tensor | None, states: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, softplus: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors that are there, in the order of NAMES."""
    s = _inputs(u, delta, A, B, C, D, z, bias, softplus)
    name = backends.choose(backend, u.device, own_only=True)
    gradients = backends.load(name).backward(s, grad_out, grad_last, states)
    return [gradients[k] for k in NAMES if k in s.tensors]


@selective_scan_backward.register_fake
def _(grad_out, grad_last, states, u, delta, A, B, C, D, z, bias, softplus, backend):
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (u, delta, A, B, C, D, z, bias)
        if x is not None
    ]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.softplus, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_out, grad_states):
    *tensors, states = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    grad_last = None if grad_states is None else grad_states[:, :, -1]
    gradients = iter(
        torch.ops.segfleet.selective_scan_backward(
            grad_out, grad_last, states, *tensors, ctx.softplus, ctx.backend
        )
    )
    return *(None if x is None else next(gradients) for x in tensors), None, None


selective_scan.register_autograd(_backward, setup_context=_setup)
