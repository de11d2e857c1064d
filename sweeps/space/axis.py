"""Axes of a search space: a key of the recipe, or several that change together, with values."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from segfleet.core import settings
from segfleet.core.errors import InputError, check_one_of
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.stage import Stage

KINDS = ("grid", "choice", "uniform", "loguniform")


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


def axes_of(where: str, section: dict[str, Any], kind: type[BaseModel]) -> Iterator[Axis]:
    """The axes among the keys of a stage and the sections in it: a list, or a mapping that names a
    kind. Of a key that holds a list itself (a patch), only a list with lists in it is an axis; of
    one that maps names (`rates`), every list below a name."""
    for key, value in section.items():
        field = kind.model_fields.get(key)
        inner = settings.section_of(field.annotation) if field else None
        is_kind = isinstance(value, dict) and len(value) == 1 and {*value} <= {*KINDS}
        if isinstance(value, dict) and inner and not is_kind:
            yield from axes_of(f"{where}.{key}", value, inner)
        elif isinstance(value, dict) and key in recipes.NAMED and not is_kind:
            for name, setting in value.items():
                if isinstance(setting, dict | list):
                    yield axis_of(f"{where}.{key}.{name}", setting)
        elif (
            isinstance(value, dict)
            and (key != "options" or {*value} & {*KINDS})
            or isinstance(value, list)
            and (
                not (field and settings.takes_list(field.annotation))
                or any(isinstance(setting, list) for setting in value)
            )
        ):
            yield axis_of(f"{where}.{key}", value)


def axis_of(label: str, given: Any) -> Axis:
    keys = tuple(key.strip() for key in label.split(","))
    for key in keys:
        check_key(key)
    kind, values = (
        next(iter(given.items()))
        if isinstance(given, dict) and len(given) == 1
        else ("grid", given)
    )
    check_one_of(f"axis {label}", kind, KINDS)
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
