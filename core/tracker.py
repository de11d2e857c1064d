"""Multiprocessing's resource tracker: a process that removes semaphores once all have ended who
use them. Python starts another one when it was killed. That one knows of nothing, and prints a
traceback for every name that is given back to it; here it gets all names of the first one."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from segfleet.core.files import read_file

# Of semaphores that a killed process left: they are removed, so nobody has to do anything.
QUIET = "ignore:resource_tracker:UserWarning"


class Tracker(resource_tracker.ResourceTracker):
    """As Python's, but one that was killed is replaced silently, without a loss."""

    _registered: dict[tuple[str, str], None]  # what was registered and not given back, in order
    _healing: threading.Lock
    _record: Path | None  # names of all semaphores, for whoever comes after a kill of everything

    def ensure_running(self) -> None:
        self._heal()
        with _quiet():
            super().ensure_running()

    def _send(self, cmd: str, name: str, rtype: str) -> None:
        self._heal()
        if cmd == "REGISTER" and rtype == "semaphore" and self._record is not None:
            with suppress(OSError), open(self._record, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
        super()._send(cmd, name, rtype)  # type: ignore[misc]
        if cmd == "REGISTER":
            self._registered[name, rtype] = None
        else:
            self._registered.pop((name, rtype), None)

    def _heal(self) -> None:
        """If the tracker is gone, start another one and tell it all."""
        tracker: Any = self
        # not from a finalizer that runs in the middle of it, which would wait for itself
        if not self._healing.acquire(blocking=False):
            return
        try:
            with tracker._lock:
                if tracker._fd is None or _answers(tracker._fd):
                    return
                os.close(tracker._fd)
                if tracker._pid is not None:
                    with suppress(ChildProcessError):
                        os.waitpid(tracker._pid, 0)
                tracker._fd = tracker._pid = None
            with _quiet():
                super().ensure_running()
            for name, kind in list(self._registered):
                super()._send("REGISTER", name, kind)  # type: ignore[misc]
        finally:
            self._healing.release()


def keep_tracker(record: Path | None = None) -> None:
    """From now on the tracker of this process is a `Tracker`, and the names of semaphores stand in
    the file `record`. To be called before it makes its first one."""
    module: Any = resource_tracker
    tracker = module._resource_tracker
    if not isinstance(tracker, Tracker):
        tracker._registered, tracker._healing, tracker._record = {}, threading.Lock(), None
        tracker.__class__ = Tracker
        # the module holds the method of the class before
        module.ensure_running = tracker.ensure_running
    tracker._record = record or tracker._record


def recorded(record: Path) -> list[str]:
    """The semaphores of a killed process, as files of /dev/shm are called."""
    try:
        text = read_file(record).decode(errors="replace")
    except (OSError, ValueError):
        return []
    return [f"sem.{name}" for name in re.findall(r"^/(mp-[a-z0-9_]+)$", text, re.MULTILINE)]


def _answers(handle: int) -> bool:
    try:
        os.write(handle, b"PROBE:0:noop\n")
        return True
    except OSError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """A tracker that starts meanwhile says nothing of what it removes. It gets this process'
    options for warnings on its command line."""
    sys.warnoptions.append(QUIET)
    try:
        yield
    finally:
        sys.warnoptions.remove(QUIET)
