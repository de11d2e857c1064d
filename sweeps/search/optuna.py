"""Points from Optuna's sampler. What it suggested stands in points.jsonl, so a restart knows all of
it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import optuna

from segfleet.core.errors import InputError
from segfleet.pipeline.run import DONE
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.measured import Values, means_of, values_of
from segfleet.sweeps.space.distributions import domain, place_of, value_at
from segfleet.sweeps.space.plan import Plan
from segfleet.sweeps.space.space import Point, Search, Trial
from segfleet.sweeps.space.warm import warm_points

ASKED = 30  # times, at most, for a point that is not known yet
ENDS = "it ends with a score"  # a constraint that a failed point violates
FAR = 1e6  # by so much: more than any real one


class Suggestions:
    """Call it for one more point: it asks Optuna, adds the point's trials to the tree, and says
    False when budget or space are used up. A point that does not fit together is a failed one.

    Before every question, Optuna gets the objectives of the points that have ended since, means
    over the replicates, and how far they violate the constraints. A point that it suggests again is
    no new one: it gets that point's score once more and is asked for another. With forks, so many
    points in a row share the values of the first stage: it is trained once for all of them.
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
        self.study = study_of(plan.search, seed)
        for point, values in warm_points(plan.search, plan.runs)[0]:
            self.study.add_trial(finished_trial(plan.search, point, self.domains, values))
        self.forked: dict[str, Any] = {}  # values of the first stage that the next points share
        self.forks = len(self.known) % space.forks

    def __call__(self) -> bool:
        if self.plan.complete or (suggestion := self.new_point()) is None:
            return False
        point, trial = suggestion
        self.known[key_of(point)] = self.plan.grow(point)
        self.waiting.append((point, trial))
        self.forks = (self.forks + 1) % self.plan.search.space.forks
        early = [axis for axis in self.axes if axis.stage == 0]
        self.forked = {axis.label: place_of(axis, point[axis.label]) for axis in early}
        return True

    def new_point(self) -> tuple[Point, optuna.Trial | None] | None:
        """A point that is not known yet: one of `candidates`, the cheaper the likelier. If Optuna
        keeps to known ones: the next of a finite space, or None."""
        drawn = [self._draw() for _ in range(self.plan.search.space.candidates)]
        latest = {
            key_of(drawing[0]): drawing for drawing in drawn if drawing
        }  # of the same point, the last trial
        if latest:
            chosen = self._cheap([point for point, _ in latest.values()])
            for drawing in drawn:
                if drawing and drawing is not latest[key_of(chosen)]:
                    self.study.tell(drawing[1], state=optuna.trial.TrialState.FAIL)
            return latest[key_of(chosen)]
        if math.isinf(self.plan.search.size):
            return None
        points = self.plan.search.every_point()
        return next(((point, None) for point in points if key_of(point) not in self.known), None)

    def _draw(self) -> tuple[Point, optuna.Trial] | None:
        """A point that is not known yet, as Optuna suggests it."""
        for attempt in range(ASKED):
            self.tell()
            if self.forks and self.forked and attempt < ASKED // 2:
                self.study.enqueue_trial(self.forked)
            trial = self.study.ask(self.domains)
            point = {axis.label: value_at(axis, trial.params[axis.label]) for axis in self.axes}
            if key_of(point) not in self.known:
                return point, trial
            self.waiting.append((point, trial))
        return None

    def _cheap(self, points: Sequence[Point]) -> Point:
        """One of the points, at odds of one over the epochs that it adds to the tree: every draw of
        Optuna's is worth the same, so what is spent on each is, too."""
        if len(points) == 1:
            return points[0]
        prices = [self._price(point) for point in points]
        fitting = [(1 / max(1, price), i) for i, price in enumerate(prices) if price is not None]
        if not fitting:
            return points[0]
        odds, places = zip(*fitting, strict=True)
        draws = random.Random(f"{self.plan.search.space.seed} {len(self.known)} price")
        return points[draws.choices(places, odds)[0]]

    def _price(self, point: Point) -> int | None:
        """Epochs that a point adds to what is still to be trained; None if it makes no recipe."""
        runs = self.plan.runs
        try:
            return self.plan.tree.price(
                self.plan.trials_at(point), lambda path: (runs / path / DONE).exists()
            )
        except InputError:
            return None

    def tell(self) -> None:
        """The objectives of the points that have ended since the last time."""
        still = []
        for point, trial in self.waiting:
            ended, values = values_at(self.plan.search, self.ledger, self.known[key_of(point)])
            if not ended:
                still.append((point, trial))
                continue
            if trial is not None:  # of this session; a finished trial says all that it stands for
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.study.add_trial(finished_trial(self.plan.search, point, self.domains, values))
        self.waiting = still


def study_of(search: Search, seed: int) -> optuna.Study:
    """A study in memory, with TPE: it takes several objectives, constraints and what others
    measured."""
    return optuna.create_study(
        directions=[
            "maximize" if objective.sign > 0 else "minimize" for objective in search.objectives
        ],
        sampler=optuna.samplers.TPESampler(seed=seed),
    )


def finished_trial(
    search: Search, point: Point, domains: dict[str, Any], values: Values | None
) -> optuna.trial.FrozenTrial:
    """A point as a finished trial. `values` None: it failed, which is a constraint that it
    violates, so that no worst value has to be made up."""
    axes = [axis for axis in search.axes if axis.label in point]
    measured = {
        objective.name: (values or {}).get(objective.name) for objective in search.objectives
    }
    failed = None in measured.values()
    constraints = {ENDS: FAR if failed else 0.0}
    for constraint in search.constraints:
        amount = constraint.violation((values or {}).get(constraint.objective.name))
        constraints[constraint.name] = 0.0 if failed else amount
    return optuna.trial.create_trial(
        params={axis.label: place_of(axis, point[axis.label]) for axis in axes},
        distributions={axis.label: domains[axis.label] for axis in axes},
        values=[0.0] * len(measured) if failed else [float(v) for v in measured.values()],
        constraints=constraints,
    )


def key_of(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def values_at(
    search: Search, ledger: Ledger, trials: Sequence[Trial]
) -> tuple[bool, Values | None]:
    """Whether a point has ended, and the means over its trials; no values: one of them never ends,
    or the point makes none."""
    if not trials:
        return True, None
    values = []
    for trial in trials:
        node = ledger.tree.nodes[ledger.tree.leaves[trial.number]]
        state = ledger.state(node)
        if state == "done":
            values.append(values_of(search, ledger, node))
        elif state in ("failed", "pruned", "paused", "lost"):
            return True, None
        else:
            return False, None
    return True, means_of(values)
