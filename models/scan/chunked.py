"""Selective scan in plain tensor operations, for any device; exact gradients by recomputation.

Time is cut into chunks. Step i of all chunks of a segment is done at once, then one short pass
carries the state from chunk to chunk. A segment is a few chunks, expanded to (T, B, G, E, K, N):
step within the chunk, batch, group, channel within its group, chunk, state. Memory is that of a
segment, whatever the length. Source: Gu and Dao, arXiv 2312.00752, and the adjoint of its
recurrence.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from segfleet.models.scan.inputs import ScanInputs

SEGMENT = 1 << 20  # elements of one expanded tensor


def unavailable(device: torch.device) -> str:
    """Why this back end cannot run on `device`; empty: it can."""
    return ""


def forward(s: ScanInputs) -> tuple[Tensor, Tensor]:
    """Output (B, D, L) in u's type and the state at the end of every chunk (B, D, K, N)."""
    batch, channels, _, state = s.sizes
    out = torch.empty(s.u.shape, dtype=s.u.dtype, device=s.u.device)
    ends = torch.empty(s.state_shape(), dtype=s.dtype, device=s.u.device)
    now = torch.zeros(
        batch, s.groups, channels // s.groups, state, dtype=s.dtype, device=s.u.device
    )
    for first, last in _spans(s):
        seg = _Segment(s, first, last)
        h = seg.states(torch.zeros_like(seg.a[0]))
        decay = torch.cumprod(seg.a, dim=0)
        before, now = _carry(h[-1], decay[-1], now)
        h.addcmul_(decay, before)
        ends[:, :, first:last] = h[-1].reshape(batch, channels, -1, state)
        y = seg.unfold(h.mul_(seg.C).sum(-1))
        if s.D is not None:
            y.addcmul_(s.D.to(s.dtype)[:, None], seg.rows(s.u))
        if s.z is not None:
            y.mul_(F.silu(seg.rows(s.z)))
        out[..., seg.begin : seg.end] = y
    return out, ends


def backward(
    s: ScanInputs, grad_out: Tensor, grad_last: Tensor | None, ends: Tensor
) -> dict[str, Tensor]:
    """Gradients by name, each of its input's shape and type. grad_last: gradient of the last state
    (B, D, N)."""
    batch, channels, _, state = s.sizes
    # rows of time are written once, in their own type; what is summed over time is summed in the
    # type of the arithmetic
    total = {
        k: torch.zeros(x.shape, dtype=x.dtype if x.ndim > 2 else s.dtype, device=x.device)
        for k, x in s.tensors.items()
    }
    flow = torch.zeros(
        batch, s.groups, channels // s.groups, state, dtype=s.dtype, device=s.u.device
    )
    if grad_last is not None:
        flow += grad_last.view_as(flow)
    for first, last in reversed(_spans(s)):
        flow = _Segment(s, first, last).gradients(grad_out, flow, ends, total)
    return {k: x.to(s.tensors[k].dtype) for k, x in total.items()}


