"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846) as a stage tree.

A generation of a member is a stage. When a generation has ended, the worst members continue from
the stages of one of the best, with other values; all others continue as they are. So a member that
is replaced copies nothing: its next stage is a child of its better's. What the next generation is
follows from the space's seed and the scores alone, so a sweep that was killed finds the same one.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence

from segfleet.core import settings
from segfleet.core.errors import InputError
from segfleet.pipeline.recipe import parse, with_absolute_store
from segfleet.sweeps.space.axis import Axis
from segfleet.sweeps.space.space import Point, Search, Trial, short
from segfleet.sweeps.space.tree import StageNode, StageTree

QUANTILE = 0.25  # of the members are replaced, by as many of the best
RESAMPLED = 0.25  # chance of a value to be drawn anew instead of being shifted
FACTORS = (0.8, 1.2)  # what a value is multiplied by
FAILED = -math.inf  # the score of a node that never ends: below any other

Walk = list[Point]  # a member's values, generation by generation
Score = Callable[[StageNode], float | None]  # None: not known yet


def grow(search: Search, tree: StageTree, score: Score) -> bool | None:
    """Add the next generation to the tree. None: one of the members has not ended yet; False:
    all generations are there, or no member is left."""
    pbt, generations = search.space.pbt, generations_of(search)
    last = list(tree.trials.values())[-pbt.population :]
    if not last:
        walks = first_generation(search)
    elif len(last[0].recipe.stages) == generations:
        return False
    else:
        scores = [score(tree.nodes[tree.leaves[trial.number]]) for trial in last]
        if None in scores:
            return None
        if max(scores) == FAILED:
            return False  # no member is left to continue from
        walks = next_generation(search, [list(trial.walk) for trial in last], scores)
    start = len(tree.trials)
    tree.add(
        trial_of(search, walk, number=start + member, member=member)
        for member, walk in enumerate(walks)
    )
    return True


def generations_of(search: Search) -> int:
    """Raises InputError if there is nothing between which to choose."""
    name, interval = search.space.name, search.space.pbt.interval
    first = {axis.label: axis.values[0] for axis in search.axes}
    epochs = search.trials(first)[0].recipe.stages[0].epochs
    if (generations := epochs // interval) < 2:
        raise InputError(
            f"sweep {name}: pbt: {epochs} epochs make {generations} generation(s) of {interval}, "
            "expected at least 2; change stages.0.epochs or pbt.interval"
        )
    return generations


def first_generation(search: Search) -> list[Walk]:
    draws = random.Random(search.space.seed)
    return [
        [{axis.label: axis.draw(draws) for axis in search.axes}]
        for _ in range(search.space.pbt.population)
    ]


def next_generation(search: Search, walks: list[Walk], scores: Sequence[float]) -> list[Walk]:
    """The members' values with one generation more. Members of equal score stand in their order."""
    order = sorted(range(len(walks)), key=lambda member: (-scores[member], member))
    replaced = min(math.ceil(len(walks) * QUANTILE), len(walks) // 2)
    failed = {member for member in order if scores[member] == FAILED}
    best = [member for member in order[:replaced] if member not in failed]
    worst = {*order[-replaced:], *failed}
    grown = []
    for member, walk in enumerate(walks):
        draws = random.Random(f"{search.space.seed} {len(walk)} {member}")
        if member in worst:
            better = walks[draws.choice(best)]
            grown.append([*better, explored(better[-1], search.axes, draws)])
        else:
            grown.append([*walk, walk[-1]])
    return grown


def explored(point: Point, axes: Sequence[Axis], draws: random.Random) -> Point:
    """Other values near a point's, inside what the space gives: continuous ones times 0.8 or 1.2,
    listed ones their neighbour."""
    values = {}
    for axis in axes:
        anew, up = draws.random() < RESAMPLED, draws.random() < 0.5
        if anew:
            values[axis.label] = axis.draw(draws)
        elif axis.continuous:
            value = point[axis.label] * FACTORS[up]
            values[axis.label] = min(max(value, axis.values[0]), axis.values[1])
        else:
            place = axis.values.index(point[axis.label]) + (1 if up else -1)
            values[axis.label] = axis.values[min(max(place, 0), len(axis.values) - 1)]
    return values


def trial_of(search: Search, walk: Walk, *, number: int, member: int) -> Trial:
    """A member's path so far as a trial. Raises InputError for values that make no recipe."""
    space, document = search.space, json.loads(json.dumps(search.base))
    stages = []
    for generation, point in enumerate(walk, 1):
        changed = json.loads(json.dumps(document))
        for label, value in point.items():
            settings.put(changed, label, value, f"sweep {space.name}: {label}")
        stages.append(
            {
                **changed["stages"][0],
                "epochs": space.pbt.interval,
                "name": f"generation {generation}",
                "inherit": "weights+optimizer",
            }
        )
    recipe = with_absolute_store(parse({**document, "stages": stages}, f"sweep {space.name}"))
    values = {label: " > ".join(short(point[label]) for point in walk) for label in walk[0]}
    seed, fold = (*space.seeds, recipe.seed)[0], (*space.folds, recipe.data.fold)[0]
    data = recipe.data.model_copy(update={"fold": fold})
    recipe = recipe.model_copy(update={"seed": seed, "data": data})
    return Trial(number=number, point={"member": member, **values}, recipe=recipe, walk=tuple(walk))
