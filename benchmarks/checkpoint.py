"""What saving every 50 steps costs: the same training with and without it, turn about, in CPU time
and on the clock.

    python benchmarks/checkpoint.py

Network: plain 3D U-Net 16/32/64 (batch 2, 32 voxels cubed), its optimizer moments, fsync, sha256.
Target: at most 1 % of training time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from segfleet.pipeline import run
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.train import train
from segfleet.preprocess.stores.base import open_store

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from conftest import write_tiny_store  # noqa: E402

STEPS, ROUNDS, EVERY = 200, 5, 50


def timed(store, folder: Path, save_every: int) -> tuple[float, float]:
    recipe = parse(
        {
            "name": "saving",
            "data": {"store": str(store.root), "batch": 2, "augment": None, "patch": [32, 32, 32]},
            "model": {
                "name": "plain_unet_3d",
                "options": {"features": [16, 32, 64], "deep_supervision": False},
            },
            "stages": [{"epochs": 1, "steps": STEPS, "lr": 1e-3}],
            "engine": {"precision": "bf16"},
            "save_every": save_every,
        }
    )
    folders = run.stage_folders(folder, recipe, store.manifest)
    wall, cpu = time.perf_counter(), time.process_time()
    never, nothing = (lambda: False), (lambda engine, settings: {})
    train(
        Context(
            recipe=recipe,
            stores=lambda settings: store,
            folders=folders,
            ranks=Ranks(),
            asked_to_stop=never,
            warn=print,
            validate=nothing,
        )
    )
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = open_store(write_tiny_store(Path(scratch) / "store", 3, "zarr", 6, 2, 40, 1))
        timed(store, Path(scratch) / "warm", 10**6)
        rows = []
        for number in range(ROUNDS):
            never = timed(store, Path(scratch) / f"never{number}", 10**6)
            often = timed(store, Path(scratch) / f"often{number}", EVERY)
            rows.append((never, often))
    result = {
        "steps": STEPS,
        "save_every": EVERY,
        "rounds": ROUNDS,
        "cpu_seconds_without": statistics.median(never[1] for never, _ in rows),
        "cpu_ratio": statistics.median(often[1] / never[1] for never, often in rows),
        "wall_ratio": statistics.median(often[0] / never[0] for never, often in rows),
        "target": "at most 1.01",
        "note": "both save once at the end; the other saves three times more",
    }
    (HERE / "results" / "checkpoint.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
