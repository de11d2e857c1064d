"""What a sweep will cost: epochs, hours at the rate of past runs, bytes on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segfleet.core.files import read_json
from segfleet.pipeline.events import read_events
from segfleet.pipeline.run import run_folders
from segfleet.pipeline.stage_data import stage_steps
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.plan import Plan
from segfleet.sweeps.space.tree import StageNode


def estimate(plan: Plan, slots: int) -> dict[str, Any]:
    """Epochs naive and shared, what is left of them, hours and bytes where they can be known."""
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    missing = [node for node in plan.tree.nodes.values() if not ledger.complete(node)]
    rates = past_rates(plan.runs)
    seconds = [_seconds(plan, node, rates) for node in missing]
    hours = sum(seconds) / 3600 if None not in seconds else None
    longest = max((plan.tree.remaining[node.uid] for node in missing), default=0)
    share = longest / max(1, sum(plan.tree.epochs(node) for node in missing))
    return {
        "trials": len(plan.trials),
        "nodes": len(plan.tree.nodes),
        "stage_trainings_naive": sum(len(trial.recipe.stages) for trial in plan.trials),
        "epochs_naive": plan.tree.naive_epochs,
        "epochs_shared": plan.tree.shared_epochs,
        "ratio": round(plan.tree.naive_epochs / max(1, plan.tree.shared_epochs), 3),
        "nodes_missing": len(missing),
        "epochs_missing": sum(plan.tree.epochs(node) for node in missing),
        "trial_hours": hours if hours is None else round(hours, 3),
        "hours": hours if hours is None else round(max(hours / slots, hours * share), 3),
        "disk_bytes": sum(map(_bytes(plan), plan.tree.nodes.values())),
    }


def past_rates(runs: Path) -> dict[str, float]:
    """Seconds per optimizer step of like runs: network, patch, batch and precision -> the latest
    figure."""
    by_kind: dict[str, float] = {}
    for folder in run_folders(runs):
        recipe = read_json(folder / "recipe.json")
        if recipe is None:
            continue
        steps = [event for event in read_events(folder) if event["event"] == "step"]
        if rates := [
            recipe["data"]["batch"] / rate
            for event in steps[1:] or steps
            if (rate := event.get("samples_per_second"))
        ]:
            by_kind[_kind(recipe)] = sum(rates) / len(rates)
    return by_kind


def _kind(recipe: dict[str, Any]) -> str:
    data, engine = recipe["data"], recipe["engine"]
    return json.dumps(
        [recipe["model"], data["patch"], data["batch"], engine["precision"]], sort_keys=True
    )


def _seconds(plan: Plan, node: StageNode, rates: dict[str, float]) -> float | None:
    rate = rates.get(_kind(node.recipe.model_dump(mode="json")))
    steps = stage_steps(node.recipe, plan.stores)[-1]
    return None if rate is None else rate * steps * plan.tree.epochs(node)


def _bytes(plan: Plan):
    """node -> bytes of its last checkpoint: weights, moments and average, 4 bytes each."""
    sizes: dict[str, int] = {}

    def size(node: StageNode) -> int:
        recipe = node.recipe
        key = json.dumps([recipe.model.model_dump(), recipe.data.store])
        if key not in sizes:
            sizes[key] = _parameters(plan, node)
        groups = 1 + (1 if recipe.optimizer.name == "sgd" else 2) + (recipe.engine.ema > 0)
        return 4 * sizes[key] * groups

    return size


def _parameters(plan: Plan, node: StageNode) -> int:
    import torch

    from segfleet.models.registry import count_parameters
    from segfleet.pipeline.parts import build_network
    from segfleet.pipeline.task import make_task

    manifest = plan.stores(node.recipe)
    with torch.device("meta"):
        return count_parameters(
            build_network(
                node.recipe, manifest, make_task(manifest.dataset, node.recipe.model.head)
            )
        )
