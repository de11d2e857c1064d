"""The search space: one YAML document that says which recipes to compare and how. Strict, like the
recipe.

name: rec_unet_two_stage
base: rec_unet_lits_tumour                   a shipped recipe, a file, or the recipe itself
axes:
  model.name: [rec_unet, rec_unet_em]        a list is a grid; in full:
                                             {grid|choice|uniform|loguniform: [...]}
  "model.name, data.patch": [[a, [64, 64]], [b, [96, 96]]]        keys that change together
stages:                                      instead of the base's; a list is an axis of that stage
  - {name: train, epochs: 100, lr: [1.0e-3, 3.0e-4]}
  - {name: finetune, epochs: 20, lr: [3.0e-4, 1.0e-4, 3.0e-5]}
seeds: [0, 1, 2]
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from segfleet.core import settings
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.recipe import Recipe, with_absolute_store
from segfleet.pipeline.scoring.folds import ALL
from segfleet.pipeline.sections import Positive, Section
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.space.axis import Axis
from segfleet.sweeps.space.objectives import (
    Constraint,
    Objective,
    parse_constraint,
    parse_objective,
)
from segfleet.sweeps.space.prepare import PREFIX, Prepare

Natural = Annotated[int, Field(ge=0)]


class Budget(Section):
    """When to stop handing out work. Nothing given: the whole grid."""

    trials: Positive | None = Field(
        None, description="schedules, each with all its seeds and folds; random and optuna need it"
    )
    epochs: Positive | None = Field(
        None, description="epochs trained, every shared stage counted once"
    )
    hours: float | None = Field(
        None, gt=0, description="hours of the command; what runs then saves and stops"
    )


class Asha(Section):
    """Asynchronous successive halving. Its time axis is epochs along the path from the first
    stage."""

    type: Literal["stopping", "promotion"] = Field(
        "stopping",
        description="stopping: the worse ones end at a rung; promotion: all pause there, and the "
        "best go on",
    )
    grace: Positive = Field(1, description="epochs along the path before a node may be stopped")
    factor: float = Field(3.0, gt=1, description="one in so many goes on at every rung")


class Pbt(Section):
    """Population based training: the axes of the only stage are its mutations; a generation is a
    stage of `interval` epochs."""

    population: int = Field(4, ge=2, description="members trained side by side")
    interval: Positive = Field(1, description="epochs of a generation")


class SearchSpace(Section):
    """Everything about a sweep that changes its outcome."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$", description="names the sweep's folder"
    )
    base: str | dict[str, Any] = Field(
        description="a shipped recipe's name, a recipe file, or a recipe"
    )
    axes: dict[str, Any] = Field(default_factory=dict, description="recipe key -> values")
    prepare: Prepare | None = Field(
        None, description="stores as axes: each is made once, and is the point's data.store"
    )
    stages: tuple[dict[str, Any], ...] | None = Field(
        None, min_length=1, description="stages; every key may hold an axis"
    )
    seeds: tuple[Natural, ...] = Field((), description="replicates: the recipe's seed; each once")
    folds: tuple[Natural, ...] | Literal["all"] = Field(
        (), description="replicates: data.fold; each once, or all"
    )
    objective: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "dice",
        description="what points are ranked by: a metric of evaluation.json, also of one structure "
        "(nsd:liver), gpu_hours, epochs or parameters; several make a Pareto front",
    )
    constraints: tuple[str, ...] = Field(
        (), description="what a point must keep to be chosen: 'hd95 <= 10', 'gpu_hours <= 24'"
    )
    search: Literal["grid", "random", "optuna"] = Field("grid", description="how points are chosen")
    seed: int = Field(0, description="of random and optuna search")
    forks: Positive = Field(
        1, description="random, optuna: later stages drawn per draw of the first, which those share"
    )
    candidates: Positive = Field(
        1,
        description="optuna: points drawn for each that is trained; the fewer epochs one adds to "
        "the tree, the likelier it is chosen",
    )
    warm_start: tuple[str, ...] = Field(
        (),
        description="optuna: other sweeps in the same folder of runs, whose scores it begins with",
    )
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none", description="early stopping, or a population"
    )
    asha: Asha = Field(default_factory=Asha, description="options of asha")
    pbt: Pbt = Field(default_factory=Pbt, description="options of pbt")
    budget: Budget = Field(default_factory=Budget, description="limits")


