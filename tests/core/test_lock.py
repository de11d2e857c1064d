"""Locks between processes: alone, shared, signed, freed by death, and without flock."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
import threading
import time

import pytest

from segfleet.core import lock as locks
from segfleet.core.errors import InputError
from segfleet.core.lock import Lock, holder, is_locked

HOLD = """
import sys, time
now, late = time.time, float(sys.argv[3])
time.time = lambda: now() - late  # this node's clock
from pathlib import Path
from segfleet.core import lock as locks
from segfleet.core.errors import InputError
from segfleet.core.lock import Lock
if sys.argv[4] == "no flock":
    def missing(*_): raise OSError(38, "no flock here")
    locks.fcntl.flock, locks.HEARTBEAT = missing, 0.2
lock = Lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
assert lock.acquire()
lock.shared or lock.sign()
print("held", flush=True)
input()
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds tmp_path/lock until it is killed."""
    started = []

    def start(how, late=0, disk=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "lock"), how, str(late), disk],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_alone_signed_and_freed_by_death(hold, tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path) and not path.exists()
    process = hold("alone")
    assert is_locked(path) and str(holder(path)).startswith(f"process {process.pid} on ")
    assert not Lock(path).acquire(0.1) and not Lock(path, shared=True).acquire(0.1)
    process.kill()
    process.wait()
    with Lock(path) as lock:
        assert lock.acquire(5.0) and is_locked(path)
    assert not is_locked(path)


def test_shared(hold, tmp_path):
    path = tmp_path / "lock"
    hold("shared")
    with Lock(path, shared=True) as second:
        assert second.try_acquire() and not is_locked(path)
        assert not Lock(path).acquire(0.1)


def test_a_look_refuses_nobody(tmp_path):
    path, ended = tmp_path / "lock", threading.Event()
    path.touch()

    def look():
        while not ended.is_set():
            is_locked(path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(100):
            with Lock(path) as lock:
                assert lock.acquire()
    finally:
        ended.set()
        watcher.join()


def test_a_lock_is_no_link_but_may_lie_behind_one(tmp_path):
    """A run folder may be a link to another disk."""
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    for shared in (False, True):
        with pytest.raises(InputError, match="lock is no file"):
            Lock(tmp_path / "lock", shared=shared).acquire()
    assert not (tmp_path / "elsewhere").exists() and not is_locked(tmp_path / "lock")
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with Lock(tmp_path / "link" / "lock") as lock:
        assert lock.acquire() and is_locked(tmp_path / "run" / "lock")


def test_waiting_ends_when_it_is_stopped(hold, tmp_path):
    hold("alone")
    asked = []
    began = time.monotonic()
    assert not Lock(tmp_path / "lock").acquire(60.0, lambda: asked.append(1) or len(asked) == 3)
    assert len(asked) == 3 and time.monotonic() - began < 30


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock(tmp_path, monkeypatch, number):
    def missing(*_):
        raise OSError(number, "no flock here")

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    path = tmp_path / "lock"
    with Lock(path) as lock:
        assert lock.acquire()
        lock.sign()
        assert not Lock(path).acquire(0.1) and not Lock(path, shared=True).acquire(0.1)
        assert is_locked(path) and "process" in str(holder(path))
    with Lock(path, shared=True) as first, Lock(path, shared=True) as second:
        assert first.acquire() and second.acquire() and not Lock(path).acquire(0.1)
        assert not is_locked(path)
    assert Lock(path).try_acquire()


@pytest.mark.parametrize("how", ["alone", "shared"])
def test_the_lease_of_a_process_that_was_killed_is_waited_for(hold, tmp_path, monkeypatch, how):
    """Nobody is told that an ended process works there. One of another machine is believed."""

    def missing(*_):
        raise OSError(errno.ENOSYS, "no flock here")

    path = tmp_path / "lock"
    process = hold(how, 0, "no flock")
    monkeypatch.setattr(locks.fcntl, "flock", missing)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.6)
    assert not Lock(path).acquire() and is_locked(path) == (how == "alone")
    process.kill()
    process.wait()
    (record,) = (tmp_path / "lock.rw" / "holders").iterdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(locks.socket, "gethostname", lambda: "another")
        assert not Lock(path).is_left_behind()
    assert not is_locked(path)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with Lock(path) as lock:
        assert lock.acquire()
    assert f"{path} is locked by a process that has ended" in said.getvalue()


@pytest.mark.parametrize("late", [0, 3600, -3600])
def test_a_lease_ends_with_its_holder_whatever_its_clock_says(hold, tmp_path, monkeypatch, late):
    """Each look is an attempt of its own, as of a job that waits for another one's stage."""

    def missing(*_):
        raise OSError(errno.ENOSYS, "no flock here")

    process = hold("alone", late, "no flock")
    monkeypatch.setattr(locks.fcntl, "flock", missing)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)  # three of them, and a lease has ended
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert not Lock(tmp_path / "lock").try_acquire(), "it lives"
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not (lock := Lock(tmp_path / "lock")).try_acquire():
        assert time.monotonic() < end, "a dead holder's lease never ends"
        time.sleep(0.05)
    lock.release()


def test_a_lock_that_cannot_be_opened_is_not_held(tmp_path, monkeypatch):
    """A colleague's run, read by somebody who may not write there."""
    (tmp_path / "lock").touch()

    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locks.os, "open", closed)
    assert not is_locked(tmp_path / "lock")
