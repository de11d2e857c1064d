"""Files and folders in the making: hidden siblings of what they will be, whose names say who makes
them. What a killed process left is known by that, and removed by the next one that writes there."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from segfleet.core.process import alive

PARTIAL = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[^.]+)-(?P<process>\d+)-(?P<world>[0-9a-f]{8})?[0-9a-f]{8}"
    r"\.partial(\..+)?"
)
YOUNG = 24 * 3600.0  # s; hours more than clocks of machines and file servers differ by
NAME = 100  # bytes of a file's name that its temporary name begins with; a name may have 255
_looked: set[str] = set()


def temporary_name(path: Path, suffix: str = "") -> Path:
    """A hidden name beside `path` that no other process uses, on this machine or another: process
    numbers repeat between containers that share a disk."""
    begin = os.fsencode(path.name)[:NAME].decode(errors="ignore")
    number = f"{os.getpid()}-{_world() or '0' * 8}{secrets.token_hex(4)}"
    return path.with_name(f".{begin}.{_host()}-{number}.partial{suffix}")


def remove_partial(folder: Path, alone: bool = False) -> None:
    """Half-written files and folders directly in `folder` whose writer is gone: another process
    that counts processes as this one does. Of an earlier start of the machine, or of a container
    with its name, numbers say nothing: those stay for a day, unless a lock says that nobody else
    writes there (`alone`)."""
    for path in folder.glob(".*.partial*"):
        name = PARTIAL.fullmatch(path.name)
        if not name or name["host"] != _host():
            continue
        with suppress(OSError):
            status = os.lstat(path)
            same_world = alone or (_world() and name["world"] == _world())
            young = time.time() - status.st_mtime < YOUNG
            if alive(int(name["process"])) or (young and not same_world):
                continue
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def remove_partial_once(folder: Path) -> None:
    """`remove_partial`, the first time that this process writes there: a folder may be long."""
    if (name := os.path.abspath(folder)) not in _looked:
        _looked.add(name)
        remove_partial(folder)


def _host() -> str:
    return socket.gethostname().partition(".")[0][:16]


@functools.cache
def _world() -> str:
    """Those who have the same number see the same processes under the same numbers: this start of
    the machine and this container. "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:8]
    except OSError:
        return ""
