"""A folder in the making: others see it complete or not at all, and nobody loses what is theirs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.core.files import sync_folder
from segfleet.core.lock import Lock

MARK = ".segfleet-making"  # in OUT.partial: that it is ours, and the lock of whoever writes there


@contextmanager
def making(out: Path, option: str = "to") -> Iterator[Path]:
    """OUT.partial, empty and ours alone; it becomes `out` at the end, if it holds anything, and is
    gone after an error.

    What a killed process of ours left there goes first. Raises InputError, before anything is
    touched, if `out` exists or has no name, if OUT.partial is not ours, or another process works
    there.
    """
    out = Path(os.path.abspath(out))
    if out.exists() or not out.name:
        raise InputError(f"{option}: {out} exists. Choose a new folder.")
    partial = out.with_name(out.name + ".partial")
    mark = partial / MARK
    if (partial.exists() or partial.is_symlink()) and not mark.is_file():
        raise InputError(
            f"{option}: {partial} is there, where {out.name} would be made, and is none of ours. "
            "Move it away, or choose another folder."
        )
    partial.mkdir(parents=True, exist_ok=True)
    with Lock(mark) as lock:
        if not lock.acquire():
            raise InputError(f"{option}: another process is writing {out}. Wait for it.")
        try:
            _empty(partial)
            yield partial
            if any(not _is_mark(path) for path in partial.iterdir()):
                for path in filter(_is_mark, list(partial.iterdir())):
                    path.unlink()
                os.replace(partial, out)
                sync_folder(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_mark(path: Path) -> bool:
    """The mark itself, or the lease beside it where the file system has no locks."""
    return path.name.startswith(MARK)


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not _is_mark(path):
            path.unlink()
