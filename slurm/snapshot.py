"""The code as it is now, kept for jobs that start later: RUNS/.code/<hash>/segfleet/, one folder
per version, shared by all runs."""

from __future__ import annotations

import compileall
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

from segfleet.core import plugins

ROOMS = ("cli", "core", "models", "pipeline", "preprocess", "slurm", "sweeps")
SOURCE = Path(__file__).resolve().parents[1]  # the checkout, or the installed package


def freeze_code(root: Path, source: Path = SOURCE) -> Path:
    """Copy segfleet to `root`/.code/<hash of its content>, unless it is there; the folder to put on
    the Python path."""
    target = root / ".code" / digest(source)
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    for name, path in files_of(source).items():
        copy = partial / "segfleet" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    # Compiled here once, not by every rank at every start; Python compares it with the source,
    # whose hash is the code's. A Python of another version, in a container, compiles for itself.
    compileall.compile_dir(
        partial,
        stripdir=partial,
        prependdir=target,
        quiet=2,
        invalidation_mode=PycInvalidationMode.CHECKED_HASH,
    )
    try:
        os.rename(partial, target)
    except OSError:  # another submission was quicker
        shutil.rmtree(partial)
    return target


def frozen(root: Path, version: str) -> Path | None:
    """The folder of a version that was frozen there, or None."""
    target = Path(root) / ".code" / version
    return target if target.is_dir() else None


def files_of(source: Path) -> dict[str, Path]:
    """Name in the package -> file, in order of names; with what plugins add."""
    own = {
        str(path.relative_to(source)): path
        for room in ROOMS
        for path in (source / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return dict(sorted((plugins.files() | own).items()))


def digest(source: Path = SOURCE) -> str:
    """What differs between two versions of the code: names and contents of all files."""
    sha256 = hashlib.sha256()
    for name, path in files_of(source).items():
        sha256.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha256.hexdigest()[:12]


def commit(source: Path = SOURCE) -> dict[str, Any]:
    """{"commit", "diff"} if the code is a git checkout: its last commit and what has changed since;
    else both None."""
    if not (source / ".git").exists():
        return {"commit": None, "diff": None}

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source), *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",  # a diff has the bytes of the files
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return {"commit": head and head.strip(), "diff": git("diff", "HEAD", "--", *ROOMS)}
