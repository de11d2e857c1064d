"""What the training loop costs on top of a bare PyTorch loop: same network, same tensors, same
optimizer, logging on.

    python benchmarks/step_overhead.py

Both loops run in this process, turn about, on batches already in memory; medians of CPU seconds per
step. Target: at most 3 % more.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from segfleet.pipeline import run
from segfleet.pipeline.data import loader
from segfleet.pipeline.parts import Objective, build_network
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.task import make_task
from segfleet.pipeline.training.train import Run, train
from segfleet.preprocess.stores.base import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import write_tiny_store

STEPS, ROUNDS = 40, 7
RESULT = Path(__file__).parent / "results" / "step_overhead.json"


def recipe_of(store: Path):
    return parse(
        {
            "name": "overhead",
            "data": {"store": str(store), "batch": 2, "augment": None, "patch": [32, 32, 32]},
            "model": {
                "name": "plain_unet_3d",
                "options": {"features": [16, 32, 64], "deep_supervision": False},
            },
            "stages": [{"epochs": 1, "steps": STEPS, "lr": 1e-3}],
            "engine": {"precision": "bf16"},
            "save_every": 10**6,
        }
    )


def bare(recipe, store, batches) -> None:
    """What one would write by hand."""
    task = make_task(store.manifest.dataset)
    model = build_network(recipe, store.manifest, task).to(memory_format=torch.channels_last_3d)
    objective = Objective(recipe, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for batch in batches:
        image = batch.image.contiguous(memory_format=torch.channels_last_3d)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(image)
        loss = objective(output, batch.label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()


def ours(recipe, store, folder) -> None:
    folders = run.stage_folders(folder, recipe, store.manifest)
    never, nothing = (lambda: False), (lambda engine, settings: {})
    train(
        Run(
            recipe=recipe,
            stores=lambda settings: store,
            folders=folders,
            ranks=Ranks(),
            asked_to_stop=never,
            warn=print,
            validate=nothing,
        )
    )


def timed(work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = open_store(write_tiny_store(Path(scratch) / "store", 3, "zarr", 6, 2, 40, 1))
        recipe = recipe_of(store.root)
        kept: list[loader.Batch] = []
        original = loader.batches
        loader.batches = lambda patches, schedule, workers: (
            iter(kept) if kept else record(original(patches, schedule, workers), kept)
        )
        ours(recipe, store, Path(scratch) / "warm-up")
        bare(recipe, store, kept)
        rows = []
        for round_ in range(ROUNDS):
            pair = {"bare": timed(lambda: bare(recipe, store, kept))}
            pair["segfleet"] = timed(
                lambda name=f"runs{round_}": ours(recipe, store, Path(scratch) / name)
            )
            rows.append(pair)
    result = {
        "steps": STEPS,
        "rounds": ROUNDS,
        "bare_cpu_ms": statistics.median(row["bare"][1] for row in rows) * 1e3,
        "segfleet_cpu_ms": statistics.median(row["segfleet"][1] for row in rows) * 1e3,
        "cpu_ratio": statistics.median(row["segfleet"][1] / row["bare"][1] for row in rows),
        "wall_ratio": statistics.median(row["segfleet"][0] / row["bare"][0] for row in rows),
        "target": "at most 1.03",
        "note": "set-up, event log, TensorBoard file and the final checkpoint of every run are "
        "counted in",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def record(batches, kept):
    for batch in batches:
        kept.append(batch)
        yield batch


if __name__ == "__main__":
    main()
