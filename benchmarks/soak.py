"""Many steps with loader processes: memory and descriptors of every process stay flat.

    python benchmarks/soak.py [--steps 20000] [--minutes 60]

The smallest network and patch on a tiny store, one rank, two loader processes, logs and a
checkpoint every 500 steps. Every five seconds all processes of the command are looked at. Growth is
that of the medians of the third and the last quarter of the samples: the first half warms caches
up. Descriptors of batches on their way are counted apart: there are between 5 and 20 of them, as
the loader happens to be ahead, so their median moves by one or two; all others stay exactly.
--minutes ends it in order before all steps are done; the result says how many were.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from conftest import write_tiny_store  # noqa: E402

EPOCH = 500  # steps
# of two loader processes and the rank: shared memory, and the sockets that hand its numbers over
BATCH = ("/dev/shm/torch_", "socket:")
ON_THEIR_WAY = 8  # descriptors: two batches of two tensors each that either process is ahead
NETWORK = {
    "features": [2, 2],
    "strides": [[1, 1], [2, 2]],
    "kernels": [[3, 3], [3, 3]],
    "conv_per_stage": [1, 1],
    "conv_per_decoder": [1],
}


def look(process: subprocess.Popen) -> tuple[int, int, int, int] | None:
    """(processes, bytes that are theirs alone, descriptors of batches on their way, all others).
    Not their share of what is shared: that grows as other programs on the machine end."""
    count = memory = batches = others = 0
    with suppress(psutil.Error, OSError):
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
            with suppress(psutil.Error, OSError):
                memory += one.memory_full_info().uss
                count += 1
                for name in os.listdir(f"/proc/{one.pid}/fd"):
                    with suppress(FileNotFoundError):
                        link = os.readlink(f"/proc/{one.pid}/fd/{name}")
                        batches += link.startswith(BATCH)
                        others += not link.startswith(BATCH)
    return (count, memory, batches, others) if count else None


def last_step(runs: Path) -> int:
    steps = [0]
    for path in runs.rglob("events.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                steps.append(json.loads(line).get("step", 0))
    return max(steps)


def main(steps: int, minutes: float) -> int:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        work = Path(name)
        store = write_tiny_store(work / "store", 2, "zarr", 6, 1, 24, 1)
        recipe = {
            "name": "soak",
            "data": {"store": str(store), "batch": 1, "patch": [8, 8], "workers": 2},
            "model": {"name": "plain_unet_2d", "options": NETWORK},
            "evaluation": {"every": 0},
            "save_every": EPOCH,
            "stages": [{"epochs": max(1, steps // EPOCH), "steps": EPOCH, "lr": 1e-4}],
        }
        (work / "soak.yaml").write_text(yaml.safe_dump(recipe))
        words = [sys.executable, "-m", "segfleet.cli.main", "train", str(work / "soak.yaml")]
        process = subprocess.Popen(
            [*words, "--runs", str(work / "runs"), "--max-time", str(minutes / 60)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "SEGFLEET_DEVICE": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        samples, begin, warm = [], time.monotonic(), False
        while process.poll() is None:
            warm = warm or last_step(work / "runs") >= EPOCH // 5
            if warm and (found := look(process)):
                samples.append(found)
            time.sleep(5)
        done = last_step(work / "runs")
        if process.returncode not in (0, 75):
            raise SystemExit(process.stderr.read())
        settled = [
            sample for sample in samples if sample[0] == statistics.mode(s[0] for s in samples)
        ]
        quarter = len(settled) // 4
        third, last = settled[2 * quarter : 3 * quarter], settled[3 * quarter :]

        def growth(place: int) -> float:
            before = statistics.median(sample[place] for sample in third)
            return statistics.median(sample[place] for sample in last) - before

        result = {
            "steps": done,
            "seconds": round(time.monotonic() - begin),
            "cpu_minutes": round(sum(os.times()[:4]) / 60, 1),
            "samples": len(settled),
            "processes": settled[-1][0],
            "MiB": round(settled[-1][1] / 2**20),
            "MiB_grown": round(growth(1) / 2**20, 2),
            "descriptors": settled[-1][3],
            "descriptors_grown": growth(3),
            "descriptors_of_batches": max(sample[2] for sample in settled),
            "descriptors_of_batches_grown": growth(2),
        }
    (HERE / "results" / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    flat = result["MiB_grown"] < 0.02 * result["MiB"] and result["descriptors_grown"] < 1
    return 0 if flat and result["descriptors_of_batches_grown"] < ON_THEIR_WAY else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    sys.exit(main(options.steps, options.minutes))
