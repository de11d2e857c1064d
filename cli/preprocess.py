"""`segfleet preprocess NAME --raw DIR --out STORE`: a raw data set becomes an immutable shard
store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import MissingParameter

from segfleet.cli.datasets import PROBLEM, Options, chosen, grouping_of
from segfleet.cli.options import Json
from segfleet.cli.output import progress, show, table
from segfleet.core.files import absolute

if TYPE_CHECKING:
    from segfleet.core.errors import Problem
    from segfleet.preprocess.building.request import BuildRequest

MOST_WARNINGS = 20  # that are shown
PHASES = {
    "check": "checking raw files",
    "write": "writing cases",
    "compare": "comparing raw files with the store",
}


def command(
    name: Annotated[
        str | None, typer.Argument(help="Layout of the raw data; `segfleet datasets` lists them.")
    ] = None,
    raw: Annotated[Path | None, typer.Option(help="Folder of the raw data set.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Store to make. It appears when it is complete.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="zarr | hdf5. HDF5 for very many small images or when inodes are scarce."
        ),
    ] = "zarr",
    codec: Annotated[
        str,
        typer.Option(
            help="blosc | zstd, of the store's chunks. Bare Zstandard is smaller and is read where "
            "there is no blosc, but takes several times as long to unpack."
        ),
    ] = "blosc",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes at most; default: what cores, memory and work suggest."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the five-fold split.")] = 12345,
    option: Options = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Resize every 2D image to Y X pixels, as papers do; scores stay native."),
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option(
            help="Patch instead of the planned one, voxels: 64x128x128 (z, y, x), 256x256 in 2D."
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Target spacing instead of the planned one, mm: 2.5x1x1 (z, y, x)."),
    ] = None,
    slices: Annotated[
        bool,
        typer.Option(
            "--slices", help="A 3D data set for 2D networks: never resampled across its slices."
        ),
    ] = False,
    interpolation: Annotated[
        str | None,
        typer.Option(help="Of images that are resized: cubic (default) | bilinear | area."),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(help="How masks are resized: linear (default) | nearest | nearest-exact."),
    ] = None,
    normalisation: Annotated[
        str | None,
        typer.Option(
            help="Of every channel instead of the planned one: zscore | rgb_to_0_1 | imagenet | "
            "rescale_to_0_1 | minmax | minmax255 | none."
        ),
    ] = None,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled", help="Images alone, for a stage of `task: reconstruct`; any layout."
        ),
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(help="Preprocess as this store was: a test set for the runs trained on it."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then read every chunk back and compare all checksums.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Of a finished store compare sizes and times, not hashes."),
    ] = False,
    on: Annotated[
        str,
        typer.Option(help="local | ray: shares on the nodes of a running Ray cluster (--address)."),
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="With --on ray: host:port of the cluster, or auto.")
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(min=1, help="With --on ray: shares; default: the cluster's cores."),
    ] = None,
    upgrade: Annotated[
        Path | None,
        typer.Option(
            help="Only rewrite the manifest of this store, made by an earlier version, as this one "
            "does: it opens faster. Its id and shards stay."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a raw data set, plan, and write it as shards with a manifest.

    A run that was stopped goes on where it was; a second run on a finished store only compares.
    """
    from segfleet.preprocess.building.build import build

    if upgrade:
        return rewrite(upgrade, as_json)
    request = request_of(
        name, raw, out, format=format, codec=codec, workers=workers, seed=seed, option=option,
        size=size, patch=patch, spacing=spacing,
        interpolation=interpolation, masks=masks, normalisation=normalisation, slices=slices,
        like=like, unlabelled=unlabelled,
    )  # fmt: skip
    if on != "local" or address or members:
        on_cluster(request, on, address, members)
    first: dict[str, int] = {}
    reported: list[Any] = []
    with bars(first) as on_progress:
        manifest = build(
            request,
            quick=quick,
            progress=on_progress,
            report=lambda grouping, warnings: reported.extend((grouping, warnings)),
        )
    if verify:
        check_store(out)
    status = "up to date" if "write" not in first else "continued" if first["write"] else "written"
    grouping, warnings = reported
    if warnings:
        title = f"{len(warnings)} warning(s)"
        if len(warnings) > MOST_WARNINGS:
            title += f", the first {MOST_WARNINGS}; all: segfleet datasets {name} check {raw}"
        rows = [(w.case, w.field, w.found, w.expected, w.mend) for w in _first(warnings)]
        table(PROBLEM, rows, title=title, stderr=True)
    summary = document(manifest, out, status, verify)
    summary["grouping"] = grouping_of(grouping)
    summary["warnings"] = [warning.as_dict() for warning in warnings]
    show(summary, as_json, render)