class _Segment:
    """Chunks [first, last) of a scan, expanded."""

    def __init__(self, s: ScanInputs, first: int, last: int) -> None:
        self.s, self.first, self.chunks = s, first, last - first
        self.begin, self.end = first * s.chunk, min(last * s.chunk, s.u.shape[2])
        raw = self.rows(s.delta)
        self.raw = raw if s.bias is None else raw + s.bias.to(s.dtype)[:, None]
        # steps past the end get delta 0: a = 1 and no input, so the state stays what it was
        self.delta = self.fold(F.softplus(self.raw) if s.softplus else self.raw)
        self.u = self.fold(self.rows(s.u))
        self.A = s.A.to(s.dtype).view(s.groups, -1, 1, s.A.shape[1])
        self.B, self.C = self.matrix(s.B), self.matrix(s.C)
        self.a = torch.exp(self.delta.unsqueeze(-1) * self.A)

    def rows(self, x: Tensor) -> Tensor:
        """The segment's part of (..., L), in the type of the arithmetic."""
        return x[..., self.begin : self.end].to(self.s.dtype)

    def padded(self, x: Tensor) -> Tensor:
        """(..., steps) to (..., K · T), zeros past the end."""
        return F.pad(x, (0, self.chunks * self.s.chunk - x.shape[-1]))

    def fold(self, x: Tensor) -> Tensor:
        """(B, D, steps) to (T, B, G, E, K)."""
        folded = "b (g e) (k t) -> t b g e k"
        return rearrange(self.padded(x), folded, g=self.s.groups, t=self.s.chunk).contiguous()

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return rearrange(x, "t b g e k -> b (g e) (k t)")[..., : self.end - self.begin]

    def matrix(self, x: Tensor) -> Tensor:
        """B or C to (T, B, G, 1, K, N); constant: to (G, E, 1, N)."""
        if x.ndim == 2:
            return rearrange(x.to(self.s.dtype), "(g e) n -> g e 1 n", g=self.s.groups)
        folded = "b g n (k t) -> t b g 1 k n"
        return rearrange(self.padded(self.rows(x)), folded, t=self.s.chunk).contiguous()

    def add_matrix(self, total: Tensor, grad: Tensor) -> None:
        """Put the gradient (T, B, G, E, K, N) of B or C where it belongs in `total`, (B, G, N, L)
        or (D, N)."""
        if total.ndim == 2:
            total += grad.sum(dim=(0, 1, 4)).view_as(total)
        else:
            rows = rearrange(grad.sum(dim=3), "t b g k n -> b g n (k t)")
            total[..., self.begin : self.end] = rows[..., : self.end - self.begin]

    def states(self, before: Tensor) -> Tensor:
        """All states (T, B, G, E, K, N) from the state before each chunk, (B, G, E, K, N)."""
        h = (self.delta * self.u).unsqueeze(-1) * self.B
        for a, now in zip(self.a.unbind(0), h.unbind(0), strict=True):
            before = now.addcmul_(a, before)
        return h

    def gradients(
        self, grad_out: Tensor, flow: Tensor, ends: Tensor, total: dict[str, Tensor]
    ) -> Tensor:
        """Add this segment's part to `total`. flow (B, G, E, N): what later steps ask of its last
        state; returns that of its first."""
        s, span = self.s, slice(self.begin, self.end)
        starts = F.pad(ends, (0, 0, 1, 0))[:, :, self.first : self.first + self.chunks].unflatten(
            1, (s.groups, -1)
        )
        h = self.states(starts)
        g = self.rows(grad_out)
        if s.z is not None:
            z = self.rows(s.z)
            y = self.unfold((h * self.C).sum(-1))
            if s.D is not None:
                y.addcmul_(s.D.to(s.dtype)[:, None], self.rows(s.u))
            gate = torch.sigmoid(z)
            total["z"][..., span] = g * y * gate * (1 + z * (1 - gate))
            g = g * z * gate
        folded = self.fold(g)
        lam, flow = self._adjoint(folded, flow)
        self.add_matrix(total["C"], folded.unsqueeze(-1) * h)
        self.add_matrix(total["B"], (self.delta * self.u).unsqueeze(-1) * lam)
        before = torch.cat([starts.unsqueeze(0), h[:-1]])
        q = before.mul_(self.a).mul_(lam)  # lambda a h'
        total["A"] += (q * self.delta.unsqueeze(-1)).sum(dim=(0, 1, 4)).view_as(total["A"])
        through_b = (lam * self.B).sum(-1)
        d_delta = self.unfold((q * self.A).sum(-1) + self.u * through_b)
        if s.softplus:
            d_delta = d_delta * torch.where(self.raw > 20, 1.0, torch.sigmoid(self.raw))
        total["delta"][..., span] = d_delta
        d_u = self.unfold(self.delta * through_b)
        if s.bias is not None:
            total["bias"] += d_delta.sum(dim=(0, 2))
        if s.D is not None:
            total["D"] += (g * self.rows(s.u)).sum(dim=(0, 2))
            d_u = d_u + s.D.to(s.dtype)[:, None] * g
        total["u"][..., span] = d_u
        return flow

    def _adjoint(self, g: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """lambda (T, B, G, E, K, N) by the same two levels, backwards in time, and what this
        segment asks of the state before it."""
        lam = g.unsqueeze(-1) * self.C
        for t in range(self.s.chunk - 2, -1, -1):
            lam[t].addcmul_(self.a[t + 1], lam[t + 1])
        # from step t to the last step of its chunk: the product of later a
        after = torch.ones_like(self.a)
        after[:-1] = self.a[1:].flip(0).cumprod(0).flip(0)
        asked, decay = self.a[0] * lam[0], self.a[0] * after[0]
        order, now = [], flow
        for k in range(self.chunks - 1, -1, -1):
            order.append(now)
            now = asked[..., k, :] + decay[..., k, :] * now
        lam.addcmul_(after, torch.stack(order[::-1], dim=3))
        return lam, now


def _carry(local: Tensor, decay: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """From chunk ends that started at zero, (B, G, E, K, N): the states before each chunk, and the
    state after the last."""
    before = []
    for k in range(local.shape[3]):
        before.append(now)
        now = local[..., k, :] + decay[..., k, :] * now
    return torch.stack(before, dim=3), now


def _spans(s: ScanInputs) -> list[tuple[int, int]]:
    """Chunks [first, last) of each segment."""
    batch, channels, _, state = s.sizes
    step = max(1, SEGMENT // (batch * channels * s.chunk * state))
    return [(first, min(first + step, s.chunks)) for first in range(0, s.chunks, step)]
