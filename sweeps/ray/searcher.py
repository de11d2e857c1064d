"""What Ray Tune asks what to run next, and what to stop: nodes of the tree whose parents are
published, longest path first."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from segfleet.pipeline.events import read_events
from segfleet.sweeps.results.ledger import STOP, Ledger
from segfleet.sweeps.space.tree import StageNode

Grow = Callable[[], bool]  # adds a point to the tree; False when there are no more


class TreeSearcher(Searcher):
    """Suggests a ready node; None while all are waiting for a parent; FINISHED when nothing is
    left.

    order_of(node) -> what the trial gets; grow: asked when fewer than `slots` nodes are at work;
    deadline: of time.monotonic().
    """

    def __init__(
        self,
        ledger: Ledger,
        order_of: Callable[[StageNode], dict],
        *,
        slots: int = 1,
        grow: Grow | None = None,
        tick: Callable[[], None] = lambda: None,
        deadline: float | None = None,
    ):
        super().__init__(metric="dice", mode="max")
        self.ledger, self.order_of, self.slots, self.grow, self.tick, self.deadline = (
            ledger,
            order_of,
            slots,
            grow,
            tick,
            deadline,
        )
        self.running: dict[str, StageNode] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if (self.ledger.folder / STOP).exists() or (
            self.deadline and time.monotonic() > self.deadline
        ):
            return Searcher.FINISHED
        node = self.ledger.next()
        while node is None and self.grow and len(self.running) < self.slots:
            if not self.grow():
                self.grow = None
            node = self.ledger.next()
        if node is None:
            return None if self.running or self.ledger.open() else Searcher.FINISHED
        self.running[trial_id] = node
        order = self.order_of(node)
        return {
            "node": node.uid,
            "begin": order["begin"] + order["start"],
            "order": json.dumps(order),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.tick()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A node came back. Whether it is done stands on disk; the rest is noted there."""
        node = self.running.pop(trial_id)
        self.ledger.taken.discard(node.uid)
        state = (result or {}).get("state")
        if self.ledger.complete(node) or state in ("stopped", "busy"):
            pass
        elif state == "failed":
            self.ledger.mark(node, "failed", message=result["message"])
        elif error or state == "done":
            self.ledger.mark(
                node, "failed", message="the trial's process died, or ended without a result"
            )
        else:  # nobody ended it but the scheduler
            self.ledger.mark(
                node, "pruned", epochs=(result or {}).get("epochs"), dice=(result or {}).get("dice")
            )
        self.tick()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the tree on disk is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class PathAsha(AsyncHyperBandScheduler):
    """ASHA whose time axis is epochs along the path: a node counts at the rungs of its own epochs,
    its parents at theirs."""

    def on_trial_add(self, tune_controller, trial) -> None:
        super().on_trial_add(tune_controller, trial)
        for milestone, recorded in self._brackets[0]._rungs:
            if milestone <= trial.config["begin"]:
                # passed by its parents; no value of its own
                recorded[trial.trial_id] = float("nan")

    def remember(self, ledger: Ledger, order_of: Callable[[StageNode], dict]) -> None:
        """Values of nodes that an earlier run of the sweep finished or stopped."""
        for node in ledger.tree.nodes.values():
            if ledger.state(node) not in ("done", "pruned"):
                continue
            order = order_of(node)
            begin = order["begin"] + order["start"]
            seen = validations(ledger.path(node), order)
            for milestone, recorded in self._brackets[0]._rungs:
                values = [dice for epochs, dice in seen if epochs >= milestone]
                if milestone > begin and values:
                    recorded[node.uid] = values[0]


def validations(path: Path, order: dict[str, Any]) -> list[tuple[int, float]]:
    """(epochs along the path, Dice) of a node's validations."""
    found = [event for event in read_events(path) if event["event"] == "validation"]
    return [
        (order["begin"] + event["step"] // order["steps"], event["dice"] or 0.0) for event in found
    ]
