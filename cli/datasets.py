"""`segfleet datasets [NAME [check ROOT | phantom OUT]]`: known raw layouts, their check, and synthetic sets in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.output import Json, problem_table, progress, show, table

ACTIONS = ("check", "phantom")


def command(
    name: Annotated[str | None, typer.Argument(help="A layout; without one, all are listed.")] = None,
    action: Annotated[str | None, typer.Argument(help="check: list every problem of a raw folder. phantom: write a synthetic set.")] = None,
    path: Annotated[Path | None, typer.Argument(help="check: the raw folder. phantom: a new folder.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of the check at most.")] = None,
    cases: Annotated[int | None, typer.Option(min=1, help="Cases of the phantom.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the phantom.")] = 0,
    as_json: Json = False,
) -> None:
    """List raw layouts; check a raw folder (exit code 2 if it has problems); write a synthetic data set."""
    from segfleet.preprocess.problems import InputError

    if name is None:
        show(layouts(), as_json, render_layouts)
    elif action is None:
        show(layouts([known(name)])[0], as_json, render_layout)
    elif action not in ACTIONS:
        raise InputError(f"datasets: found the action '{action}', expected one of: {', '.join(ACTIONS)}")
    elif path is None:
        wanted = "the raw folder" if action == "check" else "a new folder"
        raise InputError(f"datasets: {action} needs a path, {wanted}: segfleet datasets {name} {action} PATH")
    elif action == "check":
        check(known(name), path, workers, as_json)
    else:
        phantom(known(name), path, cases, seed, as_json)


def known(name: str) -> str:
    """The name, if there is such a layout. Raises InputError."""
    from segfleet.preprocess.readers.base import reader_class

    reader_class(name)
    return name


def layouts(names: list[str] | None = None) -> list[dict[str, str]]:
    from segfleet.preprocess.phantom import PHANTOMS
    from segfleet.preprocess.readers.base import reader_class, readers

    found = ((name, reader_class(name)) for name in names or readers())
    return [{"name": name, "about": cls.about, "layout": cls.layout, "phantom": name in PHANTOMS} for name, cls in found]


def render_layouts(found: list[dict[str, Any]]) -> None:
    table(("name", "for", "folder"), [(layout["name"], layout["about"], layout["layout"]) for layout in found])


def render_layout(found: dict[str, Any]) -> None:
    table(("", ""), [(key, value if isinstance(value, str) else "yes" if value else "no") for key, value in found.items()])


def check(name: str, root: Path, workers: int | None, as_json: bool) -> None:
    """One pass over all files. Exit code 2 if anything is wrong; warnings do not count."""
    from segfleet.preprocess.check import survey
    from segfleet.preprocess.problems import DataError
    from segfleet.preprocess.readers.base import open_reader

    with progress("checking raw files") as tick:
        found = survey(open_reader(name, root), workers=workers, progress=tick)
    document = {
        "root": str(root),
        "layout": name,
        "dataset": found.dataset.model_dump(mode="json"),
        "cases": len(found.refs),
        "problems": [problem.as_dict() for problem in found.problems],
        "warnings": [warning.as_dict() for warning in found.warnings],
    }

    def render(_: dict[str, Any]) -> None:
        if found.warnings:
            rows = [(w.case, w.field, w.found, w.expected, w.mend) for w in found.warnings]
            table(("case", "field", "found", "expected", "how to mend"), rows, title=f"{len(rows)} warning(s)", stderr=True)
        if found.problems:
            problem_table(DataError(str(root), list(found.problems)))
        else:
            table(("data set", "cases", "problems", "warnings"), [(found.dataset.name, len(found.refs), 0, len(found.warnings))])

    show(document, as_json, render)
    if found.problems:
        raise typer.Exit(2)


def phantom(name: str, root: Path, cases: int | None, seed: int, as_json: bool) -> None:
    from segfleet.preprocess.phantom import PHANTOMS
    from segfleet.preprocess.problems import InputError

    if name not in PHANTOMS:
        raise InputError(f"datasets: there is no phantom in the layout '{name}', only in: {', '.join(PHANTOMS)}")
    options = {"seed": seed} if cases is None else {"seed": seed, "images" if name == "dsb2018" else "cases": cases}
    PHANTOMS[name](root, **options)
    document = {"root": str(root), "layout": name, "next": f"segfleet preprocess {name} --raw {root} --out STORE"}
    show(document, as_json, lambda found: table(("", ""), list(found.items())))
