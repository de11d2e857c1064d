"""Networks, losses and raw layouts from outside: folders laid out as segfleet is.

    my_lab/models/my_net.py                 builders with `@register`
    my_lab/pipeline/losses/my_loss.py       a class `Loss`
    my_lab/preprocess/readers/my_layout.py  a class `Reader`

Named by `--plugin my_lab`, which sets SEGFLEET_PLUGINS for all processes that are started, or by an
installed package's entry point of the group "segfleet.plugins", whose value is a package. Their
files are found by name like ours, are part of a stage's identity by what they say, and are frozen
with the code of a submitted job.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.core.files import absolute

PLACES = ("models", "pipeline/losses", "preprocess/readers")
VARIABLE = "SEGFLEET_PLUGINS"  # read in models/__init__.py, too, which imports nothing of ours
HOME = Path(__file__).resolve().parents[1]


def folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]


def paths(place: str) -> list[str]:
    """Where modules of a package of ours may lie besides."""
    return [str(folder / place) for folder in folders()]


def files() -> dict[str, Path]:
    """Name in the package -> file, of everything that plugins add."""
    return {name: path for folder in folders() for name, path in files_of(folder).items()}


def files_of(folder: Path) -> dict[str, Path]:
    """The same of one plugin."""
    return {
        str(path.relative_to(folder)): path
        for place in PLACES
        for path in sorted((folder / place).rglob("*.py"))
    }


def add(folder: str | Path) -> None:
    """Use a folder from here on, in this process and those it starts. Raises InputError if there is
    nothing in it to use, or if it names a file as one of ours or of another plugin is named."""
    if not folder:
        raise InputError("--plugin: found nothing after it, expected a folder")
    folder = absolute(folder)
    if folder in folders():
        return
    own = files_of(folder)
    if not own:
        raise InputError(
            f"--plugin: {folder} holds no Python file in {', '.join(PLACES)}; a plugin is a folder "
            "with such folders, such as my_lab/models/my_net.py for --plugin my_lab"
        )
    before = files()
    for name in sorted(own):
        if (HOME / name).exists() or name in before:
            other = "segfleet" if (HOME / name).exists() else str(before[name])
            raise InputError(f"--plugin: {folder / name} is named as one of {other}; rename it")
    os.environ[VARIABLE] = os.pathsep.join(map(str, [*folders(), folder]))
    for place in PLACES:  # of packages that were imported already
        if package := sys.modules.get(f"segfleet.{place.replace('/', '.')}"):
            package.__path__.append(str(folder / place))


def add_installed() -> None:
    """Use what installed packages offer. Raises InputError."""
    for entry in sorted(entry_points(group="segfleet.plugins"), key=lambda entry: entry.name):
        module = find_spec(entry.value)
        for folder in (module and module.submodule_search_locations) or []:
            add(folder)
