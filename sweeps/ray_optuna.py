"""Points from Optuna, through Ray Tune's OptunaSearch. What it suggested stands in points.jsonl, so a restart knows all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from segfleet.sweeps.ledger import EVALUATION, Ledger
from segfleet.sweeps.plan import POINTS, Plan, check
from segfleet.sweeps.space import Axis, Trial

FAILED = -1.0  # the score of a point that did not end: below any Dice


class Suggestions:
    """Call it for one more point: it asks Optuna, adds the point's trials to the tree, and says False when the budget is used up.

    Before every question, Optuna is told the scores of the points that have ended since; the score is the mean Dice of the replicates.
    """

    def __init__(self, plan: Plan, ledger: Ledger):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = plan.search.space
        self.plan, self.ledger, self.file = plan, ledger, plan.folder / POINTS
        self.axes = plan.search.axes
        self.left: int = space.budget.trials or 0
        self.waiting: dict[str, list[Trial]] = {}  # Optuna's id -> trials
        self.search = OptunaSearch(seed=space.seed)
        self.search.set_search_properties("score", "max", {axis.label: domain(axis) for axis in self.axes})
        for trial in plan.trials:  # of an earlier run of the sweep
            self.waiting.setdefault("old-" + json.dumps(trial.point, sort_keys=True), []).append(trial)
        self.left -= len(self.waiting)

    def __call__(self) -> bool:
        if self.left <= 0:
            return False
        self.tell()
        name = f"new-{self.left}"
        flat = self.search.suggest(name)
        point = {axis.label: value_at(axis, flat[axis.label]) for axis in self.axes}
        self.left -= 1
        self.waiting[name] = self.plan.grow(point)
        check(self.waiting[name], self.plan.stores)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        most = self.plan.search.space.budget.epochs
        if most and self.plan.tree.shared_epochs >= most:
            self.left = 0
        return True

    def tell(self) -> None:
        """Scores of the points that have ended since the last time."""
        for name, trials in list(self.waiting.items()):
            score = score_of(self.ledger, trials)
            if score is None:
                continue
            del self.waiting[name]
            if name.startswith("new-"):
                self.search.on_trial_complete(name, {"score": score})
            else:
                point = trials[0].point
                self.search.add_evaluated_point({axis.label: place_of(axis, point[axis.label]) for axis in self.axes}, score)


def domain(axis: Axis) -> Any:
    """The axis for Tune. Values of a list go by their place: Optuna cannot hold mappings."""
    if axis.continuous:
        return {"uniform": tune.uniform, "loguniform": tune.loguniform}[axis.kind](*axis.values)
    return tune.choice(list(range(len(axis.values))))


def value_at(axis: Axis, given: Any) -> Any:
    return given if axis.continuous else axis.values[given]


def place_of(axis: Axis, value: Any) -> Any:
    return value if axis.continuous else axis.values.index(value)


def score_of(ledger: Ledger, trials: Sequence[Trial]) -> float | None:
    """Mean Dice of a point's trials; None while one of them can still run; FAILED if one never ends."""
    scores = []
    for trial in trials:
        node = ledger.tree.nodes[ledger.tree.leaves[trial.number]]
        state = ledger.state(node)
        if state == "done":
            summary = json.loads((ledger.path(node) / EVALUATION).read_text(encoding="utf-8"))["summary"]
            scores.append(summary["mean_foreground_dice"] or 0.0)
        elif state in ("failed", "pruned", "lost"):
            return FAILED
        else:
            return None
    return sum(scores) / len(scores)
