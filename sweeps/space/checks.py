"""What a space asks for in vain: axes that no stage reads, measures that are never taken."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from segfleet.core.errors import InputError
from segfleet.pipeline.identity import stage_facts, stage_uid
from segfleet.pipeline.recipe import Recipe, resolve, with_absolute_store
from segfleet.pipeline.stage_data import stages_of
from segfleet.preprocess.stores.manifest import Manifest
from segfleet.sweeps.space.axis import Axis
from segfleet.sweeps.space.objectives import check_structures
from segfleet.sweeps.space.space import Point, Search, Trial

Manifests = Callable[[Recipe], Manifest]
TRIED = 8  # values of an axis
DRAWN = 16  # further points


def with_stores(
    trials: Iterable[Trial], shared: Callable[[Recipe], Recipe] = lambda recipe: recipe
) -> list[Trial]:
    """The same trials with absolute store folders, so that any working folder will do. `shared`:
    see `Sections`."""
    return [replace(trial, recipe=shared(with_absolute_store(trial.recipe))) for trial in trials]


def check_measures(search: Search, trials: list[Trial], manifests: Manifests) -> None:
    """Raises InputError for an objective or constraint of a structure that a store does not have.
    `trials`: those that are known; none: the space's first point stands for all."""
    measures = [*search.objectives, *(constraint.objective for constraint in search.constraints)]
    if not any(measure.structure for measure in measures):
        return
    trials = trials or with_stores(search.trials(first_point(search)))
    for recipe in {(own := resolve(t.recipe)).data.store: own for t in trials}.values():
        dataset = manifests(recipe).dataset
        structures = list(
            dataset.regions or [name for name, value in dataset.labels.items() if value]
        )
        check_structures(measures, structures, f"sweep {search.space.name}: objective")


def check_read(search: Search, manifests: Manifests) -> None:
    """Raises InputError for an axis all of whose values train the same, wherever it is tried."""
    for axis in search.axes:
        values = axis.values[:TRIED]
        if len(values) > 1 and not any(
            _differ(search, point, axis, manifests) for point in _places(search, axis)
        ):
            raise InputError(
                f"sweep {search.space.name}: axis {axis.label}: no stage reads it, all its values "
                "train the same; take it out of the axes"
            )


def first_point(search: Search) -> Point:
    return {axis.label: axis.values[0] for axis in search.axes}


def _places(search: Search, axis: Axis) -> Iterator[Point]:
    """Points at which an axis is tried: another one may decide whether it is read."""
    first, draws = first_point(search), random.Random(0)
    yield first
    others = [other for other in search.axes if other is not axis]
    for other in others:
        yield from ({**first, other.label: value} for value in other.values[1:TRIED])
    for _ in range(DRAWN if others else 0):
        yield {tried.label: tried.draw(draws) for tried in search.axes}


def _differ(search: Search, point: Point, axis: Axis, manifests: Manifests) -> bool:
    ends = set()
    for value in axis.values[:TRIED]:
        try:
            trial = with_stores(search.trials({**point, axis.label: value})[:1])[0]
            ends.add(end_of(trial.recipe, manifests))
        except InputError:  # it does not fit there, which is said elsewhere
            return True
    return len(ends) > 1


def end_of(recipe: Recipe, manifests: Manifests) -> str | None:
    """The uid of a recipe's last stage."""
    uid = None
    for index, own, _ in stages_of(recipe, manifests):
        uid = stage_uid(uid, stage_facts(own, manifests, index))
    return uid
