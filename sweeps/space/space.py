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

from pydantic import BaseModel, Field

from segfleet.core import settings
from segfleet.core.errors import InputError
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.recipe import Recipe, with_absolute_store
from segfleet.pipeline.scoring.folds import ALL
from segfleet.pipeline.sections import Positive, Section
from segfleet.pipeline.stage import Stage
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.space.objectives import (
    Constraint,
    Objective,
    parse_constraint,
    parse_objective,
)
from segfleet.sweeps.space.prepare import PREFIX, Prepare

SPACES = Path(__file__).parents[1] / "spaces"
KINDS = ("grid", "choice", "uniform", "loguniform")
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


TEXTS = recipes.TEXTS | settings.text_keys(SearchSpace)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values of one key, or of several that change together."""

    keys: tuple[str, ...]
    kind: str
    values: tuple[Any, ...]

    @property
    def label(self) -> str:
        return ", ".join(self.keys)

    @property
    def continuous(self) -> bool:
        return self.kind in ("uniform", "loguniform")

    @property
    def stage(self) -> int:
        """The first stage that this axis changes."""
        parts = [key.split(".") for key in self.keys]
        return min(int(p[1]) if p[0] == "stages" and len(p) > 2 else 0 for p in parts)

    def draw(self, generator: random.Random) -> Any:
        if not self.continuous:
            return generator.choice(self.values)
        low, high = self.values
        return (
            generator.uniform(low, high)
            if self.kind == "uniform"
            else math.exp(generator.uniform(math.log(low), math.log(high)))
        )


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
        facts = [self.space.model_dump(mode="json"), self.base]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[
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
        generator, found, seen, early = random.Random(self.space.seed), [], set(), {}
        for attempt in range(100 * trials):
            if attempt % self.space.forks == 0:
                early = {axis.label: axis.draw(generator) for axis in self.axes if axis.stage == 0}
            late = {axis.label: axis.draw(generator) for axis in self.axes if axis.stage}
            point = {label: {**early, **late}[label] for label in self._labels()}
            if (key := json.dumps(point, sort_keys=True)) not in seen:
                seen.add(key)
                found.append(point)
            if len(found) == trials:
                break
        return found

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


def space_names() -> list[str]:
    """Names of the shipped spaces."""
    return sorted(path.stem for path in SPACES.glob("*.yaml"))


def load_search(source: str, changes: list[str] | None = None) -> Search:
    """Read and check a space. `changes` are key.path=value of the base recipe. Raises
    InputError."""
    path = Path(source)
    if not path.is_file():
        path = SPACES / f"{source}.yaml"
        if not path.is_file() or "/" in source:
            raise InputError(
                f"sweep: found no file '{source}' and no shipped space of that name; shipped: "
                f"{', '.join(space_names())}"
            )
    document = settings.read(path, "sweep", TEXTS)
    return parse_search(document, source, changes)


def parse_search(document: Any, source: str = "sweep", changes: list[str] | None = None) -> Search:
    """A checked search from a space's document. Raises InputError that names the key, the value and
    the legal ones."""
    space = settings.validate(SearchSpace, document, source)
    return search_of(
        space,
        recipes.override(
            recipes.read_document(space.base) if isinstance(space.base, str) else space.base,
            changes or [],
        ),
    )


def search_of(space: SearchSpace, base: dict[str, Any]) -> Search:
    """A checked search from a valid space and its base recipe."""
    axes = [_axis(label, values) for label, values in space.axes.items()]
    if space.stages is not None:
        base = {**base, "stages": []}
        for index, stage in enumerate(space.stages):
            base["stages"].append(json.loads(json.dumps(stage)))
            for axis in _axes_of(f"stages.{index}", stage, Stage):
                axes.append(axis)
                where = f"sweep {space.name}"
                settings.put(base, axis.label, axis.values[0], where, recipes.NAMED)
    if space.prepare:
        axes += [
            Axis(keys=(PREFIX + key,), kind="grid", values=values)
            for key, values in space.prepare.axes().items()
        ]
    for axis in axes:
        _check_comparable(axis, space.name)
    search = Search(space=space, base=base, axes=tuple(axes))
    _check(search)
    return search


def _check_comparable(axis: Axis, sweep: str) -> None:
    """Raises InputError for an axis whose points are scored on other cases or differ by luck alone:
    their ranking would say nothing about the recipe."""
    rows = axis.values if len(axis.keys) > 1 else [[value] for value in axis.values]
    below = {
        f"data.{key}" for row in rows for data in row if isinstance(data, dict) for key in data
    }
    changed = {*axis.keys, *(below if "data" in axis.keys else ())}
    for key, what, instead in (
        ("seed", "seeds", "list them under `seeds:`, as replicates of every point"),
        ("data.fold", "folds", "list them under `folds:`, as replicates of every point"),
        ("data.split", "splits", "choose one: data.split=NAME after the space"),
    ):
        if key in changed:
            raise InputError(
                f"sweep {sweep}: axis {axis.label}: {key} would rank {what} against each other, "
                f"not recipes; {instead}"
            )


def _check(search: Search) -> None:
    """What only shows when everything is known."""
    space = search.space
    _check_objectives(search)
    if space.search != "grid" and space.budget.trials is None and space.scheduler != "pbt":
        raise InputError(f"sweep {space.name}: search '{space.search}' needs budget.trials")
    for name, given in (("seeds", space.seeds), ("folds", space.folds)):
        if given != ALL and (twice := [value for value in given if given.count(value) > 1]):
            raise InputError(
                f"sweep {space.name}: {name}: found {twice[0]} twice in {list(given)}; a run and "
                "its copy are no replicates"
            )
    if space.forks > 1 and space.search == "grid":
        raise InputError(
            f"sweep {space.name}: forks: found {space.forks} with search 'grid', which draws "
            "nothing; search: random or optuna forks"
        )
    labels = [key for axis in search.axes for key in axis.keys]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"sweep {space.name}: '{twice}' is an axis twice; keep one of them")
    for axis in search.axes:
        if axis.continuous and space.search == "grid" and space.scheduler != "pbt":
            raise InputError(
                f"sweep {space.name}: {axis.label}: '{axis.kind}' has no grid; list values, or "
                "set search to random or optuna"
            )
    point = {axis.label: axis.values[0] for axis in search.axes}
    stages = search.trials(point)[0].recipe.stages
    if space.scheduler == "asha" and not search.trials(point)[0].recipe.evaluation.every:
        raise InputError(
            f"sweep {space.name}: asha compares validations: evaluation.every of the base recipe: "
            "found 0, expected 1 or more"
        )
    if space.scheduler == "pbt":
        _check_population(search, stages)
    short_of = space.budget.epochs
    if short_of and search.planned:
        least = min(
            sum(stage.epochs for stage in search.trials(point)[0].recipe.stages)
            for point in search.points()
        )
        if short_of < least:
            raise InputError(
                f"sweep {space.name}: budget.epochs is {short_of}, less than one trial: the "
                f"shortest takes {least} epochs"
            )


def _check_objectives(search: Search) -> None:
    """What is ranked, and what a search may learn from."""
    space = search.space
    names = [objective.name for objective in search.objectives]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"sweep {space.name}: objective: '{twice}' stands twice")
    if space.scheduler == "pbt" and (
        len(names) > 1 or search.constraints or search.objectives[0].cost
    ):
        found = [*names, *space.constraints]
        raise InputError(
            f"sweep {space.name}: objective: pbt compares its members by one metric of their "
            f"scores and knows no constraints; found {', '.join(found)}"
        )
    for name, given in (("candidates", space.candidates > 1), ("warm_start", space.warm_start)):
        if given and space.search != "optuna":
            raise InputError(
                f"sweep {space.name}: {name}: search '{space.search}' does not learn from scores; "
                "expected search: optuna"
            )
    if space.name in space.warm_start:
        raise InputError(
            f"sweep {space.name}: warm_start: it names itself; its own points are known anyway"
        )


def _check_population(search: Search, stages: Sequence[Stage]) -> None:
    """What cannot be mutated, or a generation would overwrite."""
    space, labels = search.space, [key for axis in search.axes for key in axis.keys]
    trials = search.trials({axis.label: axis.values[0] for axis in search.axes})
    folds = [
        trial.recipe.data.fold for trial in trials if trial.recipe.seed == trials[0].recipe.seed
    ]
    if len(stages) != 1 or not labels or any(key[:9] != "stages.0." for key in labels):
        raise InputError(
            f"sweep {space.name}: pbt needs a recipe of one stage, and axes of that stage alone "
            "(stages.0.lr and the like)"
        )
    for name, given in (("seeds", space.seeds), ("folds", folds)):
        if len(given) > 1:
            raise InputError(
                f"sweep {space.name}: {name}: found {list(given)}; pbt trains one population, "
                "expected one value or none"
            )
    if joint := next((axis for axis in search.axes if len(axis.keys) > 1), None):
        raise InputError(
            f"sweep {space.name}: {joint.label}: keys that change together cannot be mutated by "
            "pbt; give each its own axis"
        )
    if fixed := next((key for key in labels if key[9:] in ("epochs", "name", "inherit")), None):
        raise InputError(
            f"sweep {space.name}: {fixed}: pbt sets it for every generation (epochs: "
            "pbt.interval), so it cannot be an axis"
        )


def _axes_of(where: str, section: dict[str, Any], kind: type[BaseModel]) -> Iterator[Axis]:
    """The axes among the keys of a stage and the sections in it: a list, or a mapping that names a
    kind. Of a key that holds a list itself (a patch), only a list with lists in it is an axis; of
    one that maps names (`rates`), every list below a name."""
    for key, value in section.items():
        field = kind.model_fields.get(key)
        inner = settings.section_of(field.annotation) if field else None
        is_kind = isinstance(value, dict) and len(value) == 1 and {*value} <= {*KINDS}
        if isinstance(value, dict) and inner and not is_kind:
            yield from _axes_of(f"{where}.{key}", value, inner)
        elif isinstance(value, dict) and key in recipes.NAMED and not is_kind:
            for name, one in value.items():
                if isinstance(one, dict | list):
                    yield _axis(f"{where}.{key}.{name}", one)
        elif (
            isinstance(value, dict)
            and (key != "options" or {*value} & {*KINDS})
            or isinstance(value, list)
            and (
                not (field and settings.takes_list(field.annotation))
                or any(isinstance(one, list) for one in value)
            )
        ):
            yield _axis(f"{where}.{key}", value)


def _axis(label: str, given: Any) -> Axis:
    keys = tuple(key.strip() for key in label.split(","))
    for key in keys:
        check_key(key)
    kind, values = (
        next(iter(given.items()))
        if isinstance(given, dict) and len(given) == 1
        else ("grid", given)
    )
    if kind not in KINDS:
        raise InputError(f"axis {label}: found '{kind}', expected one of: {', '.join(KINDS)}")
    if not isinstance(values, list) or not values:
        raise InputError(f"axis {label}: found {values!r}, expected a list of at least one value")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise InputError(f"axis {label}: a value stands twice in {values}")
    if len(keys) > 1 and not all(
        isinstance(value, list) and len(value) == len(keys) for value in values
    ):
        raise InputError(f"axis {label}: every value must be a list of {len(keys)}, one per key")
    if kind in ("uniform", "loguniform"):
        two = len(values) == 2 and all(isinstance(value, int | float) for value in values)
        if not two or not values[0] < values[1] or (kind == "loguniform" and values[0] <= 0):
            raise InputError(
                f"axis {label}: found {kind} {values}, expected [low, "
                f"high]{' above 0' if kind == 'loguniform' else ''}"
            )
    return Axis(keys=keys, kind=kind, values=tuple(values))


def check_key(key: str) -> None:
    """Raises InputError unless `key` is a path into a recipe."""
    kind: Any = Recipe
    parts = settings.path_of(key, recipes.NAMED)
    for place, part in enumerate(parts):
        if kind is Stage and parts[place - 1] == "stages":  # an index
            if not part.isdecimal():
                raise InputError(
                    f"axis {key}: found '{part}', expected the number of a stage, for example "
                    "stages.0.lr"
                )
            parts[place] = ""
            continue
        if kind is None:  # inside options: any key
            return
        if part not in kind.model_fields:
            raise InputError(
                f"axis {key}: '{part}' is an unknown key; expected one of: "
                f"{', '.join(kind.model_fields)}"
            )
        annotation = kind.model_fields[part].annotation
        section = settings.section_of(annotation)
        rest = parts[place + 1 :]
        if section is None and rest and part not in ("options", *recipes.NAMED):
            raise InputError(f"axis {key}: '{part}' has no keys below it")
        kind = section
