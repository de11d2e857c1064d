"""Charts of a report as inline SVG: curves over steps, cases along a scale. No drawing library, a
few kilobytes each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from markupsafe import escape as e

Point = tuple[float, float]
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 38, 36
MOST = 400  # points of a curve


def figure(width: int, height: int, text: str, parts: Sequence[str]) -> Markup:
    """SVG of parts, whose texts are escaped; `text` is for screen readers."""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{e(text)}">'
    return Markup(f"<figure>{head}{''.join(parts)}</svg></figure>")


def curve(
    title: str,
    points: Sequence[Point],
    stages: Sequence[tuple[float, str]] = (),
    *,
    dots: bool = False,
) -> Markup:
    """A line over training steps, broken between stages; `stages` are (first step, name). Long
    ones: a running mean over faint values."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return Markup("<figure><figcaption>{}: nothing was recorded.</figcaption></figure>").format(
            title
        )
    lines = [thinned(line) for line in broken(points, [first for first, _ in stages])]
    points = [point for line in lines for point in line]
    ticks_y, right = (
        ticks(min(y for _, y in points), max(y for _, y in points)),
        max(max(x for x, _ in points), 1.0),
    )
    ticks_x = [x for x in ticks(0, right) if x <= right * 1.001]
    low, high = ticks_y[0], ticks_y[-1]

    def at(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / right
        return (
            f"{across:.1f}",
            f"{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low):.1f}",
        )

    parts = [f'<text class="title" x="{LEFT}" y="15">{e(title)}</text>']
    for y in ticks_y:
        _, down = at(0, y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{float(down) + 4:.1f}" text-anchor="end">{number(y)}</text>'
        )
    for x in ticks_x:
        across, _ = at(x, low)
        parts.append(
            f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'
    )
    for first, name in stages if len(stages) > 1 else ():
        across, _ = at(first, low)
        if first:
            parts.append(
                f'<line class="stage" x1="{across}" x2="{across}" y1="{TOP}" '
                f'y2="{HEIGHT - BOTTOM}"/>'
            )
        parts.append(f'<text x="{across}" y="{TOP - 6}">{e(shortened(name))}</text>')
    for line in lines:
        if len(line) > 60 and not dots:
            parts.append(_path("faint", line, at))
            line = running_mean(line)
        parts.append(_path("curve", line, at))
    if dots or len(points) < 3:
        for x, y in points:
            across, down = at(x, y)
            parts.append(
                f'<circle class="dot" cx="{across}" cy="{down}" r="3.5"><title>step {number(x)}: '
                f"{number(y)}</title></circle>"
            )
    (first, start), (last, end) = points[0], points[-1]
    text = (
        f"{title} from step {number(first)} to {number(last)}: first {number(start)}, last "
        f"{number(end)}"
    )
    return figure(WIDTH, HEIGHT, text, parts)


def strips(rows: Sequence[dict[str, Any]]) -> Markup:
    """Dice of every case as a dot on a scale from 0 to 1, one line per structure, with mean and
    interval.

    rows: [{"name", "values": [(case, dice)], "mean", "ci95"}].
    """
    width, line, left = 1060, 46, 170
    height = line * len(rows) + 30

    def at(value: float) -> float:
        return left + (width - left - 20) * value

    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(
            f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="4" '
            f'y2="{height - 22}"/>'
        )
        parts.append(
            f'<text x="{at(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
        )
    for index, row in enumerate(rows):
        middle = 4 + line * index + line / 2
        parts.append(
            f'<text class="name" x="{left - 14}" y="{middle + 4:.1f}" '
            f'text-anchor="end">{e(shortened(row["name"]))}</text>'
        )
        if row["ci95"]:
            low, high = map(at, row["ci95"])
            parts.append(
                f'<rect class="interval" x="{low:.1f}" width="{max(high - low, 1):.1f}" '
                f'y="{middle - 17:.1f}" height="34"/>'
            )
        for number_, (case, value) in enumerate(row["values"]):
            # spreads dots of equal value, the same every time
            shift = (number_ * 0.618034 % 1 - 0.5) * 22
            tip = f"<title>{e(case)}: {value:.3f}</title>"
            parts.append(
                f'<circle class="dot" cx="{at(value):.1f}" cy="{middle + shift:.1f}" '
                f'r="3.5">{tip}</circle>'
            )
        if row["mean"] is not None:
            x = at(row["mean"])
            parts.append(
                f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 17:.1f}" '
                f'y2="{middle + 17:.1f}"/>'
            )
    text = "Dice of every case. " + ". ".join(
        f"{row['name']}: mean {'missing' if row['mean'] is None else format(row['mean'], '.3f')}, "
        f"{len(row['values'])} cases"
        for row in rows
    )
    return figure(width, height, text, parts)


