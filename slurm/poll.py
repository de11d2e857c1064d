"""How often SLURM is asked for its queue and its accounting: one question in half a minute for all
commands of a person on a machine, however many of them follow a job. Sites lock accounts that ask
every second.

The last answer lies in a folder of that person alone, with a lock: who wants to know while another
asks waits for that answer. SEGFLEET_QUEUE_SECONDS says another time than 30 s; 0: always ask.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.core.files import parse_json, write_atomically
from segfleet.core.lock import Lock

SECONDS, LONGEST = 30.0, 300.0
ENDING = 5.0  # s between the word of a job's ranks that they are done and the first look at SLURM
WAIT = 90.0  # s for the answer to another one's question
AT_ONCE = 2.0  # s: all looks of one action, such as a submission, share one question
KEPT = 24 * 3600.0  # s after which an answer that was not asked for again is removed


def seconds() -> float:
    """Age up to which an answer is good enough to look at."""
    try:
        return max(0.0, float(os.environ.get("SEGFLEET_QUEUE_SECONDS", SECONDS)))
    except ValueError:
        return SECONDS


def moment() -> float:
    """Age up to which an answer is good enough to act on."""
    return min(AT_ONCE, seconds())


class Answers:
    """The last answer to one question, shared by all processes of this user and machine."""

    def __init__(self, question: str, folder: Path | None = None):
        self.folder = folder or _private_folder()
        cluster = [question, os.environ.get("SLURM_CONF", ""), os.environ.get("PATH", "")]
        self.name = hashlib.sha256(json.dumps(cluster).encode()).hexdigest()[:16]

    def get(self, ask: Callable[[], str], age: float, since: float = 0.0) -> str:
        """An answer at most `age` seconds old that was asked for after `since` (time.time()), or a
        new one. Raises InputError, which is an answer too."""
        oldest = max(since, time.time() - age)
        if self.folder is None:
            return ask()
        with Lock(self.folder / f"{self.name}.lock") as lock:
            lock.acquire(WAIT)
            asked, text, fault = self._read()
            if not oldest <= asked <= time.time():
                asked, text, fault = time.time(), "", ""
                try:
                    text = ask()
                except InputError as error:
                    fault = str(error)
                document = {"asked": asked, "text": text, "fault": fault}
                write_atomically(self.folder / f"{self.name}.json", json.dumps(document))
                self._tidy()
        if fault:
            raise InputError(fault)
        return text

    def _read(self) -> tuple[float, str, str]:
        try:
            answer = parse_json((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
            return float(answer["asked"]), str(answer["text"]), str(answer["fault"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0, "", ""

    def _tidy(self) -> None:
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > KEPT:
                    path.unlink()


class Pace:
    """When a command that follows jobs looks again: after `seconds()`, then after twice as long
    each time nothing has changed, five minutes at most."""

    def __init__(self) -> None:
        self.first = self.interval = seconds()
        self.due, self.seen = 0.0, None

    def is_due(self) -> bool:
        return time.monotonic() >= self.due

    def looked(self, state: object) -> None:
        """What was seen."""
        changed, self.seen = state != self.seen, state
        self.interval = self.first if changed else min(2 * self.interval, max(LONGEST, seconds()))
        self.due = time.monotonic() + self.interval

    def hurry(self) -> None:
        """The jobs' own files say that something has ended: SLURM will, soon."""
        self.first = self.interval = min(ENDING, seconds())
        self.due = min(self.due, time.monotonic() + self.interval)


def forget() -> None:
    """What SLURM said before we changed its queue."""
    folder = _private_folder()
    for path in folder.glob("*.json") if folder else ():
        path.unlink(missing_ok=True)


def _private_folder() -> Path | None:
    """Of this user alone, on this machine; None if another user could write there."""
    home = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(home) / f"segfleet-queue-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return folder if private and not status.st_mode & 0o077 else None
