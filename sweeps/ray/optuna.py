"""Points from Optuna, through Ray Tune's OptunaSearch. What it suggested stands in points.jsonl, so
a restart knows all of it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.plan import Plan
from segfleet.sweeps.space.population import FAILED
from segfleet.sweeps.space.space import Axis, Point, Trial

ASKED = 30  # times, at most, for a point that is not known yet


class Suggestions:
    """Call it for one more point: it asks Optuna, adds the point's trials to the tree, and says
    False when budget or space are used up. A point that does not fit together is a failed one.

    Before every question, Optuna is told the scores of the points that have ended since; the score
    is the mean Dice of the replicates. A point that it suggests again is no new one: it is told
    that point's score once more and asked for another.
    """

    def __init__(self, plan: Plan, ledger: Ledger):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = plan.search.space
        self.plan, self.ledger = plan, ledger
        self.axes = plan.search.axes
        self.asked = 0
        self.known: dict[str, list[Trial]] = {}  # point -> its trials
        for trial in plan.trials:  # of an earlier run of the sweep
            self.known.setdefault(key_of(trial.point), []).append(trial)
        self.known |= {key_of(point): [] for point, _ in plan.misfits}
        # Optuna's id, or a name of ours -> trials
        self.waiting = {f"old-{key}": trials for key, trials in self.known.items()}
        # Another seed for every restart: the same one would draw the same points again.
        self.search = OptunaSearch(
            seed=random.Random(f"{space.seed} {len(self.known)}").getrandbits(32)
        )
        self.search.set_search_properties(
            "score", "max", {axis.label: domain(axis) for axis in self.axes}
        )

    def __call__(self) -> bool:
        if self.plan.complete or (found := self.new_point()) is None:
            return False
        name, point = found
        self.waiting[name] = self.known[key_of(point)] = self.plan.grow(point)
        return True

    def new_point(self) -> tuple[str, Point] | None:
        """A point that is not known yet, with its name here. If Optuna keeps to known ones: the
        next of a finite space, or None."""
        for _ in range(ASKED):
            self.tell()
            self.asked += 1
            name = f"new-{self.asked}"
            flat = self.search.suggest(name)
            point = {axis.label: value_at(axis, flat[axis.label]) for axis in self.axes}
            if key_of(point) not in self.known:
                return name, point
            self.waiting[name] = self.known[key_of(point)]
        if math.isinf(self.plan.search.size):
            return None
        return next(
            (f"old-{key_of(point)}", point)
            for point in self.plan.search.every_point()
            if key_of(point) not in self.known
        )

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
                point = json.loads(name.removeprefix("old-"))
                self.search.add_evaluated_point(
                    {axis.label: place_of(axis, point[axis.label]) for axis in self.axes}, score
                )


def key_of(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


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
    """Mean Dice of a point's trials; None while one of them can still run; FAILED if one never
    ends, or the point makes none."""
    if not trials:
        return FAILED
    scores = []
    for trial in trials:
        node = ledger.tree.nodes[ledger.tree.leaves[trial.number]]
        state = ledger.state(node)
        if state == "done":
            summary = evaluation_of(ledger.path(node))["summary"]
            scores.append(summary["mean_foreground_dice"] or 0.0)
        elif state in ("failed", "pruned", "lost"):
            return FAILED
        else:
            return None
    return sum(scores) / len(scores)
