"""The Triton kernels as a back end: sizes, scratch memory, launches, and the last sums.
Deterministic."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from segfleet.models.scan.inputs import ScanInputs

TILE = 4096  # elements of a (time, state) tile
# the backward pass is cut into about so many programs; a constant, so that sums keep their order
PROGRAMS = 1024


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("segfleet.models.scan.triton_kernels")


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str:
    """Why this back end cannot run on `device`; empty: it can."""
    if importlib.util.find_spec("triton") is None:
        return "package triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return ""
    return "its kernels are for CUDA tensors (or the CPU with TRITON_INTERPRET=1)"


class _Launch:
    """What all kernels of one scan share."""

    def __init__(self, s: ScanInputs) -> None:
        import triton
        import triton.language as tl

        self.s, self.k = s, _kernels()
        batch, channels, length, state = s.sizes
        self.lines, self.per_group = batch * channels, channels // s.groups
        self.block_n = max(1, min(triton.next_power_of_2(state), TILE // s.chunk))
        self.pieces = -(-state // self.block_n)
        double = s.dtype == torch.float64
        self.A = s.A.to(s.dtype).contiguous()
        self.D = self.A if s.D is None else s.D.contiguous()
        self.bias = (
            torch.zeros(channels, dtype=s.dtype, device=s.u.device)
            if s.bias is None
            else s.bias.contiguous()
        )
        self.kind = {"DT": tl.float64 if double else tl.float32, "enable_fp_fusion": True}
        self.steps = {
            "SOFTPLUS": s.softplus,
            "TERMS": 17 if double else 8,
            **self.kind,
            "BT": s.chunk,
            "BN": self.block_n,
        }
        self.z = s.u if s.z is None else s.z
        self.matrices = [m.contiguous() if m.ndim == 2 else m for m in (s.B, s.C)]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.s.dtype, device=self.s.u.device)

    def states(self, x: Tensor, matrix: Tensor, first: Tensor | None) -> Tensor:
        """(B, D, K, N). x = u: the state after each chunk. x = gradient of the output, with
        `first`: the adjoint from behind each chunk."""
        s, reverse = self.s, first is not None
        batch, channels, length, state = s.sizes
        sums, totals = self.empty(*s.state_shape()), self.empty(*s.state_shape()[:3])
        self.k.chunk_sums[(self.lines * s.chunks,)](
            s.delta, *s.delta.stride(), x, *x.stride(), self.z, *self.z.stride(), matrix,
            *_stride4(matrix),
            self.A, self.bias, sums, totals, channels, self.per_group, length, s.chunks, state,
            REVERSE=reverse, GATED=s.z is not None, CONST=matrix.ndim == 2, **self.steps,
        )  # fmt: skip
        self.k.carry[(self.lines, self.pieces)](
            sums,
            totals,
            self.A,
            first if reverse else sums,
            channels,
            s.chunks,
            state,
            REVERSE=reverse,
            BN=self.block_n,
            **self.kind,
        )
        return sums

    def sequences(self, grad: Tensor) -> list[object]:
        """The arguments that `outputs` and `gradients` share."""
        rows = [self.s.u, self.s.delta, self.z, grad]
        with_strides = [y for x in rows for y in (x, *x.stride())] + [
            y for m in self.matrices for y in (m, *_stride4(m))
        ]
        return [*with_strides, self.A, self.D, self.bias]

    def flags(self) -> dict[str, bool]:
        s = self.s
        return {
            "SKIP": s.D is not None,
            "GATED": s.z is not None,
            "CONST_B": s.B.ndim == 2,
            "CONST_C": s.C.ndim == 2,
        }

    def outputs(self, ends: Tensor, grad: Tensor | None, out: Tensor) -> None:
        s = self.s
        batch, channels, length, state = s.sizes
        self.k.outputs[(self.lines * s.chunks,)](
            *self.sequences(s.u if grad is None else grad), ends, out, channels, self.per_group,
            length, s.chunks, state,
            GRAD=grad is not None, **self.flags(), **self.steps,
        )  # fmt: skip


def forward(s: ScanInputs) -> tuple[Tensor, Tensor]:
    """As `chunked.forward`."""
    with _device(s.u):
        launch = _Launch(s)
        ends = launch.states(s.u, launch.matrices[0], None)
        out = launch.empty(*s.u.shape, dtype=s.u.dtype)
        launch.outputs(ends, None, out)
    return out, ends


def backward(
    s: ScanInputs, grad_out: Tensor, grad_last: Tensor | None, ends: Tensor
) -> dict[str, Tensor]:
    """As `chunked.backward`."""
    batch, channels, length, state = s.sizes
    gradients: dict[str, Tensor] = {}
    with _device(s.u):
        launch = _Launch(s)
        first = (
            launch.empty(batch, channels, state).zero_()
            if grad_last is None
            else grad_last.contiguous()
        )
        ends = ends.contiguous()
        flow = launch.states(grad_out, launch.matrices[1], first)
        if s.z is not None:
            gradients["z"] = launch.empty(*s.z.shape, dtype=s.z.dtype)
            launch.outputs(ends, grad_out, gradients["z"])
        blocks = max(1, min(launch.per_group, PROGRAMS // (batch * s.groups * s.chunks)))
        rows = {
            k: launch.empty(launch.pieces, *x.shape, dtype=_partial(x, launch.pieces, s))
            for k, x in (("u", s.u), ("delta", s.delta))
        }
        wide, parts = {}, {}
        for name, m in (("B", s.B), ("C", s.C)):
            wide[name] = (
                flow
                if m.ndim == 2
                else launch.empty(blocks, *m.shape, dtype=_partial(m, blocks, s))
            )
            parts[name] = launch.empty(*s.state_shape()) if m.ndim == 2 else flow
        scalars = launch.empty(2, launch.pieces, *s.state_shape()[:3])
        launch.k.gradients[(batch * s.groups * s.chunks, blocks, launch.pieces)](
            *launch.sequences(grad_out), ends, flow, rows["u"], rows["delta"], wide["B"], wide["C"],
            parts["B"], parts["C"],
            scalars[0], scalars[1], batch, s.groups, launch.per_group, length, s.chunks, state,
            blocks,
            **launch.flags(), **launch.steps,
        )  # fmt: skip
    gradients |= {k: _total(x) for k, x in rows.items()} | {
        "A": flow.sum(dim=(0, 2)),
        "bias": scalars[1].sum(dim=(0, 1, 3)),
    }
    gradients["D"] = scalars[0, 0].sum(dim=(0, 2))  # every block of states holds the same
    gradients |= {
        k: parts[k].sum(dim=(0, 2)) if m.ndim == 2 else _total(wide[k])
        for k, m in (("B", s.B), ("C", s.C))
    }
    return {k: gradients[k].to(x.dtype) for k, x in s.tensors.items()}


def _partial(x: Tensor, parts: int, s: ScanInputs) -> torch.dtype:
    return x.dtype if parts == 1 else s.dtype


def _total(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _stride4(m: Tensor) -> tuple[int, ...]:
    return tuple(m.stride()) if m.ndim == 4 else (0, 0, 0, 0)


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
