"""Documents that somebody has changed by hand."""

from __future__ import annotations

from typing import Any


def changed(thing: Any, how: str) -> Any:
    """`how`: nulls for all values, huge numbers, texts for numbers, numbers for texts."""
    if isinstance(thing, dict):
        return {key: changed(value, how) for key, value in thing.items() if key != "sha256"}
    if isinstance(thing, list):
        return [changed(value, how) for value in thing]
    if how == "nulls":
        return None
    number = isinstance(thing, int | float) and not isinstance(thing, bool)
    if how == "huge" and number:
        return float("inf") if isinstance(thing, float) else 10**400
    if how == "texts" and number:
        return f"{thing}x"
    return 7 if how == "numbers" and isinstance(thing, str) else thing
