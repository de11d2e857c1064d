"""A complete recipe for a store, a device and a budget of time, with a sentence beside every
choice.

Spacing and patch are the preprocessing planner's (nnU-Net's rules, `preprocess/planning/plan.py`),
the network's stages those of `models/nnunet/topology.py`. What cannot be known from the data is
measured: a few steps on the device say how long a step takes and what it holds.
"""

from __future__ import annotations

from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.core.files import absolute
from segfleet.pipeline.parts import check_recipe
from segfleet.pipeline.planning.cpu import for_cpu
from segfleet.pipeline.planning.gpu import for_gpu
from segfleet.pipeline.planning.planned import Planned
from segfleet.pipeline.planning.target import parse_budget, parse_device
from segfleet.preprocess.stores.manifest import load_manifest


def plan_recipe(
    store: Path, device: str | None = None, budget: str | None = None, measure_steps: int = 3
) -> Planned:
    """A recipe for the store. `budget`: of one run, with its score; by default 30 min on CPUs and a
    day on a GPU. Raises InputError for what cannot be planned."""
    manifest, target = load_manifest(Path(store)), parse_device(device)
    seconds = parse_budget(budget or ("30min" if target.kind == "cpu" else "1d"))
    if not manifest.cases:
        raise InputError(f"plan: {store} holds no case")
    make = for_cpu if target.kind == "cpu" else for_gpu
    planned = make(manifest, absolute(store), target, seconds, measure_steps)
    check_recipe(planned.recipe(), manifest)
    return planned
