"""Selective scan, forward and backward: every way to run it here, side by side. Prints a table,
writes results/selective_scan.json.

    python benchmarks/selective_scan.py            (--quick: the short sequence only)

Times are the best of several runs within one process; read the ratios, not the seconds. `extra` is
the peak of resident memory above a process that holds the inputs, the output and their gradients,
in percent of the inputs, in a process of its own. `error` is the largest relative error of output
and gradients against float64. On a GPU: our Triton kernels against mamba_ssm where it is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from segfleet.models.scan import backends, selective_scan_fn, selective_scan_ref

SHAPES = ((1, 16, 4096, 16), (4, 4, 65536, 16))  # batch, channels, length, state
GPU_SHAPES = tuple((2, 384, length, 16) for length in (1024, 4096, 16384, 65536))
RESULTS = Path(__file__).parent / "results" / "selective_scan.json"


def inputs(
    shape: tuple[int, int, int, int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """u, delta, A, B, C, D, z, bias as a Mamba layer has them at its start."""
    batch, channels, length, state = shape
    draw = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw)

    rates = -torch.arange(1.0, state + 1).repeat(channels, 1)
    bias = torch.log(torch.expm1(torch.exp(torch.rand(channels, generator=draw) * 4.6 - 6.9)))
    row, matrix = (batch, channels, length), (batch, state, length)
    made = [
        normal(*row),
        normal(*row),
        rates,
        normal(*matrix),
        normal(*matrix),
        torch.ones(channels),
        normal(*row),
        bias,
    ]
    return [x.to(device, dtype).requires_grad_() for x in made]


def associative(u, delta, A, B, C, D, z, bias):
    """The scan by torch's associative_scan on materialised pairs."""
    from torch._higher_order_ops.associative_scan import associative_scan

    step = torch.nn.functional.softplus(delta + bias[:, None])
    a = torch.exp(step.unsqueeze(-1) * A[:, None])
    b = (step * u).unsqueeze(-1) * B.transpose(1, 2).unsqueeze(1)
    _, h = associative_scan(
        lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), dim=2, combine_mode="generic"
    )
    y = (h * C.transpose(1, 2).unsqueeze(1)).sum(-1) + D[:, None] * u
    return y * torch.nn.functional.silu(z)


def forms(device: str) -> dict[str, Callable[..., Tensor]]:
    """Every way to run the scan on `device`, by name."""
    ours = [k for k in backends.MODULES if not backends.load(k).unavailable(torch.device(device))]
    made = {k: lambda *x, k=k: selective_scan_fn(*x, True, backend=k) for k in ours}
    if device == "cpu":
        made |= {
            "associative_scan": associative,
            "naive loop": lambda *x: selective_scan_ref(*x, True),
        }
    return made


def clock(
    scan: Callable[..., Tensor], tensors: list[Tensor], seconds: float = 3.0
) -> tuple[float, float]:
    """Best forward and backward seconds of at least one run and about `seconds` in all."""
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    sync = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    best, until, runs = (float("inf"), float("inf")), time.perf_counter() + seconds, 0
    while runs < 2 or (time.perf_counter() < until and runs < 50):
        sync()
        start = time.perf_counter()
        out = scan(*tensors)
        sync()
        middle = time.perf_counter()
        torch.autograd.grad(out, tensors, grad)
        sync()
        best = (min(best[0], middle - start), min(best[1], time.perf_counter() - middle))
        runs += 1
        if best[0] + best[1] > seconds:
            break
    return best


def error(scan: Callable[..., Tensor], shape: tuple[int, int, int, int], device: str) -> float:
    """Largest error of output and gradients against float64, each relative to its largest value."""
    results = []
    for run, kind in (
        (scan, torch.float32),
        (lambda *x: selective_scan_fn(*x, True, backend="chunked"), torch.float64),
    ):
        tensors = inputs(shape, device, kind)
        out = run(*tensors)
        results.append(
            [
                out,
                *torch.autograd.grad(
                    out,
                    tensors,
                    torch.cos(torch.arange(out.numel(), device=device)).view_as(out).to(kind),
                ),
            ]
        )
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(*results, strict=True))


def extra_memory(name: str, shape: tuple[int, int, int, int]) -> float | None:
    """Percent of the inputs, by a process of its own; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--memory", name, *map(str, shape)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(name: str, shape: tuple[int, int, int, int]) -> float:
    """In this process: the peak above inputs, output, its gradient and theirs."""
    scan = forms("cpu")[name]

    def resident(field: str) -> int:
        return 1024 * int(
            next(
                x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
            ).split()[1]
        )

    small = inputs((1, 2, 130, shape[3]))
    torch.autograd.grad(scan(*small).sum(), small)  # loads libraries
    tensors = inputs(shape)
    held = [torch.ones_like(x) for x in (*tensors, tensors[0], tensors[0])]
    base = resident("VmRSS:")
    del held
    Path("/proc/self/clear_refs").write_text("5")
    out = scan(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    return 100 * (resident("VmHWM:") - base) / sum(x.nbytes for x in tensors)


def compare(shape: tuple[int, int, int, int], device: str) -> list[dict[str, object]]:
    """One row per form; ratios are to the first, our fastest."""
    rows: list[dict[str, object]] = []
    for name, scan in forms(device).items():
        forward, backward = clock(scan, inputs(shape, device))
        rows.append(
            {
                "device": device,
                "shape": shape,
                "form": name,
                "forward_s": forward,
                "backward_s": backward,
            }
        )
        rows[-1]["error"] = error(scan, shape, device) if name in backends.MODULES else None
        if device == "cpu":
            rows[-1]["extra_percent"] = extra_memory(name, shape)
        print(
            f"{device} {shape} {name}: {forward:.4f} s, {backward:.4f} s",
            file=sys.stderr,
            flush=True,
        )
    ours = next(r for r in rows if r["form"] == ("triton" if device == "cuda" else rows[0]["form"]))
    for row in rows:
        row["times_slower"] = (row["forward_s"] + row["backward_s"]) / (
            ours["forward_s"] + ours["backward_s"]
        )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    titles = (
        "device",
        "(B, D, L, N)",
        "form",
        "forward s",
        "backward s",
        "times slower",
        "extra memory",
        "error",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in rows:
        extra = f"{r['extra_percent']:.0f} %" if r.get("extra_percent") is not None else ""
        wrong = f"{r['error']:.0e}" if r["error"] is not None else ""
        times = f"{r['forward_s']:.4f} | {r['backward_s']:.4f} | {r['times_slower']:.1f}"
        lines.append(
            f"| {r['device']} | {tuple(r['shape'])} | {r['form']} | {times} | {extra} | {wrong} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the short sequence only")
    parser.add_argument("--memory", nargs=5, metavar="X", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(options.memory[0], tuple(map(int, options.memory[1:]))))
        return
    rows = [
        row for shape in SHAPES[: 1 if options.quick else None] for row in compare(shape, "cpu")
    ]
    if torch.cuda.is_available():
        rows += [
            row
            for shape in GPU_SHAPES[: 1 if options.quick else None]
            for row in compare(shape, "cuda")
        ]
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
