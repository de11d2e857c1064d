"""What a rank does before its first step, and what of it grows with the number of ranks.

    python benchmarks/start.py              one rank, then 8 to 64 that meet
    python benchmarks/start.py --meet 8 16  so many alone

One rank: CPU seconds and files of every part of a start, from Python's own to the end of the first
step, with the store beside it. Ranks that meet are light: forked from one process that has imported
PyTorch, they look for the address, join the store, connect to each other and prove who they are.
Their CPU seconds, a straight line through the measured sizes, say what 512 ranks would take, each
with a core of its own. Results: results/start.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import write_tiny_store

RESULT = Path(__file__).parent / "results" / "start.json"
MANY = 512
RANK = """
import json, os, sys, time
marks = [("python", time.process_time(), 0, 0)]
def mark(name):
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    size = sum(map(os.path.getsize, filter(os.path.exists, files)))
    marks.append((name, time.process_time(), len(files), size))
mark("python")
import numpy, pydantic
mark("numpy and pydantic")
import torch
mark("torch")
import segfleet.slurm.rank
from segfleet.pipeline import jobs, ranks, stop
mark("segfleet and scipy")
from segfleet.pipeline.training import train
original = train.build
def build(context, index):
    mark("recipe, store and checks")
    engine, before = original(context, index)
    mark("network and engine")
    step = engine.step
    def first(*words):
        mark("log, trackers and loader")
        done = step(*words)
        mark("first step")
        print(json.dumps(marks[1:]))
        sys.stdout.flush()
        os._exit(0)
    engine.step = first
    return engine, before
train.build = build
from segfleet.pipeline.launch.job import parse_job
job = parse_job(json.loads(sys.argv[1]))
jobs.run_job(job, ranks.Ranks(torch.device("cpu")), stop.StopRequest())
"""


def one_rank(engine: dict) -> list[dict]:
    """The parts of a start, one after the other."""
    with tempfile.TemporaryDirectory() as scratch:
        from segfleet.pipeline.launch.job import Train
        from segfleet.pipeline.recipe import parse

        store = write_tiny_store(Path(scratch) / "store", 2, "zarr", 6, 2, 24, 1)
        document = {
            "name": "start",
            "data": {"store": str(store), "batch": 4, "patch": [16, 16], "workers": 0},
            "model": {"name": "unet_lite_standard", "options": {"width": 4}},
            "stages": [{"epochs": 1, "steps": 2, "lr": 1e-2}],
            "engine": engine,
        }
        job = Train(recipe=parse(document).model_dump(mode="json"), root=scratch)
        done = subprocess.run(
            [sys.executable, "-P", "-c", RANK, job.model_dump_json()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    parts, before = [], (0.0, 0, 0)
    for name, *now in json.loads(done.stdout.splitlines()[-1]):
        cpu, files, size = (a - b for a, b in zip(now, before, strict=True))
        parts.append({"part": name, "cpu_s": round(cpu, 3), "files": files, "bytes": size})
        before = now
    return parts


def meet(size: int) -> dict:
    """So many ranks in this machine find each other; CPU seconds are a rank's mean."""
    import torch.distributed as dist
    from cables import in_processes

    from segfleet.pipeline import ranks
    from segfleet.pipeline.launch import rendezvous

    looks = [0]
    lstat = os.lstat

    def counted(path, **options):
        looks[0] += str(path).endswith("address")
        return lstat(path, **options)

    def rank(number: int):
        def work(folder: Path) -> dict[str, float]:
            os.lstat = counted
            at = [time.process_time()]
            store = rendezvous.join(folder / "address", number, size, "127.0.0.1", ranks.TIMEOUT)
            at.append(time.process_time())
            ranks.check_devices(number, size, store, [f"node{number}", "cpu"])
            at.append(time.process_time())
            dist.init_process_group(
                "gloo", store=store, rank=number, world_size=size, timeout=ranks.TIMEOUT
            )
            at.append(time.process_time())
            rendezvous.prove(dist.group.WORLD, number, size, store)
            at.append(time.process_time())
            names = ("address and store", "places", "mesh of connections", "proof")
            spent = dict(zip(names, np.diff(at).tolist(), strict=True))
            return {**spent, "looks for the address": looks[0]}

        return work

    start = time.monotonic()
    found = in_processes([rank(number) for number in range(size)])
    wall = time.monotonic() - start
    mean = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
    return {"ranks": size, "wall_s": round(wall, 2), **mean}


def extrapolated(rows: list[dict]) -> dict[str, float]:
    """CPU seconds of a rank among 512, by a straight line; what does not grow keeps its mean."""
    sizes = [row["ranks"] for row in rows]
    found = {}
    for name in ("address and store", "places", "mesh of connections", "proof"):
        slope, base = np.polyfit(sizes, [row[name] for row in rows], 1)
        flat = float(np.mean([row[name] for row in rows]))
        found[name] = round(max(flat, float(base + slope * MANY)), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--meet", type=int, nargs="*", default=[8, 16, 32, 64])
    options = parser.parse_args()
    engines = {"ddp": {"name": "ddp"}, "zero1": {"name": "deepspeed", "options": {"zero": 1}}}
    document = {}
    for name, engine in engines.items():
        document[f"one rank, {name}"] = one_rank(engine)
        for part in document[f"one rank, {name}"]:
            print(name, part, flush=True)
    rows = []
    for size in options.meet:
        rows.append(meet(size))
        print(rows[-1], flush=True)
    document |= {"ranks that meet": rows, f"CPU seconds of a rank of {MANY}": extrapolated(rows)}
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document[f"CPU seconds of a rank of {MANY}"], indent=1))


if __name__ == "__main__":
    main()
