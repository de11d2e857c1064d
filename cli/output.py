"""How commands speak: one JSON document on stdout with --json, tables for people, progress and logs
on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def show(document: Any, as_json: bool, render: Callable[[Any], None]) -> None:
    """Print `document` as JSON, or let `render` print it for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        render(document)


def console(stderr: bool = False):
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=False, highlight=False)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str = "",
    stderr: bool = False,
    whole: Collection[str] = (),
) -> None:
    """A table for people. Numbers are set to the right; columns in `whole` are never broken."""
    from rich.table import Table
    from rich.text import Text

    out = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        out.add_column(
            column, justify="right" if numeric else "left", overflow="fold", no_wrap=column in whole
        )
    for row in rows:
        out.add_row(
            *(
                Text(
                    f"{cell:,}"
                    if isinstance(cell, int) and not isinstance(cell, bool)
                    else str(cell)
                )
                for cell in row
            )
        )
    console(stderr).print(out)


def problem_table(error) -> None:
    """All problems of a DataError at once, on stderr."""
    rows = [(p.case, p.field, p.found, p.expected, p.mend) for p in error.problems]
    table(
        ("case", "field", "found", "expected", "how to repair it"),
        rows,
        title=f"{len(rows)} problem(s) in {error.where}",
        stderr=True,
    )


OnProgress = Callable[..., None]


@contextmanager
def progress(description: str) -> Iterator[OnProgress]:
    """A bar on stderr with rate and remaining time; yields `on_progress(done, total, phase)`.
    Another `phase` (by default `description`) begins another bar; what stands in it after a comma
    is shown and may change at any time. Without a terminal: a line every ten seconds and at the end
    of a phase."""
    if not sys.stderr.isatty():
        yield PlainProgress(description)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class Rate(TextColumn):
        def render(self, task):
            from rich.text import Text

            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        Rate(""),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        shown: dict[str, Any] = {"phase": None, "task": None}

        def on_progress(done: int, total: int, phase: str = description) -> None:
            name = phase.partition(",")[0]
            if name != shown["phase"]:
                if shown["task"] is not None:
                    bar.remove_task(shown["task"])
                shown.update(phase=name, task=bar.add_task(phase, total=total, completed=done))
            bar.update(shown["task"], completed=done, total=total, description=phase)

        yield on_progress


class PlainProgress:
    """Progress as lines: at most one every ten seconds, and one at the end of every phase."""

    EVERY = 10.0

    def __init__(self, description: str):
        self.description = description
        self.phase, self.start, self.first, self.last = "", 0.0, 0, 0.0

    def __call__(self, done: int, total: int, phase: str | None = None) -> None:
        import time

        phase, now = phase or self.description, time.monotonic()
        if (name := phase.partition(",")[0]) != self.phase:
            self.phase, self.start, self.first, self.last = name, now, done, now
        elif done < self.first:  # cut back to the last checkpoint by a resume
            self.start, self.first = now, done
        if now - self.last < self.EVERY and done < total or done == self.first:
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = "" if done >= total else f", {duration((total - done) / max(rate, 1e-9))} left"
        sys.stderr.write(f"{phase}: {done}/{total}, {rate:.1f}/s{left}\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
