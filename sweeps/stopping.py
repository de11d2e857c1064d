"""A sweep asks the ranks of a stage to stop by the file `stop` that a person would make, and takes
back only its own. A stage that somebody else trains is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from segfleet.core.files import write_atomically
from segfleet.core.lock import holder, is_locked
from segfleet.pipeline.run import LOCK

WORDS = "by a sweep\n"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who signed the lock of a stage."""

    process: int
    host: str
    job: str  # of SLURM, or ""

    @classmethod
    def of(cls, stage: Path) -> Holder | None:
        """None: nobody holds it at this moment."""
        if not is_locked(stage / LOCK):
            return None
        found = re.fullmatch(r"process (\d+) on (.+?)(?: of job (\S+))?", holder(stage / LOCK))
        if found is None:  # an earlier version, or it has not signed yet
            return cls(process=0, host="", job="")
        return cls(process=int(found[1]), host=found[2], job=found[3] or "")


def ask(stage: Path, ours: Callable[[Holder], bool]) -> bool:
    """Leave the file in a stage's folder, unless there is one. False, and no file: somebody trains
    it who is not `ours`, having begun while our ranks were started."""
    if (found := Holder.of(stage)) and not ours(found):
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
