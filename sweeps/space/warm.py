"""What other sweeps measured, for a search that begins with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import read_json
from segfleet.sweeps.space.axis import Axis
from segfleet.sweeps.space.space import Point, Search

OUTCOME = "outcome.json"
Known = tuple[Point, dict[str, float | None]]  # values of some axes, and what was measured there


def warm_points(search: Search, runs: Path) -> tuple[list[Known], list[str]]:
    """The ranked points of the sweeps that `warm_start` names, as far as their axes and values are
    this space's, and a sentence per sweep on how many they are. Raises InputError if a sweep has no
    outcome, other measures or no axis of this space."""
    points, sentences = [], []
    needed = {objective.name for objective in search.objectives}
    needed |= {constraint.objective.name for constraint in search.constraints}
    for name in search.space.warm_start:
        where = f"sweep {search.space.name}: warm_start: {name}"
        path = Path(runs) / "sweeps" / name / OUTCOME
        document = read_json(path)
        if not document or not document.get("ranking"):
            raise InputError(f"{where}: no point is ranked in {path}; name a sweep that has ended")
        rows = document["ranking"]
        measured = set(rows[0].get("values") or {"dice": None})
        if missing := sorted(needed - measured):
            raise InputError(
                f"{where}: it did not measure {', '.join(missing)}, but "
                f"{', '.join(sorted(measured))}"
            )
        axes = [axis for axis in search.axes if axis.label in rows[0]["point"]]
        if not axes:
            raise InputError(
                f"{where}: it has no axis of this space; its axes are "
                f"{', '.join(rows[0]['point']) or 'none'}"
            )
        matching = [
            ({axis.label: row["point"][axis.label] for axis in axes}, _values(row))
            for row in rows
            if all(holds(axis, row["point"][axis.label]) for axis in axes)
        ]
        points += matching
        sentences.append(f"begins with {len(matching)} of {len(rows)} points of the sweep {name}")
    return points, sentences


def holds(axis: Axis, value: Any) -> bool:
    """Whether a value is one of the axis's."""
    if not axis.continuous:
        return value in axis.values
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and axis.values[0] <= value <= axis.values[1]


def _values(row: dict[str, Any]) -> dict[str, float | None]:
    return row.get("values") or {"dice": row["score"]}
