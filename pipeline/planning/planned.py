"""A planned recipe, with a sentence beside every choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from segfleet.pipeline.recipe import Recipe, parse


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A recipe as a document, and why: {key path: sentence}."""

    document: dict[str, Any]
    reasons: dict[str, str]
    notes: tuple[str, ...]  # what holds for the whole

    def recipe(self) -> Recipe:
        return parse(self.document, "plan")

    def yaml(self) -> str:
        """The recipe as YAML, each choice below its sentence."""
        head = [f"# {note}" for note in self.notes]
        return "\n".join([*head, *_lines(self.document, self.reasons, ""), ""])


def _lines(node: dict[str, Any], reasons: dict[str, str], path: str) -> Iterator[str]:
    indent = "  " * path.count(".")
    for key, value in node.items():
        own = f"{path}{key}"
        if own in reasons:
            yield f"{indent}# {reasons[own]}"
        if isinstance(value, dict) and any(name.startswith(f"{own}.") for name in reasons):
            yield f"{indent}{key}:"
            yield from _lines(value, reasons, f"{own}.")
        elif key == "stages":
            yield f"{indent}{key}:"
            for index, stage in enumerate(value):
                lines = list(_lines(stage, reasons, f"{own}.{index}."))
                bullet = next(
                    n for n, line in enumerate(lines) if not line.lstrip().startswith("#")
                )
                lines[bullet] = lines[bullet][:2] + "- " + lines[bullet][4:]
                yield from lines
        else:
            yield f"{indent}{key}: {json.dumps(value)}"
