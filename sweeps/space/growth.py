"""Whether a space has become more than it was: then the sweep continues in its folder."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from segfleet.core import settings
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.stage import Stage
from segfleet.sweeps.space.axis import KINDS


class Nothing(BaseModel):
    """Below a key that maps names."""


def changed(key: str, old: Any, new: Any) -> list[str]:
    """What is another one in a key of a space, axis by axis."""
    if key == "stages" and old and new and len(old) == len(new):
        pairs = [(f"stages.{i}", *both) for i, both in enumerate(zip(old, new, strict=True))]
    else:
        pairs = [(key, old, new)] if isinstance(old, dict) and isinstance(new, dict) else []
    keys = [
        f"{where}.{name}: was {_described(was, name)}, is {_described(now, name)}"
        for where, was, now in pairs
        for name in [*was, *(name for name in now if name not in was)]
        if was.get(name) != now.get(name)
    ]
    return keys or [key]


def _described(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not there"


def grows(key: str, old: Any, new: Any, space: dict[str, Any]) -> bool:
    """Whether a space's key has become more than it was."""
    if key == "budget":
        return True  # what was trained stays, however much or little is asked for now
    if key in ("objective", "constraints"):
        return space["scheduler"] != "pbt"  # whose generations follow from it
    if key in ("warm_start", "candidates"):
        return True
    if key in ("seeds", "folds"):
        return bool(old) and set(old) <= set(new)
    listed = space["search"] in ("grid", "optuna") and space["scheduler"] != "pbt"
    if not listed or key not in ("axes", "stages") or not old or not new or len(old) != len(new):
        return False
    if key == "axes":
        return all(_contains(value, old.get(name)) for name, value in new.items())
    return all(_grown(was, now) for was, now in zip(old, new, strict=True))


def _grown(old: dict[str, Any], new: dict[str, Any], kind: type[BaseModel] = Stage) -> bool:
    """Whether a stage, or a section in it, has the same keys and at most more values of them."""
    if old.keys() != new.keys():
        return False
    for name, was in old.items():
        field, now = kind.model_fields.get(name), new[name]
        inner = settings.section_of(field.annotation) if field else None
        if isinstance(was, dict) and isinstance(now, dict) and not {*was} & {*KINDS}:
            below = inner is not None or name in recipes.NAMED
            same = _grown(was, now, inner or Nothing) if below else was == now
        elif field and settings.takes_list(field.annotation) and not _listed(was, now):
            same = was == now  # one list, such as a patch
        else:
            same = _contains(now, was)
        if not same:
            return False
    return True


def _listed(*values: Any) -> bool:
    """Whether these are lists with lists in them, of a key that holds a list itself."""
    return all(isinstance(v, list) and any(isinstance(item, list) for item in v) for v in values)


def _contains(new: Any, old: Any) -> bool:
    """Whether the values are the same, or all of a list (or the one value) are in a longer list."""
    if new == old:
        return True
    values = [
        next(iter(given.values())) if isinstance(given, dict) and len(given) == 1 else given
        for given in (old, new)
    ]
    if isinstance(old, dict) and next(iter(old), None) not in ("grid", "choice"):
        return False
    listed = [value if isinstance(value, list) else [value] for value in values]
    return isinstance(values[1], list) and all(value in listed[1] for value in listed[0])
