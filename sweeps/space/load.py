"""From the document of a space to a checked search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core import settings
from segfleet.core.errors import InputError
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.scoring.folds import ALL
from segfleet.pipeline.stage import Stage
from segfleet.sweeps.space.axis import Axis, axes_of, axis_of
from segfleet.sweeps.space.prepare import PREFIX
from segfleet.sweeps.space.space import Search, SearchSpace

SPACES = Path(__file__).parents[1] / "spaces"
TEXTS = recipes.TEXTS | settings.text_keys(SearchSpace)


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
            settings.check_regular(source, "sweep")
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
    axes = [axis_of(label, values) for label, values in space.axes.items()]
    if space.stages is not None:
        base = {**base, "stages": []}
        for index, stage in enumerate(space.stages):
            base["stages"].append(json.loads(json.dumps(stage)))
            for axis in axes_of(f"stages.{index}", stage, Stage):
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
        excess = [*names, *space.constraints]
        raise InputError(
            f"sweep {space.name}: objective: pbt compares its members by one metric of their "
            f"scores and knows no constraints; found {', '.join(excess)}"
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