def _first(warnings: Sequence[Problem]) -> list[Problem]:
    """Those of the whole data set before those of single cases."""
    return sorted(warnings, key=lambda warning: warning.case != "all")[:MOST_WARNINGS]


def request_of(
    name: str | None, raw: Path | None, out: Path | None, *, format: str, codec: str,
    workers: int | None, seed: int,
    option: list[str] | None, patch: str | None, spacing: str | None, like: Path | None,
    unlabelled: bool, **arguments: Any,
) -> BuildRequest:  # fmt: skip
    """What the command's arguments ask for; the further ones that are fields of `Overrides` go
    there. Raises InputError for what shows before any image is read."""
    from segfleet.preprocess.building.build import open_raw
    from segfleet.preprocess.building.request import BuildRequest
    from segfleet.preprocess.planning.plan import Overrides

    for value, hint, kind in (
        (name, "NAME", "argument"),
        (raw, "--raw", "option"),
        (out, "--out", "option"),
    ):
        if value is None:
            raise MissingParameter(param_hint=f"'{hint}'", param_type=kind)
    overrides = Overrides(
        patch=numbers("patch", patch, int),
        spacing=numbers("spacing", spacing, float),
        like=str(absolute(like)) if like else None,
        **{
            field.name: arguments[field.name]
            for field in fields(Overrides)
            if field.name in arguments
        },
    )
    options = chosen(option) | ({"unlabelled": "yes"} if unlabelled else {})
    request = BuildRequest(
        name, raw, out, format=format, codec=codec, options=options, overrides=overrides,
        split_seed=seed, workers=workers
    )  # fmt: skip
    open_raw(request)
    return request


def on_cluster(request: BuildRequest, on: str, address: str | None, members: int | None) -> None:
    """Have a cluster do what can be shared; what went wrong there is done again here. Raises
    InputError."""
    from segfleet.core.errors import InputError
    from segfleet.preprocess.readers.base import open_reader
    from segfleet.sweeps.ray.preprocess import spread

    if on != "ray":
        problem = "--address and --members say where" if on == "local" else f"found '{on}'"
        raise InputError(f"--on: {problem}; expected --on ray (or local without them)")
    shared = replace(request, raw=absolute(request.raw), out=absolute(request.out))
    cases = len(open_reader(request.reader_name, request.raw, **request.options).refs())
    with bars({}) as on_progress:
        faults = spread(shared, address or "auto", members, cases, on_progress)
    for fault in faults[:MOST_WARNINGS]:
        typer.echo(f"segfleet: a share failed on the cluster and is done here: {fault}", err=True)


def rewrite(store: Path, as_json: bool) -> None:
    """Bring the manifest of a store up to date, and say so."""
    from segfleet.preprocess.stores.manifest import load_manifest, upgrade

    changed = upgrade(store)
    manifest = load_manifest(store)
    status = "upgraded" if changed else "up to date"
    summary = {
        "store": str(store),
        "status": status,
        "id": manifest.id,
        "version": manifest.version,
    }
    show(
        summary,
        as_json,
        lambda summary: typer.echo(
            f"{store}: {status}, version {manifest.version}, id {manifest.id}"
        ),
    )


