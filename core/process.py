"""What the kernel says of a process or a thread (Linux), read in one place; and the three files
that every process begins with."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Process:
    """A line of /proc/PID/stat, as far as anybody here asks."""

    state: str  # R: it runs; Z, X: it has ended
    parent: int
    began: int  # in ticks since the machine's start: a number may be given again


def process_of(number: int) -> Process | None:
    """None: there is none, or the system does not say."""
    return _read(f"/proc/{number}/stat")


def thread_of(number: int) -> Process | None:
    """A thread of this process."""
    return _read(f"/proc/self/task/{number}/stat")


def alive(number: int) -> bool:
    """Not one that has ended and that nobody asks for: the first process of a container may never
    do so."""
    if process := process_of(number):
        return process.state not in "ZX"
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def open_standard_files() -> None:
    """Where stdin, stdout or stderr is closed (`>&-`, some schedulers), open the null device in its
    place, for this process and its children. Python has None there, and the next file that anybody
    opened would get its number, and whatever is printed."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def _read(path: str) -> Process | None:
    try:  # a name may hold anything, also spaces and brackets: what counts follows the last one
        words = Path(path).read_text(errors="replace").rpartition(")")[2].split()
        return Process(state=words[0], parent=int(words[1]), began=int(words[19]))
    except (OSError, IndexError, ValueError):
        return None
