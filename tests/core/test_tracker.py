"""Multiprocessing's resource tracker: killed, it is silently replaced by one that knows as much."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from segfleet.core import litter

PROGRAM = """
import multiprocessing, os, signal, sys, tempfile, time
from multiprocessing import resource_tracker
tempfile.tempdir = sys.argv[1]
from segfleet.core.litter import note_multiprocessing

def kill_tracker():
    os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
    os.waitid(os.P_PID, resource_tracker._resource_tracker._pid, os.WEXITED | os.WNOWAIT)

if __name__ == "__main__":
    note_multiprocessing()
    context = multiprocessing.get_context("forkserver")
    locks = [context.Lock(), context.Semaphore()]
    print(*(lock._semlock.name for lock in locks), flush=True)
    %s
    sys.stdout.flush()
    os._exit(0) if %s else None
"""
ENDS = {
    "gives one back": ("kill_tracker(); del locks[0]", False),
    "makes another one": ("kill_tracker(); locks.append(context.Lock())", False),
    "starts a process": (
        "kill_tracker(); p = context.Process(target=print, args=[1]); p.start(); p.join()",
        False,
    ),
    "twice": ("kill_tracker(); del locks[0]; kill_tracker(); locks.append(context.Lock())", False),
    "is killed then": (
        "kill_tracker(); locks.append(context.Lock()); "
        "print(locks[-1]._semlock.name, flush=True); os.kill(os.getpid(), 9)",
        False,
    ),
    "is killed": ("os.kill(os.getpid(), 9)", False),
    "ends at once": ("pass", True),
}


@pytest.mark.parametrize("way", ENDS)
def test_nothing_is_said_and_nothing_is_left(way, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM % ENDS[way])
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # short, as sockets want it
        words = [sys.executable, str(program), place]
        ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.stderr == ""
    made = [Path("/dev/shm", f"sem.{name[1:]}") for name in ended.stdout.split() if name != "1"]
    assert len(made) >= 2
    end = time.monotonic() + 10  # the tracker notices and does its work
    while any(path.exists() for path in made) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(path.exists() for path in made)


EVERYTHING = """
import multiprocessing, os, sys, tempfile
from multiprocessing import resource_tracker
tempfile.tempdir = sys.argv[1]
from segfleet.core.litter import note_multiprocessing

note_multiprocessing()
context = multiprocessing.get_context("forkserver")
locks = [context.Lock(), context.Semaphore()]
print(*(lock._semlock.name for lock in locks), flush=True)
os.kill(resource_tracker._resource_tracker._pid, 9)
os.kill(os.getpid(), 9)
"""


def test_when_everything_is_killed_at_once_the_next_start_tidies_up():
    """As SLURM does at a time limit, or the system when memory is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # short, as sockets want it
        words = [sys.executable, "-c", EVERYTHING, place]
        ended = subprocess.run(words, capture_output=True, text=True)
        made = [Path("/dev/shm", f"sem.{name[1:]}") for name in ended.stdout.split()]
        assert len(made) == 2 and all(path.exists() for path in made), ended.stderr
        litter.remove_folders(Path(place))
        assert not any(path.exists() for path in made) and not os.listdir(place)
