"""What the training loop costs on top of a bare PyTorch loop: same network, same tensors, same
optimizer, logging on.

    python benchmarks/step_overhead.py

Both loops run in this process, on one thread, turn about, on batches already in memory, for a few
steps and for many. What a run costs once (opening the store, the log, TensorBoard's file, the last
checkpoint) and what each step costs are told apart by the difference. Medians of CPU seconds over
rounds. Target: a step costs at most 1 % more.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from segfleet.pipeline import run
from segfleet.pipeline.data import loader
from segfleet.pipeline.parts import Objective, build_network
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.task import make_task
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.train import train
from segfleet.preprocess.stores.base import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import write_tiny_store

FEW, MANY, ROUNDS = 20, 120, 7
RESULT = Path(__file__).parent / "results" / "step_overhead.json"


def recipe_of(store: Path, steps: int):
    return parse(
        {
            "name": "overhead",
            "data": {"store": str(store), "batch": 2, "augment": None, "patch": [32, 32, 32]},
            "model": {
                "name": "plain_unet_3d",
                "options": {"features": [16, 32, 64], "deep_supervision": False},
            },
            "stages": [{"epochs": 1, "steps": steps, "lr": 1e-3}],
            "engine": {"precision": "bf16"},
            "save_every": 10**6,
        }
    )


def bare(recipe, store, kept) -> None:
    """What one would write by hand."""
    task = make_task(store.manifest.dataset)
    model = build_network(recipe, store.manifest, task).to(memory_format=torch.channels_last_3d)
    objective = Objective(recipe, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for batch in itertools.islice(itertools.cycle(kept), recipe.stages[0].steps):
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


def timed(work) -> np.ndarray:
    """(CPU, wall) seconds."""
    before = time.process_time(), time.perf_counter()
    work()
    return np.array([time.process_time() - before[0], time.perf_counter() - before[1]])


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        store = open_store(write_tiny_store(Path(scratch) / "store", 3, "zarr", 6, 2, 40, 1))
        few, many = (recipe_of(store.root, steps) for steps in (FEW, MANY))
        kept: list[loader.Batch] = []
        original = loader.batches

        def batches(patches, schedule, workers):
            if kept:
                return itertools.islice(itertools.cycle(kept), len(schedule))
            return record(original(patches, schedule, workers), kept)

        loader.batches = batches
        ours(few, store, Path(scratch) / "warm-up")
        bare(few, store, kept)
        rows = []
        for turn in range(ROUNDS):
            folder = Path(scratch) / str(turn)
            rows.append(
                [
                    [timed(lambda r=recipe: bare(r, store, kept)) for recipe in (few, many)],
                    [
                        timed(lambda r=recipe, f=folder: ours(r, store, f / str(r.stages[0].steps)))
                        for recipe in (few, many)
                    ],
                ]
            )
    # (round, loop, length, clock) -> (round, loop, clock)
    seconds = np.array(rows)
    step = (seconds[:, :, 1] - seconds[:, :, 0]) / (MANY - FEW)
    once = seconds[:, :, 0] - FEW * step
    ratio = np.median(step[:, 1] / step[:, 0], axis=0)
    result = {
        "steps": [FEW, MANY],
        "rounds": ROUNDS,
        "bare_cpu_ms_a_step": np.median(step[:, 0, 0]) * 1e3,
        "segfleet_cpu_ms_a_step": np.median(step[:, 1, 0]) * 1e3,
        "cpu_ratio_of_a_step": ratio[0],
        "wall_ratio_of_a_step": ratio[1],
        "cpu_ratios": sorted(step[:, 1, 0] / step[:, 0, 0]),
        "target": "at most 1.01",
        "bare_cpu_ms_once": np.median(once[:, 0, 0]) * 1e3,
        "segfleet_cpu_ms_once": np.median(once[:, 1, 0]) * 1e3,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def record(batches, kept):
    for batch in batches:
        kept.append(batch)
        yield batch


if __name__ == "__main__":
    main()