def numbers(name: str, text: str | None, kind: type) -> tuple | None:
    """Numbers of "16x64x64" or "16,64,64". Raises InputError."""
    from segfleet.core.errors import InputError

    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise InputError(
            f"{name}: found '{text}', expected {'whole ' if kind is int else ''}numbers such as "
            "16x64x64"
        ) from None


@contextmanager
def bars(first: dict[str, int]) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per phase, over what this run does. `first` learns how much of each phase was
    done before it."""
    with ExitStack() as stack:
        by_phase: dict[str, Callable[[int, int], None]] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in by_phase:
                stack.close()
                first[phase], by_phase[phase] = done, stack.enter_context(progress(PHASES[phase]))
            by_phase[phase](done - first[phase], total - first[phase])

        yield report


def check_store(out: Path) -> None:
    """Raises DataError with every damaged file and case."""
    from segfleet.core.errors import DataError
    from segfleet.preprocess.stores.verify import verify

    if problems := verify(out, chunks=True):
        raise DataError(str(out), problems)


def document(manifest, out: Path, status: str, verified: bool) -> dict[str, Any]:
    return {
        "store": str(out),
        "status": status,
        "id": manifest.id,
        "format": manifest.format,
        "codec": manifest.codec,
        "dataset": manifest.dataset.model_dump(mode="json"),
        "cases": len(manifest.cases),
        "patients": len(set(manifest.cases.column("group"))),
        "plan": manifest.plan.model_dump(mode="json"),
        "splits": {name: len(folds) for name, folds in manifest.splits.items()},
        "files": len(manifest.files),
        "bytes": sum(file["bytes"] for file in manifest.files.values()),
        "verified": verified,
    }


def render(summary: dict[str, Any]) -> None:
    plan, dataset = summary["plan"], summary["dataset"]
    anisotropic = (
        ""
        if plan["anisotropic_axis"] is None
        else f", axis {'zyx'[plan['anisotropic_axis']]} resampled apart"
    )
    spacing = " x ".join(f"{s:g}" if s else "as it is" for s in plan["target_spacing"])
    spacing += f" mm (z, y, x){anisotropic}"
    if plan["transpose"] != [0, 1, 2]:
        spacing += (
            f"; z, y, x are axes {', '.join('zyx'[a] for a in plan['transpose'])} of the files"
        )
    rows = [
        (
            "store",
            f"{summary['store']} ({summary['status']}"
            f"{', verified' if summary['verified'] else ''})",
        ),
        ("id", summary["id"]),
        (
            "data set",
            f"{dataset['name']}, {dataset['dims']}D, {summary['cases']} cases of "
            f"{summary['patients']} patients",
        ),
        ("patients", f"{summary['grouping']['rule']} ({summary['grouping']['evidence']})"),
        ("labels", _labels(dataset)),
        (
            "channels",
            ", ".join(
                f"{c} ({n})"
                for c, n in zip(dataset["channels"], plan["normalisation"], strict=True)
            ),
        ),
        ("size", " x ".join(map(str, plan["size"][1:])) + " for every image")
        if plan["size"]
        else ("spacing", spacing),
        ("median case", " x ".join(map(str, plan["median_shape"]))),
        ("patch", f"{' x '.join(map(str, plan['patch']))}, {plan['batch']} fit into 8 GB"),
        ("splits", ", ".join(f"{name} ({n})" for name, n in summary["splits"].items())),
        (
            "size",
            f"{summary['bytes'] / 2**20:.1f} MiB in {summary['files']} files ({summary['format']}, "
            f"{plan['dtype']})",
        ),
    ]
    table(("", ""), rows)
    if any(dataset["labels"].values()) or dataset["regions"]:
        typer.echo(f"next: segfleet train auto data.store={summary['store']}")
    else:
        typer.echo(f"next: a stage with task=reconstruct and data.store={summary['store']}")


def _labels(dataset: dict[str, Any]) -> str:
    names = dataset["regions"] or dataset["labels"]
    return ", ".join(names) if len(names) > 1 or dataset["regions"] else "none: images alone"
