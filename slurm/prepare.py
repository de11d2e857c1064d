"""From a recipe to the run folders it will fill, without torch: what every launcher needs before it
starts anything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import absolute
from segfleet.pipeline.recipe import Recipe, load_recipe, with_absolute_store
from segfleet.pipeline.run import stage_folders
from segfleet.pipeline.scoring.folds import chosen_folds
from segfleet.pipeline.scoring.scored import is_scored
from segfleet.preprocess.stores.manifest import load_manifest


def prepare(source: str, changes: Sequence[str], root: Path) -> list[tuple[Recipe, Path]]:
    """The validated recipe with an absolute store, and the folder of its run below `root`; with
    `data.fold: all` one of each for every fold. Raises InputError."""
    recipe = with_absolute_store(load_recipe(source, list(changes)))
    manifest = load_manifest(Path(recipe.data.store))
    return [
        (fold, stage_folders(absolute(root), fold, manifest)[-1].path)
        for fold in chosen_folds(recipe, manifest)
    ]


def members(axes: Sequence[str]) -> list[list[str]]:
    """Every combination of the changes that axes name: key.path=1,2,3 or key.path=0..4. No axes:
    one member without changes."""
    return [list(choice) for choice in itertools.product(*map(_values, axes))]


def _values(axis: str) -> list[str]:
    key, equals, text = axis.partition("=")
    if not equals or not key or not text:
        raise InputError(
            f"--array: found '{axis}', expected key.path=1,2,3 or key.path=0..4, for example "
            "data.fold=0..4"
        )
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = map(int, match.groups())
        if first > last:
            raise InputError(
                f"--array: found '{axis}', which holds no value; expected the smaller number "
                f"first: {key}={last}..{first}"
            )
        return [f"{key}={value}" for value in range(first, last + 1)]
    return [f"{key}={value}" for value in text.split(",")]


def finished(run: Path, recipe: Recipe) -> bool:
    """Trained, and scored as the recipe asks for."""
    return is_scored(run, recipe, load_manifest(Path(recipe.data.store)))


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, to be frozen."""
    return recipe.model_dump(mode="json")
