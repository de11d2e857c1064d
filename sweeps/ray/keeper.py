"""Ends a session of Ray whose driving process is gone, however it went.

The kernel ends what that process has started itself, but not what Ray's raylet has: its agents
notice that it is gone and try for a minute to report so to a server that is gone as well. This
process holds the other end of a pipe, so it knows at once.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from segfleet.core.litter import remove_marked

OWNER = "sweep"  # a file in a temporary folder: whose it is, so that nothing else is removed
MODULE = "segfleet.sweeps.ray.keeper"
TITLE = "ray::"  # how the agents and workers begin that write over their command and variables
CALM, LONGEST = 0.5, 20.0  # seconds without a process of the session; seconds in all


@contextmanager
def guarding(session: Path, owner: str) -> Iterator[None]:
    """A keeper for the folder of a session, until the block or this process ends."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    with suppress(BrokenPipeError):
        process.stdin.write(f"{session}\n{owner}\n")
        process.stdin.flush()
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()  # it looks once more and exits; no need to wait for that


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when there is nothing left to do
    words = sys.stdin.read().splitlines()
    if len(words) == 2:
        sweep(Path(words[0]), words[1])


def sweep(session: Path, owner: str) -> None:
    """End all processes of a session that no process owns any more, and remove its folder. Nothing,
    if it is not a folder of this user that says that it is of `owner`."""
    with suppress(OSError, ValueError):  # ValueError: no path can be called so
        status = os.lstat(session)
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if own and (session / OWNER).read_text(encoding="utf-8") == owner:
            _end_processes(session)
            remove_marked(session, OWNER)


def _end_processes(session: Path) -> None:
    """Also those that are just being started."""
    begin = calm = time.monotonic()
    while time.monotonic() - calm < CALM and time.monotonic() - begin < LONGEST:
        if running := _processes(session):
            for process in running:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(running, timeout=10)
            calm = time.monotonic()
        time.sleep(CALM / 4)


def _processes(session: Path) -> list[psutil.Process]:
    """Those that name the folder in their command, or of Ray's that write their logs into it."""
    processes = []
    for process in psutil.process_iter(["uids"]):
        with suppress(psutil.Error, OSError):
            if not process.info["uids"] or process.info["uids"].real != os.getuid():
                continue
            words = process.cmdline()
            if words and words[0].startswith(TITLE):
                handles = Path(f"/proc/{process.pid}/fd")
                words = [os.readlink(handles / name) for name in os.listdir(handles)]
            if any(f"{session}/" in f"{word}/" for word in words):
                processes.append(process)
    return processes


if __name__ == "__main__":
    main()
