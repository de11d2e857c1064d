"""Who may work at a store in the making: one process alone, or several that share the work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.core.lock import Lock
from segfleet.preprocess.building.shard_job import STATE


@contextmanager
def locked(partial: Path, out: Path, shared: bool = False) -> Iterator[None]:
    """Hold OUT.partial for this process alone, or `shared` with others that share, never with one
    that is alone.

    The lock ends with the process, however that ends. Raises InputError if it cannot be had.
    """
    if partial.exists() and not (partial / STATE).is_dir():
        raise InputError(
            f"out: {partial} is there, where {out.name} would be made, and is none of ours. Move "
            "it away, or choose another --out."
        )
    (partial / STATE / "done").mkdir(parents=True, exist_ok=True)
    with Lock(partial / STATE / "claim", shared=shared) as lock:
        if not lock.acquire():
            raise InputError(
                f"out: another process is preprocessing into {out}. Wait for it, or choose "
                "another --out."
            )
        try:
            yield
        finally:
            if (
                not shared
                and partial.exists()
                and not any(path.is_file() and path.name != "claim" for path in partial.rglob("*"))
            ):
                shutil.rmtree(partial)
