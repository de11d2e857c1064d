"""A sweep asks the ranks of a stage to stop by the file `stop` that a person would make, and takes
back only its own. A stage that another process trains is left alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from segfleet.core.files import write_atomically
from segfleet.core.lock import Holder, holder, is_locked
from segfleet.pipeline.run import LOCK

WORDS = "by a sweep\n"


def ask(stage: Path, is_own: Callable[[Holder], bool]) -> bool:
    """Leave the file in a stage's folder, unless there is one. False, and no file: it is
    trained by a process that is not `is_own` and began while our ranks were started."""
    if is_locked(stage / LOCK):
        signed = holder(stage / LOCK)  # None: it has not signed yet
        if signed is None or not is_own(signed):
            return False
    if not (stage / "stop").exists():
        stage.mkdir(parents=True, exist_ok=True)
        write_atomically(stage / "stop", WORDS)
    return True


def withdraw(stage: Path) -> None:
    """Remove the file, if a sweep left it."""
    with suppress(OSError, ValueError):
        if (stage / "stop").read_text(encoding="utf-8") == WORDS:
            (stage / "stop").unlink()
