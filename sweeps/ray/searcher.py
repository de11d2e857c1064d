"""What Ray Tune asks what to run next, and what to stop."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from segfleet.sweeps.search.tree_search import FINISHED, TreeSearch


class TreeSearcher(Searcher):
    """The tree's search as a searcher of Tune's. Tune keeps nothing of it: the tree on disk is the
    state."""

    def __init__(self, search: TreeSearch):
        super().__init__(metric="dice", mode="max")
        self.search = search

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        order = self.search.next(trial_id)
        if order == FINISHED:
            return Searcher.FINISHED
        return order and {"node": order.node, "order": order.model_dump_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler gets it too, and decides."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.search.ended(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class TreeScheduler(FIFOScheduler):
    """Stops what the tree's search stops."""

    def __init__(self, search: TreeSearch):
        super().__init__()
        self.search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "epochs" not in result or "state" in result:
            return self.CONTINUE
        stop = self.search.validated(trial.trial_id, result["epochs"], result["dice"])
        return self.STOP if stop else self.CONTINUE
