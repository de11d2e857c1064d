"""Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934) along the paths of the tree.

A rung stands at grace * factor^k epochs along a path; a node counts at the rungs of its own epochs,
its parents at theirs. `stopping`: a node whose Dice at a rung is not among the best 1 / factor so
far ends there. `promotion`: every node pauses at its next rung, and the best 1 / factor of a rung
continue from where they stand; nothing is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from segfleet.pipeline.events import read_events
from segfleet.sweeps.order import Order
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.space import Asha
from segfleet.sweeps.space.tree import StageNode


class Rungs:
    """Dice of every node at every rung that it passed itself."""

    def __init__(self, options: Asha):
        self.grace, self.factor = options.grace, options.factor
        self.promotes = options.type == "promotion"
        self.values: dict[float, dict[str, float]] = {}  # rung -> node -> Dice

    def between(self, low: int, high: float) -> Iterator[float]:
        """Rungs above `low`, up to `high`."""
        rung = float(self.grace)
        while rung <= high:
            if rung > low:
                yield rung
            rung *= self.factor

    def record(self, uid: str, begin: int, epochs: int, dice: float) -> bool:
        """Note a validation of a node that starts at `begin`, `epochs` along the path; whether it
        is among the best of the highest rung that it reached with it."""
        fit = True
        for rung in self.between(begin, epochs):
            values = self.values.setdefault(rung, {})
            if uid not in values:
                fit = not values or dice >= cutoff(values.values(), self.factor)
                values[uid] = dice
        return fit

    def stops(self, node: StageNode, begin: int, epochs: int, dice: float) -> bool:
        """Whether the node ends with this validation. One at its last epoch is finished, not
        stopped."""
        fit = self.record(node.uid, begin, epochs, dice)
        return not (fit or self.promotes or epochs >= node.end)

    def pause_of(self, uid: str, begin: int, end: int) -> int | None:
        """With promotion: epochs along the path at which a node pauses next; None: not before its
        end."""
        if not self.promotes:
            return None
        passed = [rung for rung, values in self.values.items() if uid in values]
        rung = next(self.between(max([begin, *passed]), math.inf))
        return math.ceil(rung) if math.ceil(rung) < end else None

    def promoted(self, paused: Iterable[str], least: int = 0) -> str | None:
        """The best paused node that may continue, of the highest rung that has one; of every rung
        at least the `least` best may."""
        waiting = set(paused)
        for rung in sorted(self.values, reverse=True):
            values = self.values[rung]
            best = sorted(values, key=lambda uid: (-values[uid], uid))
            for uid in best[: max(least, int(len(best) / self.factor))]:
                if uid in waiting:
                    return uid
            waiting -= values.keys()  # they stand at this rung, and are not good enough
        return None

    def remember(self, ledger: Ledger, order_of: Callable[[StageNode], Order]) -> None:
        """What stands on disk of nodes that an earlier run of the sweep trained."""
        for node in ledger.tree.nodes.values():
            path = ledger.path(node)
            if path.exists():
                order = order_of(node)
                for epochs, dice in validations(path, order):
                    self.record(node.uid, order.begin + order.start, epochs, dice)


def cutoff(values: Iterable[float], factor: float) -> float:
    """What a value must reach to be among the best 1 / factor, by linear interpolation."""
    ranked = sorted(values)
    place = (1 - 1 / factor) * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def validations(path: Path, order: Order) -> list[tuple[int, float]]:
    """(epochs along the path, Dice) of a node's validations."""
    events = [event for event in read_events(path) if event["event"] == "validation"]
    return [
        (order.begin + event["step"] // order.steps, event.get(order.measure) or 0.0)
        for event in events
    ]
