"""`segfleet datasets [NAME [check ROOT | phantom OUT | slices ROOT]]`: known raw layouts, their
check, synthetic sets, 2.5D slices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from segfleet.cli.options import Json
from segfleet.cli.output import problem_table, progress, show, table
from segfleet.core.files import absolute

# action -> its path
ACTIONS = {
    "check": "the raw folder",
    "phantom": "a new folder",
    "slices": "the raw folder",
    "nnunet": "the raw folder",
}
PROBLEM = ("case", "field", "found", "expected", "how to repair it")
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="An option of the layout, NAME=VALUE; `datasets NAME` lists them."
    ),
]


def command(
    name: Annotated[
        str | None, typer.Argument(help="A layout; without one, all are listed.")
    ] = None,
    action: Annotated[
        str | None,
        typer.Argument(
            help="check: list all problems. phantom: write a synthetic set. slices: 2.5D. "
            "nnunet: the data as a raw folder of nnU-Net."
        ),
    ] = None,
    path: Annotated[
        Path | None, typer.Argument(help="The raw folder; phantom: a new folder.")
    ] = None,
    option: Options = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", help="check: write a copy with repaired labels (0/255, --remap, geometry)."
        ),
    ] = False,
    remap: Annotated[
        list[str] | None, typer.Option(help="check --fix: renumber a label, OLD=NEW.")
    ] = None,
    same_voxels: Annotated[
        bool,
        typer.Option(
            "--same-voxels",
            help="check --fix: labels lie voxel by voxel on their images; their headers are wrong.",
        ),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(help="check --fix, slices, nnunet: the new folder; default: ROOT-mended, ..."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="check: name images that are in this store too, and on which side."),
    ] = None,
    window: Annotated[
        tuple[float, float], typer.Option(help="slices: HU that become -1 and 1.")
    ] = (-200.0, 200.0),
    crop: Annotated[int | None, typer.Option(help="slices: keep the middle N x N pixels.")] = None,
    version: Annotated[
        int, typer.Option(min=1, max=2, help="nnunet: the version of nnU-Net that will read it.")
    ] = 2,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of the check at most.")
    ] = None,
    cases: Annotated[int | None, typer.Option(min=1, help="Cases of the phantom.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the phantom.")] = 0,
    as_json: Json = False,
) -> None:
    """List raw layouts; check a raw folder (exit code 2 if it has problems); write a synthetic data
    set or 2.5D slices."""
    from segfleet.core.errors import InputError
    from segfleet.preprocess.readers.base import open_reader

    if name is None:
        show(layouts(), as_json, render_layouts)
    elif action is None:
        show(layouts([checked_name(name)])[0], as_json, render_layout)
    elif action not in ACTIONS:
        raise InputError(
            f"datasets: found the action '{action}', expected one of: {', '.join(ACTIONS)}"
        )
    elif path is None:
        raise InputError(
            f"datasets: {action} needs a path, {ACTIONS[action]}: segfleet datasets {name} "
            f"{action} PATH"
        )
    elif action == "phantom":
        phantom(checked_name(name), path, cases, seed, as_json)
    elif action == "slices":
        slices(
            open_reader(name, path, **chosen(option)),
            beside(path, to, "slices"),
            window,
            crop,
            workers,
            as_json,
        )
    elif action == "nnunet":
        nnunet(
            open_reader(name, path, **chosen(option)),
            beside(path, to, "nnunet"),
            version,
            workers,
            as_json,
        )
    elif fix:
        fixed(
            name,
            path,
            chosen(option),
            beside(path, to, "mended"),
            renumbered(remap or []),
            same_voxels,
            workers,
            against,
            as_json,
        )
    else:
        check(name, path, chosen(option), workers, against, as_json)


def checked_name(name: str) -> str:
    """The name, if there is such a layout. Raises InputError."""
    from segfleet.preprocess.readers.base import reader_class

    reader_class(name)
    return name


def chosen(options: list[str] | None) -> dict[str, str]:
    """NAME=VALUE pairs. Raises InputError."""
    from segfleet.core.errors import InputError

    pairs = [option.partition("=") for option in options or []]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise InputError(f"option: found '{key}{equals}{value}', expected NAME=VALUE")
    return {key: value for key, _, value in pairs}


def renumbered(rules: list[str]) -> dict[int, int]:
    from segfleet.core.errors import InputError

    pairs = [rule.partition("=") for rule in rules]
    for old, _, new in pairs:
        if not (old.isdecimal() and new.isdecimal() and int(new) < 256):
            raise InputError(f"remap: found '{old}={new}', expected OLD=NEW, two label values")
    return {int(old): int(new) for old, _, new in pairs}


def beside(root: Path, to: Path | None, suffix: str) -> Path:
    root = absolute(root)
    return to or root.with_name(f"{root.name}-{suffix}")


def layouts(names: list[str] | None = None) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from segfleet.core.errors import InputError
    from segfleet.preprocess.phantoms.phantom import PHANTOMS
    from segfleet.preprocess.readers.base import reader_class, readers

    uses = recipes()
    rows = []
    for name in names or readers():
        try:
            cls = reader_class(name)
        except InputError as error:
            if names:
                raise
            typer.echo(f"segfleet: {error}", err=True)
            continue
        details = {
            "about": cls.about,
            "layout": cls.layout,
            **asdict(cls.facts),
            "options": {k: list(v) for k, v in cls.options.items()},
        }
        using = [recipe for recipe, text in uses if f"preprocess {name} " in text]
        rows.append({"name": name, **details, "recipes": using, "phantom": name in PHANTOMS})
    return rows


def recipes() -> list[tuple[str, str]]:
    """Shipped recipes and their text; each says in its header which layout its data come from."""
    import importlib.util

    spec = importlib.util.find_spec("segfleet.pipeline")
    folders = (
        [Path(place) / "recipes" for place in (spec.submodule_search_locations or [])]
        if spec
        else []
    )
    return [
        (path.stem, path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted(folder.glob("*.yaml"))
    ]


def render_layouts(described: list[dict[str, Any]]) -> None:
    columns = ("name", "what", "cases", "recipes", "licence and download")
    rows = []
    for d in described:
        source = f"{d['licence']}\n{d['download']}".strip()
        rows.append(
            (
                d["name"],
                f"{d['dims']} {d['modality']}",
                d["complete"] or "",
                "\n".join(d["recipes"]),
                source,
            )
        )
    table(columns, rows, title="all that is known of one: segfleet datasets NAME")


def render_layout(layout: dict[str, Any]) -> None:
    options = "; ".join(
        f"{name}: {' | '.join(values)}" for name, values in layout["options"].items()
    )
    plain = {**layout, "options": options, "recipes": ", ".join(layout["recipes"])}
    table(
        ("", ""),
        [(key, "yes" if value is True else value) for key, value in plain.items() if value],
    )


def check(
    name: str, root: Path, options: dict[str, str], workers: int | None, against: Path | None,
    as_json: bool,
    repaired: list[dict] | None = None,
) -> None:  # fmt: skip
    """One pass over all files. Exit code 2 if anything is wrong; warnings do not count."""
    from collections import Counter

    from segfleet.core.errors import DataError
    from segfleet.preprocess.building.kept import cached_cases, settle
    from segfleet.preprocess.checking.check import survey
    from segfleet.preprocess.checking.duplicates import shared
    from segfleet.preprocess.readers.base import open_reader
    from segfleet.preprocess.stores.manifest import load_manifest

    reader, other = open_reader(name, root, **options), load_manifest(against) if against else None
    with progress("checking raw files") as on_progress:
        surveyed = survey(reader, workers=workers, progress=on_progress, known=cached_cases(reader))
    settle(reader, surveyed)
    warnings = [*surveyed.warnings, *(shared(surveyed.facts, other) if other else ())]
    document = {
        "root": str(root),
        "layout": name,
        "dataset": surveyed.dataset.model_dump(mode="json"),
        "cases": len(surveyed.refs),
        "complete": reader.facts.complete,
        "patients": len({ref.group or ref.id for ref in surveyed.refs}),
        "orientations": dict(
            sorted(Counter(case.orientation for case in surveyed.facts if case.orientation).items())
        ),
        "grouping": grouping_of(surveyed.grouping),
        "splits": {split: len(folds) for split, folds in reader.splits().items()},
        "problems": [problem.as_dict() for problem in surveyed.problems],
        "warnings": [warning.as_dict() for warning in warnings],
    } | ({} if repaired is None else {"mended": repaired})

    def render(_: dict[str, Any]) -> None:
        if repaired:
            rows = [tuple(change.values()) for change in repaired]
            table(
                ("case", "field", "was", "now"),
                rows,
                title=f"{len(rows)} label(s) repaired in the copy {root}; the original is "
                "unchanged",
            )
        if warnings:
            rows = [(w.case, w.field, w.found, w.expected, w.mend) for w in warnings]
            table(PROBLEM, rows, title=f"{len(rows)} warning(s)", stderr=True)
        if surveyed.problems:
            problem_table(DataError(str(root), list(surveyed.problems)))
        else:
            cases = f"{len(surveyed.refs):,}" + (
                f" of {reader.facts.complete:,}" if reader.facts.complete else ""
            )
            row = (
                surveyed.dataset.name,
                cases,
                document["patients"],
                0,
                len(warnings),
                ", ".join(document["splits"]),
            )
            table(
                ("data set", "cases", "patients", "problems", "warnings", "splits it comes with"),
                [row],
            )
            grouping = document["grouping"]
            if document["orientations"]:
                counts = [f"{name} {count}" for name, count in document["orientations"].items()]
                typer.echo(f"file axes x, y, z lead to: {', '.join(counts)}")
            typer.echo(f"patients: {grouping['rule']} ({grouping['evidence']})")

    show(document, as_json, render)
    if surveyed.problems:
        raise typer.Exit(2)


def grouping_of(grouping) -> dict[str, Any]:
    """How cases came to their patients, as JSON."""
    return {
        "rule": grouping.rule,
        "evidence": grouping.evidence,
        "guess": grouping.guess,
    }


def fixed(
    name: str, root: Path, options: dict[str, str], out: Path, remap: dict[int, int],
    same_voxels: bool, workers: int | None, against: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write a repaired copy and check that; without anything to repair, check the original."""
    from segfleet.preprocess.checking.repair import repair
    from segfleet.preprocess.readers.base import open_reader

    repaired = repair(open_reader(name, root, **options), out, remap, same_voxels=same_voxels)
    check(name, out if repaired else root, options, workers, against, as_json, repaired)


