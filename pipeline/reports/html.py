"""Reports as HTML: one file each, nothing from elsewhere. What a page says is put together in
Python, what it looks like stands in `templates/`, where every value is escaped unless it is
`Markup`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Cell:
    """A number in a table, which sorts by its exact value; a dash for what is missing."""

    value: float | int | None
    digits: int = 3
    extra: str = ""  # below the number, or in place of what is missing
    signed: bool = False

    @property
    def text(self) -> str:
        if isinstance(self.value, float):
            return f"{self.value:{'+' if self.signed else ''}.{self.digits}f}"
        return f"{self.value:,}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """`rows`: the heading of each (None: it has none) and its cells, numbers or texts."""

    label: str  # for screen readers
    caption: str
    head: Sequence[str]
    rows: Sequence[tuple[str | None, Sequence[Cell | str]]]
    groups: Sequence[tuple[str, int]] = ()  # headings over the head, and columns under each
    left: int = 0  # columns of text
    sortable: bool = False


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """The page that a template of `folder` makes of `values`. A value it lacks is an error."""
    return environment(folder).get_template(template).render(**values)


@functools.cache
def environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["repr"] = repr
    return templates


def interval(bounds: Sequence[float] | None, digits: int = 3) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"
