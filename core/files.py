"""Files that are there whole or not at all, and what they are known by."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_name(path: Path, suffix: str = "") -> Path:
    """A hidden name beside `path` that no other process uses, on this machine or another: process
    numbers repeat between containers that share a disk."""
    host = socket.gethostname().partition(".")[0][:16]
    return path.with_name(
        f".{path.name[:100]}.{host}-{os.getpid()}-{secrets.token_hex(4)}.partial{suffix}"
    )


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary file's name to write to; it becomes `path` when the block ends well, and goes
    otherwise. A reader sees the old file or the new one, never half of one.

    `suffix`: of the temporary name, for writers that go by it.
    """
    temporary = temporary_name(path, suffix)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8, so that a reader sees the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def share_as_others(path: Path) -> None:
    """Give a file that a library made private the mode of any new file of its folder: umask, setgid
    and ACLs decide who reads it. The umask itself cannot be asked without changing it for all
    threads."""
    beside = temporary_name(path)
    beside.touch()
    try:
        path.chmod(beside.stat().st_mode & 0o777)
    finally:
        beside.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of a written file survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def file_facts(path: Path) -> dict[str, int | str]:
    """{"bytes": size, "sha256": hex} of one file: what the manifest keeps about it. Raises
    OSError."""
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