def phantom(name: str, root: Path, cases: int | None, seed: int, as_json: bool) -> None:
    from segfleet.core.errors import InputError
    from segfleet.preprocess.phantoms.phantom import PHANTOMS

    if name not in PHANTOMS:
        raise InputError(
            f"datasets: there is no phantom in the layout '{name}', only in: {', '.join(PHANTOMS)}"
        )
    options = (
        {"seed": seed}
        if cases is None
        else {"seed": seed, "images" if name == "dsb2018" else "cases": cases}
    )
    PHANTOMS[name](root, **options)
    document = {
        "root": str(root),
        "layout": name,
        "next": f"segfleet preprocess {name} --raw {root} --out STORE",
    }
    show(document, as_json, lambda shown: table(("", ""), list(shown.items())))


def slices(
    reader,
    out: Path,
    window: tuple[float, float],
    crop: int | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Volumes, once they are checked, to slices of three neighbours, for the layout npy."""
    from segfleet.preprocess.checking.slices import write_slices

    with progress("checking and slicing volumes") as on_progress:
        count = write_slices(reader, out, window, crop, on_progress, workers)
    document = {
        "root": str(out),
        "layout": "npy",
        "slices": count,
        "next": f"segfleet preprocess npy --raw {out} --out STORE",
    }
    show(document, as_json, lambda shown: table(("", ""), list(shown.items())))


def nnunet(reader, out: Path, version: int, workers: int | None, as_json: bool) -> None:
    """Any layout, once it is checked, as a raw folder of nnU-Net."""
    from segfleet.preprocess.exporting.nnunet import write_nnunet

    with progress("checking and writing cases") as on_progress:
        count = write_nnunet(reader, out, version, on_progress, workers)
    document = {"root": str(out), "layout": "nnunet", "version": version, "cases": count}
    show(document, as_json, lambda shown: table(("", ""), list(shown.items())))
