"""Points from Optuna's sampler. What it suggested stands in points.jsonl, so a restart knows all of
it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

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
    that point's score once more and asked for another. With forks, so many points in a row share
    the values of the first stage: it is trained once for all of them.
    """

    def __init__(self, plan: Plan, ledger: Ledger):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = plan.search.space
        self.plan, self.ledger, self.axes = plan, ledger, plan.search.axes
        self.domains = {axis.label: domain(axis) for axis in self.axes}
        self.known: dict[str, list[Trial]] = {}  # point -> its trials
        for trial in plan.trials:  # of an earlier run of the sweep
            self.known.setdefault(key_of(trial.point), []).append(trial)
        self.known |= {key_of(point): [] for point, _ in plan.misfits}
        # points whose score Optuna does not know yet, and its own trials of them
        self.waiting: list[tuple[Point, optuna.Trial | None]] = [
            (json.loads(key), None) for key in self.known
        ]
        # Another seed for every restart: the same one would draw the same points again.
        seed = random.Random(f"{space.seed} {len(self.known)}").getrandbits(32)
        self.study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self.forked: dict[str, Any] = {}  # values of the first stage that the next points share
        self.forks = len(self.known) % space.forks

    def __call__(self) -> bool:
        if self.plan.complete or (found := self.new_point()) is None:
            return False
        point, trial = found
        self.known[key_of(point)] = self.plan.grow(point)
        self.waiting.append((point, trial))
        self.forks = (self.forks + 1) % self.plan.search.space.forks
        early = [axis for axis in self.axes if axis.stage == 0]
        self.forked = {axis.label: place_of(axis, point[axis.label]) for axis in early}
        return True

    def new_point(self) -> tuple[Point, optuna.Trial | None] | None:
        """A point that is not known yet. If Optuna keeps to known ones: the next of a finite space,
        or None."""
        for attempt in range(ASKED):
            self.tell()
            if self.forks and self.forked and attempt < ASKED // 2:
                self.study.enqueue_trial(self.forked)
            trial = self.study.ask(self.domains)
            point = {axis.label: value_at(axis, trial.params[axis.label]) for axis in self.axes}
            if key_of(point) not in self.known:
                return point, trial
            self.waiting.append((point, trial))
        if math.isinf(self.plan.search.size):
            return None
        points = self.plan.search.every_point()
        return next((point, None) for point in points if key_of(point) not in self.known)

    def tell(self) -> None:
        """Scores of the points that have ended since the last time."""
        still = []
        for point, trial in self.waiting:
            score = score_of(self.ledger, self.known[key_of(point)])
            if score is None:
                still.append((point, trial))
            elif trial is not None:
                self.study.tell(trial, score)
            else:
                params = {axis.label: place_of(axis, point[axis.label]) for axis in self.axes}
                self.study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=self.domains, value=score
                    )
                )
        self.waiting = still


def key_of(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def domain(axis: Axis) -> BaseDistribution:
    """The axis for Optuna. Values of a list go by their place: Optuna cannot hold mappings."""
    if axis.continuous:
        low, high = axis.values
        return FloatDistribution(low, high, log=axis.kind == "loguniform")
    return CategoricalDistribution(list(range(len(axis.values))))


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
        elif state in ("failed", "pruned", "paused", "lost"):
            return FAILED
        else:
            return None
    return sum(scores) / len(scores)
