"""Does one way of beginning help, by how much, and with how many labelled cases? Of a sweep with a
pre-training of 0 epochs among its points, with an axis `data.cases`, or with both."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from segfleet.sweeps.space.space import describe

AXIS = "data.cases"
LENGTH = re.compile(r"stages\.\d+\.epochs")
Row = Mapping[str, Any]


def learning_curves(
    rows: Sequence[Row], difference: Callable[[Row, Row], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """For every way (a point less its number of cases) and number of cases the score, and the gain
    over the way without pre-training that is alike in all else, or over the first way of the space
    where there is none, at equal cases, paired case by case. None without any such axis.

    Args:
        rows: of the ranking, those that were not ranked too, in the order of the space.
        difference: (row, other) -> other minus row, as `outcome.json` has it.
    """
    labels = list(dict.fromkeys(label for row in rows for label in row["point"]))
    axis = next((label for label in labels if label.rpartition("stages.")[2].endswith(AXIS)), None)
    if axis is not None and len({row["point"].get(axis) for row in rows}) < 2:
        axis = None
    without = next(
        (
            label
            for label in labels
            if LENGTH.fullmatch(label) and {0} < {row["point"].get(label) for row in rows}
        ),
        None,
    )
    if axis is None and without is None:
        return None
    ways: dict[str, dict[Any, Row]] = {}
    plain: dict[str, str] = {}  # a way -> the one that it is compared to
    for row in rows:
        rest = {key: value for key, value in row["point"].items() if key != axis}
        way = describe(rest) if rest else "all points"
        ways.setdefault(way, {})[row["point"].get(axis)] = row
        plain[way] = describe({**rest, without: 0}) if without else next(iter(ways))
    numbers = sorted({row["point"].get(axis) for row in rows}, key=lambda n: (n is None, n))
    lines = []
    for way, by_cases in ways.items():
        for cases in numbers:
            row, base = by_cases.get(cases), ways.get(plain[way], {}).get(cases)
            if row is None or row["score"] is None:
                continue
            comparable = way != plain[way] and base is not None and base["score"] is not None
            lines.append(
                {
                    "way": way,
                    "cases": cases,
                    "score": row["score"],
                    "ci95": row["ci95"],
                    "gain": difference(base, row) if comparable else None,
                }
            )
    reference = f"the same with {without}=0" if without else next(iter(ways))
    return {"axis": axis, "without": without, "reference": reference, "rows": lines}