Point = dict[str, Any]  # axis label -> value


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One recipe of the sweep. Trials of one `point` are replicates: they differ in seed and fold
    alone."""

    number: int
    point: Point
    recipe: Recipe
    walk: tuple[
        Point, ...
    ] = ()  # of a member of a population: its values, generation by generation


@dataclass(frozen=True, kw_only=True)
class Search:
    """A checked space: its axes and the document they change."""

    space: SearchSpace
    base: dict[str, Any]
    axes: tuple[Axis, ...]

    @property
    def identity(self) -> str:
        """Hash of everything that decides which trials there are."""
        parts = [self.space.model_dump(mode="json"), self.base]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]

    @functools.cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What points are ranked by, the first one first. Raises InputError."""
        given = self.space.objective
        where = f"sweep {self.space.name}: objective"
        return tuple(
            parse_objective(text, where) for text in ([given] if isinstance(given, str) else given)
        )

    @functools.cached_property
    def constraints(self) -> tuple[Constraint, ...]:
        where = f"sweep {self.space.name}: constraints"
        return tuple(parse_constraint(text, where) for text in self.space.constraints)

    @property
    def planned(self) -> bool:
        """Whether all points are known before anything runs."""
        return self.space.search != "optuna" and self.space.scheduler != "pbt"

    @property
    def size(self) -> float:
        """How many points there are; infinite with a continuous axis."""
        return (
            math.inf
            if any(axis.continuous for axis in self.axes)
            else math.prod(len(axis.values) for axis in self.axes)
        )

    def every_point(self) -> Iterator[Point]:
        """All points of a space without continuous axes."""
        return (
            dict(zip(self._labels(), values, strict=True))
            for values in itertools.product(*(axis.values for axis in self.axes))
        )

    def points(self) -> list[Point]:
        """All points of a grid or random search, in a fixed order, none twice. Optuna's come one by
        one."""
        trials = self.space.budget.trials
        if self.space.search == "grid":
            return list(itertools.islice(self.every_point(), trials))
        generator, drawn, seen, early = random.Random(self.space.seed), [], set(), {}
        for attempt in range(100 * trials):
            if attempt % self.space.forks == 0:
                early = {axis.label: axis.draw(generator) for axis in self.axes if axis.stage == 0}
            late = {axis.label: axis.draw(generator) for axis in self.axes if axis.stage}
            point = {label: {**early, **late}[label] for label in self._labels()}
            if (key := json.dumps(point, sort_keys=True)) not in seen:
                seen.add(key)
                drawn.append(point)
            if len(drawn) == trials:
                break
        return drawn

    def trials(self, point: Point, first: int = 0) -> list[Trial]:
        """The trials of a point, one per seed and fold. Raises InputError if the recipe is not
        valid there."""
        document = json.loads(json.dumps(self.base))
        if self.space.prepare:
            store = str(self.space.prepare.store(point))
            settings.put(document, "data.store", store, f"sweep {self.space.name}: prepare")
        for axis in self.axes:
            if axis.label.startswith(PREFIX):
                continue
            values = point[axis.label] if len(axis.keys) > 1 else [point[axis.label]]
            for key, value in zip(axis.keys, values, strict=True):
                where = f"sweep {self.space.name}: {axis.label}"
                settings.put(document, key, value, where, recipes.NAMED)
        where = f"sweep {self.space.name} at {describe(point)}"
        recipe = recipes.parse(document, where)
        replicates = [
            _with_fold(recipe.model_copy(update={"seed": seed}), fold)
            for seed in self.space.seeds or (recipe.seed,)
            for fold in self._folds(recipe)
        ]
        return [
            Trial(number=first + i, point=point, recipe=recipe)
            for i, recipe in enumerate(replicates)
        ]

    def _folds(self, recipe: Recipe) -> Sequence[int]:
        """The space's folds, or the recipe's; `all` of the recipe's split in its store."""
        last = recipes.resolve(recipe).data  # which is scored
        folds = self.space.folds or (last.fold,)
        if ALL not in (folds, folds[0]):
            return folds
        return range(_fold_count(with_absolute_store(recipe).data.store, last.split))

    def _labels(self) -> list[str]:
        return [axis.label for axis in self.axes]


@functools.lru_cache(maxsize=64)
def _fold_count(store: str, split: str) -> int:
    return len(load_manifest(Path(store)).folds(split))


def _with_fold(recipe: Recipe, fold: int) -> Recipe:
    """The recipe scored on another fold. Stages that say nothing of their store follow; a
    pre-training on a store of its own is the same for every fold."""
    last = recipe.stages[-1]
    if last.data is None or not {"store", "fold"} & last.data.model_fields_set:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"fold": fold})})
    data = type(last.data)(**{**last.data.model_dump(exclude_unset=True), "fold": fold})
    stages = (*recipe.stages[:-1], last.model_copy(update={"data": data}))
    return recipe.model_copy(update={"stages": stages})


def describe(point: Point) -> str:
    """A point in one line: `model.name=unext, stages.0.lr=0.001`."""
    return (
        ", ".join(f"{label}={short(value)}" for label, value in point.items()) or "the base recipe"
    )


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
