"""Ranks on this machine, as child processes that never outlive us."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GRACE = 120.0  # seconds the ranks have to save and go after they were asked to


class RankFailed(RuntimeError):
    """A rank failed; the message is that rank's own. `exit_code` 2 for the user's mistake, 1 for a fault, 75 for an agreed stop."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent goes, however it goes (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def run_ranks(job: dict, ranks: int, poll: Callable[[], None] = lambda: None, threads: int | None = None) -> None:
    """Run `segfleet.slurm.worker` on `ranks` local processes until all end. `job` is what the worker gets, plain JSON.

    Ctrl-C and SIGTERM are passed on as a request to stop in order. Raises RankFailed with the first failing rank's own message; the other
    ranks are killed with it.
    """
    with tempfile.TemporaryDirectory(prefix="segfleet-") as folder:
        meeting = Path(folder)
        (meeting / "job.json").write_text(json.dumps(job), encoding="utf-8")
        threads = threads or max(1, available_cores() // ranks)
        processes = [_start(meeting, rank, ranks, threads) for rank in range(ranks)]
        before = {number: signal.signal(number, lambda *_: _ask(processes)) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = _watch(processes, poll)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if code:
            raise RankFailed(*_reason(meeting, processes, code))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(meeting: Path, rank: int, ranks: int, threads: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "SEGFLEET_PARENT": str(os.getpid()),
    }
    # A session of its own: Ctrl-C reaches us alone, and we pass it on once.
    return subprocess.Popen([sys.executable, "-m", "segfleet.slurm.worker", str(meeting)], env=environment, start_new_session=True)


def _ask(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)


def _watch(processes: list[subprocess.Popen], poll: Callable[[], None]) -> int:
    """0 when all ranks ended well, else the exit code of the first that did not."""
    failed, since = 0, 0.0
    while True:
        codes = [process.poll() for process in processes]
        failed = failed or next((code for code in codes if code), 0)
        if all(code is not None for code in codes):
            return failed
        if failed:
            since = since or time.monotonic()
            agreed = failed == 75  # the others stop in order, too
            if time.monotonic() - since > (GRACE if agreed else 1.0):
                return failed
        poll()
        time.sleep(0.05)


def _reason(meeting: Path, processes: list[subprocess.Popen], code: int) -> tuple[str, int]:
    """Message and exit code of the rank that failed first. Ranks that only lost their partner come last."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(meeting.glob("failed-*.json"))]
    if reports:
        first = min(reports, key=lambda report: (report["lost_partner"], report["time"]))
        return first["message"], first["exit_code"]
    rank = next((k for k, process in enumerate(processes) if process.returncode == code), 0)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} {how} without a word. Run the same command again: it goes on from the last checkpoint.", 1
