"""Charts of a sweep's report as inline SVG, drawn with the pieces of a run's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from markupsafe import escape as e

from segfleet.pipeline.reports.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    figure,
    number,
    shortened,
    thinned,
    ticks,
)

HUES = (210, 28, 140, 330, 265, 55, 185, 0, 95, 300)
Point = tuple[float, float]


def colour(index: int) -> str:
    return f"hsl({HUES[index % len(HUES)]} 65% {45 + 12 * (index // len(HUES) % 3)}%)"


def parallel(
    axes: Sequence[str], rows: Sequence[tuple[Sequence[Any], float, str]], measure: str = "Dice"
) -> Markup:
    """Parallel coordinates: `rows` are (a value per axis, score, name). The
    higher the score, by `measure`, the stronger the line."""
    columns = [column_places([values[i] for values, _, _ in rows]) for i in range(len(axes))]
    scores = [score for _, score, _ in rows]
    columns.append(column_places(scores, numeric=True))
    width, height, top, bottom = max(480, 170 * (len(axes) + 1)), 320, 44, 24
    across = [80 + (width - 160) * i / max(1, len(axes)) for i in range(len(axes) + 1)]

    def down(share: float) -> float:
        return height - bottom - (height - top - bottom) * share

    low, high = min(scores), max(scores)
    parts = []
    for values, score, name in sorted(rows, key=lambda row: row[1]):
        places = [columns[i][0][key(value)] for i, value in enumerate([*values, score])]
        strength = 0.15 + 0.75 * ((score - low) / (high - low) if high > low else 1.0)
        line = " ".join(f"{x:.1f},{down(y):.1f}" for x, y in zip(across, places, strict=True))
        tip = f"<title>{e(name)}: {score:.4f}</title>"
        drawn = f'style="stroke:var(--accent)" stroke-width="2" stroke-opacity="{strength:.2f}"'
        parts.append(f'<polyline fill="none" {drawn} points="{line}">{tip}</polyline>')
    for x, label, (_, marks) in zip(across, [*axes, measure], columns, strict=True):
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
        parts.append(
            f'<text class="title" x="{x:.1f}" y="18" '
            f'text-anchor="middle">{e(shortened(label, 26))}</text>'
        )
        parts += [
            f'<text x="{x + 5:.1f}" y="{down(y) + 4:.1f}">{e(shortened(text, 20))}</text>'
            for y, text in marks
        ]
    return figure(
        width,
        height,
        f"Parallel coordinates of {len(rows)} points over {', '.join(axes)} and {measure}",
        parts,
    )


def column_places(
    values: Sequence[Any], numeric: bool = False
) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Place (0 bottom to 1 top) of every value, and the marks to write. Few values stand at equal
    distances, many numbers on a scale."""
    distinct = list({key(value): value for value in values}.values())
    if all(isinstance(value, int | float) for value in distinct):
        distinct.sort()
        if numeric or len(distinct) > 8:
            low, high = distinct[0], distinct[-1]
            logarithmic = not numeric and low > 0 and high / low > 20
            places = {key(v): share(v, low, high, logarithmic) for v in distinct}
            shown = [low, high] if high > low else [low]
            return places, [(places[key(v)], number(v)) for v in shown]
    places = {
        key(v): (i / (len(distinct) - 1) if len(distinct) > 1 else 0.5)
        for i, v in enumerate(distinct)
    }
    return places, [(places[key(v)], text_of(v)) for v in distinct]


def share(value: float, low: float, high: float, logarithmic: bool) -> float:
    if high == low:
        return 0.5
    if logarithmic:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


def scatter(title: str, groups: dict[str, Sequence[tuple[float, float, str]]]) -> Markup:
    """(x, score, name) of every group in its own colour; x is logarithmic if it spans more than a
    factor of 5; means are joined."""
    points = [point for members in groups.values() for point in members]
    xs, scores = [x for x, _, _ in points], [y for _, y, _ in points]
    low, high = min(xs), max(xs)
    logarithmic = low > 0 and high / low > 5
    marks = ticks(min(scores), max(scores))

    def at(x: float, y: float) -> Point:
        inner = WIDTH - LEFT - RIGHT - 30
        return LEFT + 15 + inner * share(x, low, high, logarithmic), HEIGHT - BOTTOM - (
            HEIGHT - TOP - BOTTOM
        ) * share(y, marks[0], marks[-1], False)

    parts = [f'<text class="title" x="{LEFT}" y="15">{e(title)}</text>', *_scale_y(marks, at, low)]
    parts += [
        f'<text x="{at(x, marks[0])[0]:.1f}" y="{HEIGHT - BOTTOM + 16}" '
        f'text-anchor="middle">{number(x)}</text>'
        for x in (sorted(set(xs)) if len(set(xs)) <= 6 else (low, high))
    ]
    for index, members in enumerate(groups.values()):
        means = [
            (x, [s for other, s, _ in members if other == x])
            for x in sorted({x for x, _, _ in members})
        ]
        line = " ".join(
            "{:.1f},{:.1f}".format(*at(x, sum(values) / len(values))) for x, values in means
        )
        parts.append(
            f'<polyline fill="none" stroke="{colour(index)}" stroke-width="1.5" '
            f'stroke-opacity=".6" points="{line}"/>'
        )
        for x, y, name in members:
            across, down = at(x, y)
            place, tip = (
                f'cx="{across:.1f}" cy="{down:.1f}" r="3.5"',
                f"<title>{e(name)}: {y:.4f}</title>",
            )
            parts.append(
                f'<circle {place} fill="{colour(index)}" fill-opacity=".75">{tip}</circle>'
            )
    return figure(
        WIDTH, HEIGHT, f"{title}: {len(points)} points in {len(groups)} groups", parts
    ) + (legend(groups) if len(groups) > 1 else Markup())


