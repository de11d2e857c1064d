"""What the points of a sweep are worth, by its objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from segfleet.pipeline.events import read_events, trained_seconds
from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.objectives import Objective
from segfleet.sweeps.space.space import Search
from segfleet.sweeps.space.tree import StageNode

Values = dict[str, float | None]


def measures(search: Search) -> dict[str, Objective]:
    """The objectives and those of the constraints, each once, by name."""
    every = [*search.objectives, *(constraint.objective for constraint in search.constraints)]
    return {objective.name: objective for objective in every}


def values_of(
    search: Search, ledger: Ledger, leaf: StageNode, evaluation: Mapping[str, Any] | None = None
) -> Values:
    """The measures of a run that is scored; None where one is not defined."""
    document = evaluation or evaluation_of(ledger.path(leaf))
    values: Values = {}
    for name, objective in measures(search).items():
        if objective.metric == "gpu_hours":
            values[name] = gpu_hours(ledger, leaf)
        elif objective.metric == "epochs":
            values[name] = leaf.end
        else:
            values[name] = objective.of(document)
    return values


def means_of(runs: Sequence[Values]) -> Values:
    """Over the runs of a point; None where one of them has no value."""
    means: Values = {}
    for name in runs[0] if runs else ():
        defined = [run[name] for run in runs if run[name] is not None]
        means[name] = float(sum(defined)) / len(defined) if len(defined) == len(runs) else None
    return means


def violations(search: Search, values: Values) -> dict[str, float]:
    """Constraint -> by how much it is violated, those alone that are."""
    amounts = {
        constraint.name: constraint.violation(values.get(constraint.objective.name))
        for constraint in search.constraints
    }
    return {name: amount for name, amount in amounts.items() if amount > 0}


def gpu_hours(ledger: Ledger, leaf: StageNode) -> float:
    """Of the whole path: hours of every stage, pauses left out, times its ranks."""
    hours, node = 0.0, leaf
    while True:
        events = list(read_events(ledger.path(node)))
        ranks = next((event["ranks"] for event in reversed(events) if "ranks" in event), 1)
        hours += ranks * trained_seconds(events) / 3600
        if node.parent is None:
            return hours
        node = ledger.tree.nodes[node.parent]