def slopes(title: str, runs: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Every case as a line from run to run, at most MOST of them, and the mean as a thick one.

    rows: [(case, a value per run)], none missing.
    """
    if not rows:
        return Markup(
            "<figure><figcaption>{}: no case has a value in every run.</figcaption></figure>"
        ).format(title)
    every = [value for _, values in rows for value in values]
    marks = ticks(min(every), max(every))
    low, high = marks[0], marks[-1]
    across = [
        LEFT + 40 + (WIDTH - LEFT - RIGHT - 80) * i / max(1, len(runs) - 1)
        for i in range(len(runs))
    ]

    def line(values: Sequence[float]) -> str:
        return " ".join(
            f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low):.1f}"
            for x, y in zip(across, values, strict=True)
        )

    parts = [f'<text class="title" x="{LEFT}" y="15">{e(title)}</text>']
    for y in marks:
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{number(y)}</text>'
        )
    parts += [
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
        f"{e(shortened(name))}</text>"
        for x, name in zip(across, runs, strict=True)
    ]
    for case, values in rows[:: -(-len(rows) // MOST)]:
        text = ", ".join(f"{value:.3f}" for value in values)
        parts.append(
            f'<polyline class="faint" points="{line(values)}">'
            f"<title>{e(case)}: {text}</title></polyline>"
        )
    means = [sum(values) / len(rows) for values in zip(*(v for _, v in rows), strict=True)]
    parts.append(f'<polyline class="middle" points="{line(means)}"/>')
    text = "; ".join(f"{name}: mean {mean:.3f}" for name, mean in zip(runs, means, strict=True))
    return figure(WIDTH, HEIGHT, f"{title}, {len(rows)} cases. {text}", parts)


def broken(points: Sequence[Point], starts: Sequence[float]) -> list[list[Point]]:
    """The points of each stage; stages without any are left out. A stage's first step is the one
    after its start."""
    borders = [-math.inf, *starts[1:], math.inf]
    pieces = [
        [p for p in points if low < p[0] <= high]
        for low, high in zip(borders, borders[1:], strict=False)
    ]
    return [piece for piece in pieces if piece]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST points: means of neighbours."""
    size = math.ceil(len(points) / MOST)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
        for chunk in chunks
    ]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over about a fifteenth of the curve around each point."""
    reach = max(1, len(points) // 30)
    means = []
    for i, (x, _) in enumerate(points):
        window = points[max(0, i - reach) : i + reach + 1]
        means.append((x, sum(y for _, y in window) / len(window)))
    return means


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about five."""
    if high <= low:
        reach = abs(low) * 0.1 or 1.0
        low, high = low - reach, high + reach
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 1200 -> 1200, 0.00025 -> 2.5e-04."""
    return (
        f"{value:.0f}"
        if abs(value) >= 1000
        else f"{value:.4g}"
        if value == 0 or abs(value) >= 1e-3
        else f"{value:.1e}"
    )


def shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "\u2026"


def _path(kind: str, points: Sequence[Point], at) -> str:
    return f'<polyline class="{kind}" points="{" ".join(",".join(at(x, y)) for x, y in points)}"/>'
