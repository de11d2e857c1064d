"""Which node of the tree is trained next: one whose parent is published, longest path first."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from segfleet.sweeps.order import Order
from segfleet.sweeps.results.ledger import STOP, Ledger
from segfleet.sweeps.search.asha import Rungs
from segfleet.sweeps.space.plan import Plan
from segfleet.sweeps.space.tree import StageNode

# adds points to the tree: True; None: not before more is known; False: there are no more
Grow = Callable[[], bool | None]
FINISHED = "finished"


class TreeSearch:
    """Hands out nodes and is given what became of them.

    order_of(node) -> what the trial gets; grow: asked when fewer than `slots` nodes are at work;
    deadline: of time.monotonic().
    """

    def __init__(
        self,
        ledger: Ledger,
        order_of: Callable[[StageNode], Order],
        *,
        slots: int = 1,
        grow: Grow | None = None,
        rungs: Rungs | None = None,
        on_change: Callable[[], None] = lambda: None,
        deadline: float | None = None,
    ):
        self.ledger, self.order_of, self.slots, self.grow = ledger, order_of, slots, grow
        self.rungs, self.on_change, self.deadline = rungs, on_change, deadline
        self.running: dict[str, tuple[StageNode, Order]] = {}
        if rungs:
            rungs.remember(ledger, order_of)

    def next(self, name: str) -> Order | str | None:
        """An order for the trial `name`; None while all are waiting for a parent; FINISHED when
        nothing is left."""
        late = self.deadline and time.monotonic() > self.deadline
        if late or (self.ledger.folder / STOP).exists():
            return FINISHED
        node = self._promoted() or self.ledger.next()
        while node is None and self.grow and len(self.running) < self.slots:
            if (added := self.grow()) is None:
                break
            if not added:
                self.grow = None
            node = self.ledger.next()
        if node is None:
            if self.running or self.ledger.open():
                return None
            # no node is left that would make a rung large enough for a third of it to continue
            node = self._promoted(least=1)
        if node is None:
            return FINISHED
        order = self.order_of(node)
        if self.rungs:
            begin = order.begin + order.start
            if pause := self.rungs.pause_of(node.uid, begin, node.end):
                step = (pause - order.begin) * order.steps
                order = order.of_job(pause_at=step).model_copy(update={"pause": pause})
        self.running[name] = node, order
        return order

    def _promoted(self, least: int = 0) -> StageNode | None:
        paused = self.ledger.marked("paused")
        if self.rungs is None or (uid := self.rungs.promoted(paused, least)) is None:
            return None
        self.ledger.unmark(node := self.ledger.tree.nodes[uid], "paused")
        self.ledger.taken.add(uid)
        return node

    def validated(self, name: str, epochs: int, dice: float) -> bool:
        """A validation of a trial at work; whether it is to be stopped."""
        self.on_change()
        if self.rungs is None:
            return False
        node, order = self.running[name]
        return self.rungs.stops(node, order.begin + order.start, epochs, dice)

    def ended(self, name: str, result: dict[str, Any] | None, error: bool = False) -> None:
        """A node came back. Whether it is done stands on disk; the rest is noted there."""
        node, _ = self.running.pop(name)
        result = result or {}
        state = result.get("state")
        measured = {"epochs": result.get("epochs"), "dice": result.get("dice")}
        if self.ledger.complete(node) or state in ("stopped", "busy"):
            pass  # it stands on disk, or another process trains it
        elif state == "failed":
            self.ledger.mark(node, "failed", message=result["message"])
        elif state == "paused":
            self.ledger.mark(node, "paused", **measured)
        elif error or state == "done":
            self.ledger.mark(
                node, "failed", message="the trial's process died, or ended without a result"
            )
        else:  # only the scheduler can have ended it
            self.ledger.mark(node, "pruned", **measured)
        self.ledger.give_back(node)
        self.on_change()


def start(
    plan: Plan, resources: Any, progress: Callable[[int, int], None], seconds: float | None
) -> TreeSearch:
    """The search of a plan. `seconds`: after that no node is handed out, and those at work save and
    stop."""
    ledger, space = Ledger(plan.tree, plan.runs, plan.folder), plan.search.space
    deadline = time.monotonic() + seconds if seconds else None
    grow: Grow | None = None
    if space.search == "optuna":
        from segfleet.sweeps.search.optuna import Suggestions

        grow = Suggestions(plan, ledger)
    elif space.scheduler == "pbt":
        grow = plan.next_generation

    def order(node: StageNode) -> Order:
        prepared = plan.order(
            node,
            ranks=resources.ranks,
            threads=resources.threads,
            on=resources.on,
            options=resources.options or {},
        )
        if deadline:
            return prepared.of_job(max_seconds=max(1.0, deadline - time.monotonic()))
        return prepared

    def report_progress() -> None:
        progress(ledger.epochs_done(), plan.expected_epochs)

    report_progress()
    rungs = Rungs(space.asha) if space.scheduler == "asha" else None
    slots = resources.at_once
    return TreeSearch(
        ledger,
        order,
        slots=slots,
        grow=grow,
        rungs=rungs,
        on_change=report_progress,
        deadline=deadline,
    )
