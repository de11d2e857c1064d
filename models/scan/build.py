"""Compile one C++ file into a shared library, once per machine type, and load it.

The library is kept in the user's cache folder under `<key>-<digest>.so`: the key hashes source,
flags and processor, the digest is that of the file, so a damaged file is seen before it is loaded
and built again. A build writes beside it and renames: ranks that build at the same time, and builds
that are killed, leave nothing that hurts. There are no lock files. Without a compiler, what a like
machine built is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
ALWAYS = (
    "-O2",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
# the first set that compiles is used; the last runs on one thread
FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    ("-march=native",),
    (),
)
LIMIT = 300  # seconds a compiler may take
STALE = 3600  # seconds after which what a killed build left is swept


class BuildError(Exception):
    """The library cannot be built or loaded here; the message is one line."""


def load(source: Path, *extra: str) -> ctypes.CDLL:
    """The compiled library of `source`, `extra` being flags of its own. Raises BuildError."""
    key, problem = f"{source.stem}-{_key(source, extra)}", ""
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                continue  # another user's folder in a shared temporary directory
            return ctypes.CDLL(str(find(folder, key) or compile_into(folder, key, source, extra)))
        except OSError as error:  # not writable, or mounted so that nothing in it may run
            problem = f"{folder}: {error}"
    raise BuildError(f"no cache folder can be used ({problem})")


def find_compiler() -> str:
    """Full path of a C++ compiler: $CXX, or the first of c++, g++, clang++ on PATH. Raises
    BuildError."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler on PATH (looked for c++, g++, clang++)")


def cache_folders() -> list[Path]:
    """Where libraries are kept, in order of preference: SEGFLEET_CACHE, the user's cache folder, a
    private temporary folder."""
    if chosen := os.environ.get("SEGFLEET_CACHE"):
        return [Path(chosen) / "native"]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [
        home / "segfleet" / "native",
        Path(tempfile.gettempdir()) / f"segfleet-{os.getuid()}" / "native",
    ]


def find(folder: Path, key: str) -> Path | None:
    """The kept library of `key` whose content is what its name says; damaged ones and old leftovers
    are removed."""
    for leftover in folder.glob(".build-*"):
        if time.time() - leftover.stat().st_mtime > STALE:
            leftover.unlink(missing_ok=True)
    for library in sorted(folder.glob(f"{key}-*.so")):
        if library.name == f"{key}-{_digest(library.read_bytes())}.so":
            return library
        library.unlink(missing_ok=True)
    return None


def compile_into(folder: Path, key: str, source: Path, extra: Sequence[str] = ()) -> Path:
    """Compile `source` and publish it in `folder` by renaming. Raises BuildError with the
    compiler's first complaint."""
    compiler = find_compiler()
    handle, name = tempfile.mkstemp(prefix=".build-", suffix=".so", dir=folder)
    os.close(handle)
    library, complaint = Path(name), ""
    try:
        for flags in FLAGS:
            command = [compiler, *ALWAYS, *extra, *flags, str(source), "-o", str(library)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=LIMIT, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{compiler}: {error}") from error
            if done.returncode == 0:
                library.chmod(0o700)
                return library.rename(folder / f"{key}-{_digest(library.read_bytes())}.so")
            complaint = complaint or next(
                (x for x in done.stderr.splitlines() if "error" in x),
                f"exit code {done.returncode}",
            )
        raise BuildError(f"{compiler} cannot compile {source.name}: {complaint}")
    finally:
        library.unlink(missing_ok=True)


def _key(source: Path, extra: Sequence[str]) -> str:
    return _digest(
        b"\0".join(
            [source.read_bytes(), repr((ALWAYS, extra, FLAGS)).encode(), _processor().encode()]
        )
    )


def _processor() -> str:
    """What a library depends on: machine, C library, and for `-march=native` model and instruction
    sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        details = [
            x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))
        ]
    except OSError:
        details = [platform.processor()]
    return "\n".join([platform.system(), platform.machine(), *platform.libc_ver(), *details])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
