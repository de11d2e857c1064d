"""What a launcher is: something that starts the ranks of a run and leaves a handle on them. `local` and `slurm` are two."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from segfleet.slurm.jobspec import JobSpec

# stopped: saved, resumable; lost: nobody knows of it; unknown: whoever knows does not answer
STATES = ("queued", "running", "done", "stopped", "cancelled", "failed", "lost", "unknown")


class JobHandle(Protocol):
    """A run that was started. Any later process can make the same handle from the run's folder."""

    run: Path
    id: str

    def state(self) -> str:
        """One of STATES."""

    def reason(self) -> str | None:
        """Why it waits, or what went wrong, in the words of the first failing rank."""

    def cancel(self) -> None:
        """Stop it in order: it saves first. Nothing happens to one that has ended."""


class Launcher(Protocol):
    def submit(self, run: Path, recipe: dict[str, Any], root: Path, spec: JobSpec) -> JobHandle:
        """Start the ranks that train `recipe` into the run folder `run` below `root`. Raises InputError if that can never work."""
