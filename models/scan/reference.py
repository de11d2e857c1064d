"""The selective scan as its definition reads, one step at a time: slow, differentiable by autograd,
the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan_ref(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Shapes as in `selective_scan_fn`. Computes in float32, or in float64 if u is."""
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, step = u.to(kind), delta.to(kind)
    if delta_bias is not None:
        step = step + delta_bias.to(kind)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    B, C = (_per_channel(m.to(kind), u) for m in (B, C))
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=kind, device=u.device)
    y = []
    for step_t, x_t, B_t, C_t in zip(
        step.unbind(-1), x.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True
    ):
        h = torch.exp(step_t[..., None] * A.to(kind)) * h + (step_t * x_t)[..., None] * B_t
        y.append((h * C_t).sum(-1))
    out = torch.stack(y, dim=-1)
    if D is not None:
        out = out + D.to(kind)[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(kind))
    out = out.to(u.dtype)
    return (out, h) if return_last_state else out


def _per_channel(m: Tensor, u: Tensor) -> Tensor:
    """B or C as (batch, channels, state, length)."""
    batch, channels, length = u.shape
    if m.ndim == 2:
        return m[None, :, :, None].expand(batch, -1, -1, length)
    m = m.unsqueeze(1) if m.ndim == 3 else m
    return m.repeat_interleave(channels // m.shape[1], dim=1)
