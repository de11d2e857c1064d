"""The stores that the points of a sweep need, and how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segfleet.preprocess.building.request import BuildRequest
    from segfleet.sweeps.space.space import Search


MEMBERS = 8  # of an array that makes a store


def lacking(search: Search) -> list[tuple[Path, dict[str, Any]]]:
    """The stores that are not there, and how they are to be."""
    from segfleet.preprocess.stores.manifest import is_published

    section = search.space.prepare
    return [store for store in section.stores() if not is_published(store[0])] if section else []


def missing(search: Search) -> list[BuildRequest]:
    """How the stores are made that are not there. Raises InputError for what is not legal, before
    one is made."""
    return [store_request(search.space.prepare, out, settings) for out, settings in lacking(search)]


def store_request(section: Any, out: Path, settings: dict[str, Any]) -> BuildRequest:
    """How a store of a space is made. Raises InputError."""
    from segfleet.cli.preprocess import request_of
    from segfleet.preprocess.building.request import SPLIT_SEED

    words = {
        key: "x".join(f"{number:g}" for number in settings[key]) if settings[key] else None
        for key in ("patch", "spacing")
    }
    option = [f"{key}={value}" for key, value in section.options.items()]
    overrides = {**settings, **words, "size": tuple(settings["size"]) if settings["size"] else None}
    return request_of(
        section.name, Path(section.raw), out, format=section.format, codec=section.codec,
        workers=None, seed=SPLIT_SEED, option=option, like=None, unlabelled=False, **overrides,
    )  # fmt: skip


def preprocess_words(section: Any, out: Path, settings: dict[str, Any]) -> str:
    """The command that makes a store of a space as a SLURM array."""
    import shlex

    words = ["segfleet", "submit", "--array", str(MEMBERS), "--", "preprocess", section.name]
    words += ["--raw", section.raw, "--out", str(out)]
    words += ["--format", section.format, "--codec", section.codec]
    for key, value in section.options.items():
        words += ["--option", f"{key}={value}"]
    for key, value in settings.items():
        if key == "slices":
            words += ["--slices"] if value else []
        elif key == "size" and value:
            words += ["--size", *map(str, value)]
        elif value:
            text = "x".join(f"{n:g}" for n in value) if isinstance(value, list) else str(value)
            words += [f"--{key}", text]
    return shlex.join(words)
