"""Learning curves of a sweep with an axis `data.cases`: does one way of beginning help, by how
much, and with how many labelled cases?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from segfleet.sweeps.space.space import describe

AXIS = "data.cases"
Row = Mapping[str, Any]


def learning_curves(
    rows: Sequence[Row], difference: Callable[[Row, Row], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """For every way (a point less its number of cases) and number of cases the score, and the gain
    over the first way of the space at equal cases, paired case by case. None without such an axis.

    Args:
        rows: of the ranking, those that were not ranked too, in the order of the space.
        difference: (row, other) -> other minus row, as `outcome.json` has it.
    """
    axis = next(
        (k for row in rows for k in row["point"] if k.rpartition("stages.")[2].endswith(AXIS)), None
    )
    if axis is None or len({row["point"][axis] for row in rows}) < 2:
        return None
    ways: dict[str, dict[Any, Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["point"].items() if key != axis}
        ways.setdefault(describe(rest) or "all points", {})[row["point"][axis]] = row
    numbers = sorted({row["point"][axis] for row in rows}, key=lambda n: (n is None, n))
    reference, lines = next(iter(ways)), []
    for way, found in ways.items():
        for cases in numbers:
            row, base = found.get(cases), ways[reference].get(cases)
            if row is None or row["score"] is None:
                continue
            known = way != reference and base is not None and base["score"] is not None
            lines.append(
                {
                    "way": way,
                    "cases": cases,
                    "score": row["score"],
                    "ci95": row["ci95"],
                    "gain": difference(base, row) if known else None,
                }
            )
    return {"axis": axis, "reference": reference, "rows": lines}
