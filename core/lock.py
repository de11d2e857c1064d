"""Locks between processes, on one machine or on a shared disk."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import read_file, regular
from segfleet.core.process import alive

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
BRIEFLY = 0.5  # s: `is_locked` holds a lock for a moment, which must refuse nobody
LOOK = 0.05  # s between two attempts
HEARTBEAT = 30.0  # s between two signs of life of a lease; one without three of them has ended
# Leases that were not to be had. Each knows since when, on the clock of this process, their holder
# has given no sign of life; no clock of another machine is looked at.
_waiting: dict[tuple[int, str, bool], Any] = {}


class Lock:
    """One process holds the lock on a file, or several share it. The lock ends with its holder.

    The system keeps it (flock), so it is free the moment its holder dies. A file system without
    flock, such as Lustre mounted without it, gets the leases of `filelock` in `<file>.rw`: those of
    a holder that died end after a minute and a half, for which `acquire` waits.
    """

    def __init__(self, path: Path, *, shared: bool = False):
        self.path, self.shared = Path(path), shared
        self._handle: int | None = None
        self._lease: Any = None

    def acquire(
        self, seconds: float | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Take the lock; whether it was to be had within `seconds` and before `stopped`. None: at
        once, or when the leases of processes that have ended do. The file is created, its folder is
        not. Raises InputError for what is no file, a link among it."""
        end = time.monotonic() + (BRIEFLY if seconds is None else seconds)
        patient = seconds is None
        while not self.try_acquire():
            if stopped():
                return False
            if time.monotonic() > end:
                if not (patient and self.is_left_behind()):
                    return False
                patient, wait = False, 4 * HEARTBEAT
                sys.stderr.write(
                    f"segfleet: {self.path} is locked by a process that has ended, on a disk "
                    f"without flock; waiting for its lease to end, at most {wait:g} s\n"
                )
                end = time.monotonic() + wait
            time.sleep(LOOK)
        return True

    def is_left_behind(self) -> bool:
        """Whether nothing but leases of this machine's ended processes stands in the way."""
        records = Path(f"{self.path}.rw", "holders").glob("*")
        leases, host = [_leaseholder(record) for record in records], socket.gethostname()
        return bool(leases) and all(
            lease is not None and lease[0] == host and not alive(lease[1]) for lease in leases
        )

    def try_acquire(self) -> bool:
        """Take the lock if it is to be had at this moment."""
        # NFS wants the file readable for a shared lock and writable for an exclusive one.
        kind = os.O_RDONLY if self.shared else os.O_RDWR
        # a link in a folder of several people would have a file made wherever it leads
        kind |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = regular(os.fspath(self.path), kind)
        try:
            taken = self._take(handle)
        except BaseException:
            os.close(handle)
            raise
        if taken:
            self._handle = handle
        else:
            os.close(handle)
        return taken

    def _take(self, handle: int) -> bool:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(handle, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        from filelock import SoftReadWriteLock, Timeout

        key = (os.getpid(), os.path.abspath(self.path), self.shared)
        lease = _waiting.pop(key, None) or SoftReadWriteLock(
            self.path, is_singleton=False, heartbeat_interval=HEARTBEAT
        )
        try:
            (lease.acquire_read if self.shared else lease.acquire_write)(blocking=False)
        except Timeout:
            _waiting[key] = lease
            return False
        self._lease = lease
        return True

    def sign(self) -> None:
        """Write into the file who holds it alone."""
        assert self._handle is not None and not self.shared, "only a holder signs"
        os.ftruncate(self._handle, 0)
        job = os.environ.get("SLURM_JOB_ID", "")
        signature = Holder(process=os.getpid(), host=socket.gethostname(), job=job)
        os.pwrite(self._handle, str(signature).encode(), 0)

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        if self._lease is not None:
            self._lease.release()
            self._lease.close()
            self._lease = None
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _leaseholder(record: Path) -> tuple[str, int] | None:
    """Host and process of one lease, as `filelock` writes it; None where it does not say."""
    try:
        fields = dict(re.findall(r"^(pid|host)=(.+)$", read_file(record).decode(), re.M))
        return fields["host"], int(fields["pid"])
    except (OSError, ValueError, KeyError):
        return None


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who signed a lock."""

    process: int
    host: str
    job: str  # of SLURM, or ""

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}"


def holder(path: Path) -> Holder | None:
    """Who signed the lock file last; None where nobody did."""
    try:
        words = read_file(Path(path)).decode().strip()
    except (OSError, ValueError):
        return None
    signature = re.fullmatch(r"process (\d+) on (.+?)(?: of job (\S+))?", words)
    return signature and Holder(
        process=int(signature[1]), host=signature[2], job=signature[3] or ""
    )


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on this file alone, at this moment. Creates no file."""
    if not Path(path).exists():
        return False
    with Lock(path, shared=True) as lock:
        try:
            return not (lock.try_acquire() or lock.is_left_behind())
        except (PermissionError, InputError):  # what cannot be opened says nothing
            return False
