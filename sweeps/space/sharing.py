"""Recipes of many points in little memory: what is equal in them is one object."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from segfleet.pipeline.recipe import Recipe


class Sections:
    """Call it with a recipe: an equal one, made of the sections and stages of those before wherever
    they are equal. Ten thousand points of a space differ in a few numbers, so they take a third of
    the memory."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, recipe: Recipe) -> Recipe:
        values = {key: self._one(value) for key, value in recipe}
        values["stages"] = tuple(map(self._one, recipe.stages))
        said = frozenset(recipe.model_fields_set)
        return Recipe.model_construct(self.known.setdefault((said,), set(said)), **values)

    def _one(self, value: Any) -> Any:
        if not isinstance(value, BaseModel):
            return value
        # what a section says counts, too: a stage changes no other keys of the recipe's own section
        key = (type(value), value.model_dump_json(), value.model_dump_json(exclude_unset=True))
        return self.known.setdefault(key, value)
