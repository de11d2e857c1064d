"""Ranks on this machine, as child processes that never outlive us."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfleet.core.errors import ExitCode
from segfleet.core.litter import temporary_folder
from segfleet.core.machine import WAITING, cpus, own_slice, threads_of, waiting

if TYPE_CHECKING:
    from segfleet.core.job import Job

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
AGAIN = "again"  # of a job that ended because a rank hangs, which is not waited for
ONE_REQUEST = 1.0  # seconds: a shell and the kernel both say that a terminal was closed
GRACE = 120.0  # seconds the ranks have to save and go after they were asked to


class RankFailed(RuntimeError):
    """A rank failed; the message is that rank's own. `exit_code` 2 for the user's mistake, 1 for a
    fault, 75 for an agreed stop."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent goes, however it goes (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def run_ranks(
    job: Job,
    ranks: int,
    poll: Callable[[], None] = lambda: None,
    threads: int | None = None,
    device: str | None = None,
) -> None:
    """Run `segfleet.pipeline.launch.worker` on `ranks` local processes until all end.

    Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP (unless it is ignored, as under nohup) are passed
    on as a request to stop in order (in the main thread; others get no signals). Raises RankFailed
    with the first failing rank's own message; the other ranks are killed with it.
    `threads`: of each rank; by default OMP_NUM_THREADS or an equal share of the cores. `device`:
    "cpu" where there are GPUs, too.
    """
    with temporary_folder() as rendezvous:
        (rendezvous / "job.json").write_text(json.dumps(job.document()), encoding="utf-8")
        share = str(threads or threads_of() or max(1, cpus() // ranks))
        processes = [_start(rendezvous, rank, ranks, share, device) for rank in range(ranks)]

        stop_requests: list[float] = []  # when the ranks were first asked to stop

        def on_signal(number: int, _) -> None:
            stop_requests.append(time.monotonic())
            # a second Ctrl-C stops at once
            _ask(processes, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

        try:
            with signals_to(on_signal):
                codes = _watch(processes, poll, stop_requests, rendezvous / AGAIN)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if any(code != 0 for code in codes):
            raise RankFailed(*_reason(rendezvous, codes))


def _start(
    rendezvous: Path, rank: int, ranks: int, threads: str, device: str | None
) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": threads,
        WAITING: waiting(),
        "SEGFLEET_PARENT": str(os.getpid()),
        # DDP's advice on a flag that is set on purpose
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **({"SEGFLEET_DEVICE": device} if device else {}),
        **own_slice(rank),
    }
    # A session of its own: Ctrl-C reaches us alone, and we pass it on once.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "segfleet.pipeline.launch.worker", str(rendezvous)],
        env=environment,
        start_new_session=True,
    )


def _ask(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


@contextmanager
def signals_to(handler: Callable[[int, Any], None] | None = None) -> Iterator[None]:
    """The signals that ask this process to stop in order go to a handler, or to those that the
    block sets, until its end. None do outside the main thread, which alone may have handlers."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (STOP_SIGNALS if main else ())}
    if before.get(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, it is to survive a hang-up
        del before[signal.SIGHUP]
    for number in before if handler else ():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def end_as_after_ctrl_c() -> None:
    """What asks this process to stop in order raises KeyboardInterrupt, unless it is ignored (as a
    hang-up is under nohup), and until a command has handlers of its own: see `signals_to`."""
    first: list[float] = []

    def interrupt(*_: object) -> None:
        first.append(time.monotonic())
        # a second one would cut off what cleans up after the first
        if len(first) == 1 or first[-1] - first[0] > ONE_REQUEST:
            raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)


def ignore_stop_signals() -> None:
    """What is left to do here is to end: a signal would only cut that off."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Terminal(io.FileIO):
    """What is said to a terminal that was closed goes nowhere: an error would cut off ranks that
    save."""

    def write(self, words) -> int:
        try:
            return super().write(words)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(words)


def survive_hangup() -> None:
    """Keep this process running when the terminal it writes to is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            setattr(
                sys,
                name,
                io.TextIOWrapper(
                    raw,
                    stream.encoding,
                    stream.errors,
                    line_buffering=True,
                    write_through=name == "stderr",
                ),
            )


def _watch(
    processes: list[subprocess.Popen],
    poll: Callable[[], None],
    stop_requests: list[float],
    again: Path | None = None,
) -> list[int | None]:
    """Exit codes when all ranks have ended, soon after the first one failed, or when they had their
    time to stop (None: still running). No time is given once `again` is there."""
    since = 0.0
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return codes
        if any(codes):
            since = since or time.monotonic()
            agreed = all(
                code in (None, ExitCode.OK, ExitCode.INTERRUPTED) for code in codes
            )  # the others stop in order, too
            agreed = agreed and not (again and again.exists())
            if time.monotonic() - since > (GRACE if agreed else 1.0):
                return codes
        elif stop_requests and time.monotonic() - stop_requests[0] > GRACE:
            return codes
        poll()
        time.sleep(0.05)


def _reason(rendezvous: Path, codes: list[int | None]) -> tuple[str, int]:
    """Message and exit code of what went wrong first: a rank's own report, else a killed rank, else
    a rank that lost its peer."""
    reports = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(rendezvous.glob("failed-*.json"))
    ]
    own = sorted(
        (report for report in reports if not report["peer_failure"]),
        key=lambda report: (report["joining"], report["time"]),
    )
    killed = [
        (rank, signal.Signals(-code).name) for rank, code in enumerate(codes) if code and code < 0
    ]
    if own and not (own[0]["joining"] and killed):
        return own[0]["message"], own[0]["exit_code"]
    if killed:
        rank, name = killed[0]
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return (
            f"rank {rank} was killed by {name}{hint}. Run the same command again: it goes on from "
            "the last checkpoint.",
            1,
        )
    if reports:
        return reports[0]["message"], 1
    if not any(codes):
        hung = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
        return (
            f"rank {hung} did not stop within {GRACE:.0f} s of being asked to and was killed. Run "
            "the same command again: it goes on from the last checkpoint.",
            ExitCode.INTERRUPTED,
        )
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    return (
        f"rank {rank} ended with exit code {code} without a word. Run the same command again: it "
        "goes on from the last checkpoint.",
        1,
    )
