"""The inputs of one selective scan, checked and in one form for every back end."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from segfleet.models.registry import ModelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def chunk_length(state: int) -> int:
    """Time steps between two kept states, a power of two: the kept states take an eighth of u's
    memory at most, up to N = 128."""
    return min(max(64, 8 << (state - 1).bit_length()), 1024)


@dataclass(frozen=True, kw_only=True)
class ScanInputs:
    """u, delta, z (B, D, L); A (D, N); B and C (B, G, N, L) or constant (D, N); D and bias (D,)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, channels, length, state)."""
        return (*self.u.shape, self.A.shape[1])

    @property
    def groups(self) -> int:
        """Channels d // (D / groups) share one row of B and C; 1 when both are constant."""
        return next((m.shape[1] for m in (self.B, self.C) if m.ndim == 4), 1)

    @property
    def dtype(self) -> torch.dtype:
        """The type all arithmetic is done in: double if any input is double, else single."""
        return (
            torch.float64
            if any(x.dtype == torch.float64 for x in self.tensors.values())
            else torch.float32
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    @property
    def chunk(self) -> int:
        return chunk_length(self.A.shape[1])

    @property
    def chunks(self) -> int:
        return -(-self.u.shape[2] // self.chunk)

    def state_shape(self) -> tuple[int, int, int, int]:
        """Shape of the kept states, one at the end of every chunk: (batch, channels, chunks,
        state)."""
        batch, channels, _, state = self.sizes
        return batch, channels, self.chunks, state


def check_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise ModelError, one sentence that names the argument, what it is and the rule, unless the
    scan is well formed."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}
    for name, x in given.items():
        if x is None and name in ("D", "z", "delta_bias"):
            continue
        if not isinstance(x, Tensor):
            raise ModelError(f"selective_scan: {name} must be a tensor, found {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise ModelError(
                f"selective_scan: {name} has type {x.dtype}, expected one of float32, bfloat16, "
                "float16, float64"
            )
        if x.device != u.device:
            raise ModelError(
                f"selective_scan: {name} is on {x.device} but u is on {u.device}; all arguments "
                "must be on one device"
            )
    if u.ndim != 3 or 0 in u.shape:
        raise ModelError(
            f"selective_scan: u has shape {tuple(u.shape)}, expected (batch, channels, length) "
            "with no size 0"
        )
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ModelError(
            f"selective_scan: A has shape {tuple(A.shape)}, expected (channels, state) with u's "
            f"{channels} channels"
        )
    for name, x in (("delta", delta), ("z", z)):
        if x is not None and x.shape != u.shape:
            raise ModelError(
                f"selective_scan: {name} has shape {tuple(x.shape)}, expected that of u, "
                f"{tuple(u.shape)}"
            )
    for name, x in (("D", D), ("delta_bias", bias)):
        if x is not None and x.shape != (channels,):
            raise ModelError(
                f"selective_scan: {name} has shape {tuple(x.shape)}, expected (channels,) = "
                f"({channels},)"
            )
    for name, x in (("B", B), ("C", C)):
        _check_matrix(name, x, batch, channels, length, A.shape[1])
    if B.ndim == C.ndim == 4 and B.shape[1] != C.shape[1] and 1 not in (B.shape[1], C.shape[1]):
        found = f"C has shape {tuple(C.shape)}, so {C.shape[1]} groups"
        raise ModelError(f"selective_scan: {found}, expected as many as B, {B.shape[1]}, or one")


def _check_matrix(name: str, x: Tensor, batch: int, channels: int, length: int, state: int) -> None:
    """B or C: (batch, N, length), (batch, groups, N, length) or constant (channels, N)."""
    found = f"selective_scan: {name} has shape {tuple(x.shape)}"
    if x.ndim == 2:
        if x.shape != (channels, state):
            raise ModelError(
                f"{found}, expected (channels, state) = ({channels}, {state}) for a constant {name}"
            )
        return
    if x.ndim not in (3, 4):
        raise ModelError(
            f"{found}, expected (batch, state, length), (batch, groups, state, length) or "
            "(channels, state)"
        )
    if x.shape[0] != batch or x.shape[-2] != state or x.shape[-1] != length:
        order = "(batch, state, length)" if x.ndim == 3 else "(batch, groups, state, length)"
        raise ModelError(
            f"{found}, expected {order} with batch {batch}, state {state} (from A) and length "
            f"{length}"
        )
    if x.ndim == 4 and (x.shape[1] == 0 or channels % x.shape[1]):
        raise ModelError(
            f"{found}, so {x.shape[1]} groups, of which the number of channels, {channels}, must "
            "be a multiple"
        )
