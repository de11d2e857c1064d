"""A sweep asks the ranks of a stage to stop by the file `stop` that a person would make, and takes
back only its own."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from segfleet.core.files import write_atomically

WORDS = "by a sweep\n"


def ask(stage: Path) -> None:
    """Leave the file in a stage's folder, unless there is one."""
    if not (stage / "stop").exists():
        stage.mkdir(parents=True, exist_ok=True)
        write_atomically(stage / "stop", WORDS)


def withdraw(stage: Path) -> None:
    """Remove the file, if a sweep left it."""
    with suppress(OSError, ValueError):
        if (stage / "stop").read_text(encoding="utf-8") == WORDS:
            (stage / "stop").unlink()
