"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for GPUs by its compiler,
and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy
import pytest
import torch

triton = pytest.importorskip(
    "triton",
    reason="package triton (3.9.0 was tested) is not installed: the Triton kernels are not tested",
)

INTERPRETED = """
import json, torch
from segfleet.models.scan import selective_scan_fn, selective_scan_ref

def error(batch, channels, length, state, groups, B="varied", C="varied", gate=True, softplus=True,
          dtype=torch.float64, last=True):
    draw = torch.Generator().manual_seed(9)
    def normal(*shape):
        drawn = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()
    def matrix(kind):
        return normal(*((batch, groups, state, length) if kind == "varied" else (channels, state)))
    row = (batch, channels, length)
    strided = normal(*row[::-1]).detach().permute(2, 1, 0).requires_grad_()
    tensors = [strided, normal(*row), (-normal(channels, state).detach().exp()).requires_grad_(),
               matrix(B), matrix(C)]
    more = [normal(channels), normal(*row), normal(channels)] if gate else [None, None, None]
    given = [x for x in (*tensors, *more) if x is not None]
    results = []
    for scan, options in ((selective_scan_fn, {"backend": "triton"}), (selective_scan_ref, {})):
        out, state_ = scan(*tensors, *more, softplus, return_last_state=True, **options)
        weighted = state_.double() * torch.arange(1.0, state + 1)
        loss = out.double().sin().sum() + weighted.sum() * last
        results.append([out, state_, *torch.autograd.grad(loss, given)])
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in zip(*results))
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
               for x, y in zip(*results))

print(json.dumps({
    "one step": error(2, 2, 1, 1, 1),
    "two chunks": error(1, 4, 70, 3, 2),
    "whole chunks": error(1, 1, 128, 2, 1, gate=False),
    "constant B": error(1, 2, 66, 2, 1, B="constant"),
    "constant C": error(2, 2, 66, 1, 2, C="constant"),
    "both constant": error(1, 2, 66, 2, 1, B="constant", C="constant", softplus=False, gate=False),
    "five states": error(1, 2, 66, 5, 1),
    "single": error(1, 2, 70, 2, 1, dtype=torch.float32),
    "bfloat16": error(1, 2, 66, 2, 1, dtype=torch.bfloat16),
    "no gradient of the state": error(1, 2, 66, 2, 1, last=False),
}))
from segfleet.models.scan import triton_backend
triton_backend.TILE, triton_backend.PROGRAMS = 128, 1
print(json.dumps({
    "blocks of states, channels in a row": error(1, 4, 66, 5, 1),
    "the same without gate": error(1, 2, 66, 3, 1, B="constant", gate=False),
}))
"""
TOLERANCE = {"single": 1e-5, "bfloat16": 3e-2}


def version(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


def test_interpreted_kernels_equal_the_definition(tmp_path):
    if version(triton) < (3, 7) and version(numpy) >= (2, 5):
        pytest.skip("Triton's interpreter before 3.7 makes scalars as numpy 2.5 no longer does")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = {k: x for line in done.stdout.splitlines() for k, x in json.loads(line).items()}
    assert len(errors) == 12
    wrong = {k: x for k, x in errors.items() if not x < TOLERANCE.get(k, 1e-11)}
    assert not wrong


KERNELS = [
    ("chunk_sums", {"REVERSE": True}),
    ("carry", {"REVERSE": False}),
    ("outputs", {"GRAD": False}),
    ("gradients", {}),
]


@pytest.mark.parametrize(("name", "flags"), KERNELS, ids=[k for k, _ in KERNELS])
def test_kernels_compile_for_a_gpu(name, flags, tmp_path, monkeypatch):
    """Triton's own compiler, down to machine code for compute capability 8.0, with bfloat16
    sequences: needs no GPU."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from segfleet.models.scan import triton_kernels

    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no compiler for NVIDIA GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = {
        "SKIP": True,
        "GATED": True,
        "CONST": False,
        "CONST_B": False,
        "CONST_C": False,
        "SOFTPLUS": True,
        "TERMS": 8,
        **flags,
    }
    flags |= {"DT": tl.float32, "BT": 64, "BN": 4}
    counts = {"channels", "per_group", "groups", "batch", "length", "chunks", "N", "blocks"}
    sequences = {"u", "delta", "x", "z", "M", "B", "C", "grad", "out", "du", "ddelta", "dB", "dC"}
    signature, constants = {}, {}
    for parameter in getattr(triton_kernels, name).params:
        if parameter.is_constexpr:
            signature[parameter.name], constants[(parameter.num,)] = (
                "constexpr",
                flags[parameter.name],
            )
        elif parameter.name in counts or (len(parameter.name) == 3 and parameter.name[1] == "s"):
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = "*bf16" if parameter.name in sequences else "*fp32"
    source = ASTSource(getattr(triton_kernels, name), signature, constexprs=constants)
    assert triton.compile(
        source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True}
    ).asm["cubin"]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the Triton kernels run in the interpreter only"
)
@pytest.mark.parametrize("state", [1, 16, 40])
def test_on_the_gpu(state):
    from segfleet.models.scan import selective_scan_fn

    draw = torch.Generator().manual_seed(4)
    row, matrix = (2, 8, 3000), (2, 2, state, 3000)
    tensors = [
        torch.randn(s, generator=draw)
        for s in (row, row, (8, state), matrix, matrix, (8,), row, (8,))
    ]
    tensors[2] = -tensors[2].exp()
    results = {}
    for backend, dtype in (("triton", torch.float32), ("chunked", torch.float64)):
        given = [x.to("cuda", dtype).requires_grad_() for x in tensors]
        out = selective_scan_fn(*given, True, backend=backend)
        results[backend] = [out, *torch.autograd.grad(out.sin().sum(), given)]
    for x, y in zip(results["triton"], results["chunked"], strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()
