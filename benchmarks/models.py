"""Time and memory of one training step of every registered network.

    python benchmarks/models.py [--device cpu|cuda|both] [--only NAME ...] [--repeats 5] [--threads
    1] [--out FILE]

Each network runs alone in a process of its own, at its published channels and classes, at a fixed
small size: in 2D two images of
128 x 128, in 3D one of 32 x 64 x 64, made legal where a network needs more; a network with a fixed
patch at its published one. Time: median of forward + backward in fp32 (on a GPU also in bf16) after
two warm-up steps. Memory: on a CPU the growth of the process' peak resident size over what it held
before the first step, on a GPU the allocator's peak. Prints a markdown table; the file is written
after every network, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZE = {2: (128, 128), 3: (32, 64, 64)}
BATCH = {2: 2, 3: 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "both"),
        default="both",
        help="both: the GPU where there is one",
    )
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one network")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "models.json"
    )
    parser.add_argument(
        "--one", nargs=3, metavar=("NAME", "DEVICE", "PRECISION"), help=argparse.SUPPRESS
    )
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one, repeats=asked.repeats, threads=asked.threads)))
        return

    import torch

    from segfleet.models.registry import specs

    runs = [] if asked.device == "cuda" else [("cpu", "fp32")]
    if asked.device != "cpu" and torch.cuda.is_available():
        runs += [("cuda", "fp32"), ("cuda", "bf16")]
    machine = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": asked.threads,
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in asked.only or specs():
        for device, precision in runs:
            rows.append(alone(name, device, precision, asked))
            print(
                f"{name} {device} {precision}: {rows[-1].get('ms', rows[-1].get('failed'))}",
                file=sys.stderr,
                flush=True,
            )
            document = {"machine": machine, "repeats": asked.repeats, "rows": rows}
            asked.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print_table(rows)


def alone(name: str, device: str, precision: str, asked: argparse.Namespace) -> dict:
    """Measure in a fresh process; a failure becomes a row that says so."""
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        device,
        precision,
        "--repeats",
        str(asked.repeats),
        "--threads",
        str(asked.threads),
    ]
    facts = {"name": name, "device": device, "precision": precision}
    env = os.environ | {"OMP_NUM_THREADS": str(asked.threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=asked.limit, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return facts | {"failed": f"longer than {asked.limit:.0f} s"}
    if done.returncode:
        return facts | {
            "failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        }
    return facts | json.loads(done.stdout.splitlines()[-1])


def measure(name: str, device: str, precision: str, *, repeats: int, threads: int) -> dict:
    import torch

    from segfleet.models.profile import profile
    from segfleet.models.registry import spec

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = spec(name)
    size = legal_size(chosen)
    batch = BATCH[len(size)]
    model = chosen.build(chosen.in_channels, chosen.num_classes).to(device).train()
    x = torch.randn(batch, chosen.in_channels, *size, device=device)
    cuda = device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else peak_resident()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(x)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        sum(output.float().square().mean() for output in outputs).backward()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for _ in range(2):
        step()
    times = [step() for _ in range(repeats)]
    after = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    costs = profile(chosen, size=size, batch=batch)
    return {
        "size": list(size),
        "batch": batch,
        "parameters": chosen.parameters,
        "gmac": round(batch * costs.macs / 1e9, 3),  # forward
        "ms": round(statistics.median(times), 2),
        "ms_all": [round(t, 2) for t in times],
        "step_mib": round((after - before) / 2**20, 1),  # beyond the weights
        # tensors alone, from the meta device, fp32
        "predicted_mib": round((costs.peak_bytes - weights) / 2**20, 1),
    }


def legal_size(chosen) -> tuple[int, ...]:
    if chosen.fixed_patch:
        return chosen.paper_input
    rank = len(chosen.paper_input)
    divisors = (chosen.divisor,) * rank if isinstance(chosen.divisor, int) else chosen.divisor
    sizes = tuple(d * -(-s // d) for s, d in zip(SIZE[rank], divisors, strict=True))
    # a deepest map of one voxel cannot be normalised
    return tuple(2 * s for s in sizes) if sizes == tuple(divisors) else sizes


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_table(rows: list[dict]) -> None:
    print(
        "| network | device | size | parameters | GMAC | ms per step | MiB per step | predicted "
        "MiB |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        where = f"{row['device']} {row['precision']}"
        if "failed" in row:
            print(f"| {row['name']} | {where} | failed: {row['failed']} | | | | | |")
            continue
        size = "x".join(map(str, (row["batch"], *row["size"])))
        costs = f"{row['gmac']} | {row['ms']} | {row['step_mib']} | {row['predicted_mib']}"
        print(f"| {row['name']} | {where} | {size} | {row['parameters']:,} | {costs} |")


if __name__ == "__main__":
    main()