def branches(title: str, unit: str, lines: Sequence[tuple[Sequence[Point], int, str]]) -> Markup:
    """Curves of the tree: (points (epochs along the path, value), colour, name) of every node,
    joined to its parent by its first point."""
    lines = [(thinned(points), hue, name) for points, hue, name in lines if points]
    if not lines:
        return Markup("<figure><figcaption>{}: nothing was recorded.</figcaption></figure>").format(
            title
        )
    every = [point for points, _, _ in lines for point in points]
    right, marks = (
        max(max(x for x, _ in every), 1.0),
        ticks(min(y for _, y in every), max(y for _, y in every)),
    )
    width = 980

    def at(x: float, y: float) -> Point:
        return LEFT + (width - LEFT - RIGHT) * x / right, HEIGHT - BOTTOM - (
            HEIGHT - TOP - BOTTOM
        ) * share(y, marks[0], marks[-1], False)

    parts = [
        f'<text class="title" x="{LEFT}" y="15">{e(title)}</text>',
        *_scale_y(marks, at, 0, width),
    ]
    parts += [
        f'<text x="{at(x, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 16}" '
        f'text-anchor="middle">{number(x)}</text>'
        for x in ticks(0, right)
        if x <= right * 1.001
    ]
    parts.append(f'<text x="{width / 2}" y="{HEIGHT - 3}" text-anchor="middle">{e(unit)}</text>')
    for points, hue, name in lines:
        spots = [at(x, y) for x, y in points]
        tip, joined = f"<title>{e(name)}</title>", " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(
            f'<polyline fill="none" stroke="{colour(hue)}" stroke-width="1.5" stroke-opacity=".7" '
            f'points="{joined}">{tip}</polyline>'
        )
        parts.append(
            f'<circle cx="{spots[-1][0]:.1f}" cy="{spots[-1][1]:.1f}" r="2.5" '
            f'fill="{colour(hue)}">{tip}</circle>'
        )
    return figure(width, HEIGHT, f"{title}: {len(lines)} nodes", parts)


def bars(rows: Sequence[tuple[str, float]], unit: str) -> Markup:
    """Two or three amounts side by side."""
    width, line = 760, 34
    most = max(value for _, value in rows) or 1.0
    parts = []
    for i, (name, value) in enumerate(rows):
        y, length = 6 + line * i, 480 * value / most
        parts.append(f'<text class="name" x="150" y="{y + 17}" text-anchor="end">{e(name)}</text>')
        parts.append(
            f'<rect x="160" y="{y}" width="{max(1.0, length):.1f}" height="24" fill="{colour(i)}" '
            'fill-opacity=".75"/>'
        )
        parts.append(
            f'<text class="name" x="{166 + length:.1f}" y="{y + 17}">{value:,.0f} {e(unit)}</text>'
        )
    return figure(
        width,
        line * len(rows) + 6,
        "; ".join(f"{name}: {value:,.0f} {unit}" for name, value in rows),
        parts,
    )


def legend(groups: Sequence[str] | dict[str, Any]) -> Markup:
    swatch = Markup('<span class="swatch" style="background:{}"></span>{}')
    marks = [swatch.format(colour(i), name) for i, name in enumerate(groups)]
    return Markup('<p class="note">{}</p>').format(Markup("").join(marks))


def key(value: Any) -> str:
    return repr(value)


def text_of(value: Any) -> str:
    return (
        number(value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else str(value)
    )


def _scale_y(marks: Sequence[float], at, left: float, width: int = WIDTH) -> list[str]:
    parts = []
    for y in marks:
        down = at(left, y)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{number(y)}</text>'
        )
    return parts
