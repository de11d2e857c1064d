"""A command that works in its own process ends after a signal as after Ctrl-C: a sentence, exit
code 75, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from segfleet.core.litter import SEMAPHORES, SHARED
from segfleet.core.tracker import recorded
from segfleet.pipeline.launch import local

SECONDS = 5.0  # in which nothing is left
OF_A_POOL = 5  # semaphores
WORKERS = ["--workers", "2"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Enough cases to be at work when the signal comes."""
    folder = tmp_path_factory.mktemp("signals") / "raw"
    words = ["datasets", "msd", "phantom", str(folder), "--cases", "90"]
    subprocess.run([sys.executable, "-m", "segfleet.cli.main", *words], check=True)
    return folder


def until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def session(leader: int) -> list[int]:
    """The processes that have not ended of a session, but for its leader."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if stat[0] not in "ZX" and int(stat[3]) == leader and int(folder.name) != leader:
            found.append(int(folder.name))
    return found


def semaphores_of(place: Path) -> list[Path]:
    """Of a pool, if its processes are being started."""
    records = place.glob(f"segfleet-*/{SEMAPHORES}")
    found = [SHARED / name for record in records for name in recorded(record)]
    return found if len(found) >= OF_A_POOL else []


@pytest.mark.parametrize("number, command, to_all", [
    (signal.SIGHUP, "preprocess", True),
    (signal.SIGTERM, "check", False),
    (signal.SIGTERM, "score", True),
])  # fmt: skip
def test_nothing_is_left(raw, tmp_path, cold, number, command, to_all):
    """In processes that look for the temporary folder anew."""
    labels = str(raw / "labelsTr")
    words = {
        "preprocess": ["preprocess", "msd", "--raw", str(raw), "--out", str(tmp_path / "store")],
        "check": ["datasets", "msd", "check", str(raw)],
        "score": ["score", labels, "--truth", labels, "--out", str(tmp_path / "scores")],
    }[command]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # sockets lie in it
        process = subprocess.Popen(
            [sys.executable, "-m", "segfleet.cli.main", *words, *WORKERS],
            env={**os.environ, "TMPDIR": short, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert (semaphores := until(lambda: semaphores_of(Path(short)), 30))
        time.sleep(0.2)  # some way into the work
        # twice, as a shell and the kernel both do it when a terminal is closed
        for _ in range(2):
            os.killpg(process.pid, number) if to_all else process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75, (process.returncode, out, err)
        assert err.endswith(
            "segfleet: interrupted. Run the same command again: it goes on where it stopped.\n"
        )
        assert "Traceback" not in err
        assert until(lambda: not session(process.pid), SECONDS), session(process.pid)
        assert not list(Path(short).iterdir()) and not any(path.exists() for path in semaphores)


def test_what_a_command_is_started_to_ignore_it_ignores():
    """nohup: a hang-up is none of its business. A second request a while later is obeyed."""
    before = {number: signal.getsignal(number) for number in local.STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        local.end_as_after_ctrl_c()
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same request
        time.sleep(local.ONE_REQUEST)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        local.ignore_stop_signals()
        for number in local.STOP_SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_worker_that_begins_while_its_command_ends_says_nothing():
    """It imports the command's module, then finds no semaphore any more."""
    program = (
        "import sys, segfleet.core.served as served, segfleet.cli\n"
        "assert sys.excepthook is served.report"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
