"""How commands speak: one JSON document on stdout with --json, tables for people, progress and logs
on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document on stdout; everything else goes to stderr."
    ),
]


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
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", stderr: bool = False
) -> None:
    """A table for people. Numbers are set to the right."""
    from rich.table import Table
    from rich.text import Text

    out = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        out.add_column(column, justify="right" if numeric else "left", overflow="fold")
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
        ("case", "field", "found", "expected", "how to mend"),
        rows,
        title=f"{len(rows)} problem(s) in {error.where}",
        stderr=True,
    )


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and remaining time; yields `tick(done, total)`. Without a terminal:
    a line now and then."""
    if not sys.stderr.isatty():
        yield plain_progress(description)
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
        BarColumn(),
        MofNCompleteColumn(),
        Rate(""),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def plain_progress(description: str) -> Callable[[int, int], None]:
    import time

    start, last = time.monotonic(), [0.0]

    def tick(done: int, total: int) -> None:
        now = time.monotonic()
        if now - last[0] < 10 and done < total or not done:
            return
        last[0] = now
        rate = done / max(now - start, 1e-9)
        sys.stderr.write(
            f"{description}: {done}/{total}, {rate:.1f}/s, {(total - done) / max(rate, 1e-9):.0f} "
            "s left\n"
        )

    return tick
