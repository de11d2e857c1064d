"""The table of docs/models.md, from `segfleet models --json` and the shipped recipes. `python
docs/models_table.py` writes it anew."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- table: docs/models_table.py -->", "<!-- end -->"
COLUMNS = ("network", "dims", "parameters", "GMAC", "at", "sizes", "deep supervision", "recipes")


def table(rows: Iterable[Mapping[str, Any]], recipes: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of `segfleet models --json`'s rows; `recipes` maps a network to the recipes
    that train it."""
    lines = [COLUMNS, ("---", "---", "---:", "---:", "---", "---", "---", "---")]
    for row in rows:
        rule = (
            "x".join(map(str, row["divisor"]))
            if len(set(row["divisor"])) > 1
            else str(row["divisor"][0])
        )
        sizes = (
            "fixed when built"
            if row["fixed_patch"]
            else "any"
            if rule == "1"
            else f"multiples of {rule}"
        )
        channels = f"{row['in_channels']} → {row['classes']}"
        lines.append(
            (
                f"`{row['name']}`",
                "/".join(f"{d}D" for d in row["dims"]),
                f"{row['parameters']:,}",
                f"{row['gmac']:,.2f}",
                f"{'×'.join(map(str, row['input']))}, {channels}",
                sizes,
                "yes" if row["deep_supervision"] else "no",
                ", ".join(recipes.get(row["name"], ())) or "-",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def recipes_by_network() -> dict[str, list[str]]:
    from segfleet.pipeline.recipe import load_recipe, recipe_names

    found: dict[str, list[str]] = {}
    for name in recipe_names():
        found.setdefault(load_recipe(name).model.name, []).append(name)
    return found


def with_table(page: str, made: str) -> str:
    """The page with `made` between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"{PAGE.name} has lost its marks {BEGIN} and {END}"
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"


if __name__ == "__main__":
    told = subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", "models", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    PAGE.write_text(
        with_table(
            PAGE.read_text(encoding="utf-8"), table(json.loads(told.stdout), recipes_by_network())
        ),
        encoding="utf-8",
    )
