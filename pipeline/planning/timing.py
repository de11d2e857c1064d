"""How long a step takes here, and what it holds."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass

import torch

from segfleet.pipeline.engines.base import autocast
from segfleet.pipeline.parts import Objective, build_network, patch_of, task_of
from segfleet.pipeline.recipe import Recipe
from segfleet.preprocess.stores.manifest import Manifest

BUSY = 1.6  # times its own computing that a step takes by the clock on cores that others use, too


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One optimizer step. `clock`: seconds by the clock, where others kept the cores busy and
    `seconds` is what the step's own computing takes of them."""

    seconds: float
    gigabytes: float | None  # None: not measured
    clock: float | None = None
    rough: bool = False  # of the first step alone, which was far too slow


def measure(
    recipe: Recipe,
    manifest: Manifest,
    device: torch.device,
    steps: int,
    enough: float = math.inf,
) -> Measured:
    """The fastest of a few optimizer steps on random patches, after one to warm up, unless that
    took more than `enough` seconds of computing: then it alone, so that planning for a small budget
    does not take longer than the budget; and the memory they held (of CPUs the growth of this
    process, or None if it did not grow). On CPUs that others use, too, its computing time over the
    threads: a plan outlives the hour in which it is made."""
    import psutil

    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    task = task_of(recipe, manifest)
    network = build_network(recipe, manifest, task).to(device).train()
    objective = Objective(recipe, task)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    patch = patch_of(recipe, manifest)
    size = (recipe.data.batch, *(patch[1:] if patch[0] == 1 else patch))
    generator = torch.Generator().manual_seed(0)
    channels = len(manifest.dataset.channels)
    image = torch.randn(size[0], channels, *size[1:], generator=generator).to(device)
    values = torch.tensor(sorted(manifest.dataset.labels.values()), dtype=torch.uint8)
    label = values[torch.randint(len(values), size, generator=generator)].to(device)
    times, shares, held = [], [], 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps + 1):
        begin, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        with autocast(recipe.engine.precision, device):
            output = network(image)
        loss = objective(output, label)
        held = max(held, process.memory_info().rss - before)  # all that backward needs
        loss.backward()
        optimizer.step()
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - begin)
        shares.append((time.process_time() - used) / torch.get_num_threads())
        if shares[0] > enough:
            break
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    rough = len(times) < steps + 1
    seconds, own, gigabytes = min(times[1:] or times), min(shares[1:] or shares), held / 1e9 or None
    if device.type == "cpu" and seconds > BUSY * own:
        return Measured(seconds=own, gigabytes=gigabytes, clock=seconds, rough=rough)
    return Measured(seconds=seconds, gigabytes=gigabytes, rough=rough)
