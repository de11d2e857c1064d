"""segfleet's commands as copies of one warm process, for benchmarks that start thousands of them.

What takes seconds is imported once, in `warm`. `start` forks; where the product starts a new
interpreter for a rank or a forkserver, that is a fork as well: the same tree of processes,
sessions, signals and environments, without the imports. Ray's own processes are started as ever.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing.util
import os
import signal
import sys
import tempfile
import time
import types
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "SEGFLEET_DEVICE": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def warm(*more: str) -> None:
    """Import all that commands need, and `more`. Nothing is computed and no thread begins, so
    copies of this process can."""
    os.environ |= ENVIRONMENT
    import importlib

    for name in (
        "h5py",
        "nibabel",
        "scipy.ndimage",
        "torch._dynamo",
        "zarr",
        "segfleet.cli.main",
        "segfleet.pipeline.data.loader",
        "segfleet.pipeline.jobs",
        "segfleet.pipeline.launch.worker",
        "segfleet.pipeline.trained.modelfile",
        "segfleet.pipeline.reports.report",
        "segfleet.preprocess.building.build",
        "segfleet.slurm.status",
        "segfleet.sweeps.run",
        *more,
    ):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    adopt()
    gc.collect()
    gc.freeze()  # or the copies would copy all of it at their first collection


def adopt() -> None:
    """Orphans below this process become its children: `tree` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(
    folder: Path, words: list[str], *, out: Path | None = None, err: Path, **environment: str
) -> int:
    """`segfleet WORDS` in `folder`; its process number. `err` is appended to, `out` written
    anew."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, err, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o666), number)
    os.chdir(folder)
    _become("command", {**os.environ, **environment})
    sys.argv = ["segfleet", *words]
    from segfleet.cli import main
    from segfleet.pipeline.launch import local

    local.subprocess = types.SimpleNamespace(Popen=Fork)
    multiprocessing.util.spawnv_passfds = _forkserver
    _end(main.main, atexit._run_exitfuncs)


class Fork:
    """What `subprocess.Popen` is to the launcher of ranks."""

    def __init__(self, words: list[str], *, env: dict[str, str], start_new_session: bool):
        self.returncode: int | None = None
        # a child that is started forks in C, where no signal is seen
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.pid = os.fork()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.pid == 0:
            os.setsid()
            _become(f"rank {env['RANK']}", env)
            from segfleet.pipeline.data import loader
            from segfleet.pipeline.launch import worker

            folder = Path(words[-1])
            job = json.loads((folder / "job.json").read_text())
            if job.get("recipe", {}).get("data", {}).get("workers") not in (0, "auto", None):
                loader._forkserver()  # with what it imports first
                forkserver.ensure_running()  # now: later this process has threads and sockets
            _end(lambda: worker.exit_now(worker.main(folder)))

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_spawn = multiprocessing.util.spawnv_passfds


def _forkserver(path: Any, words: list[Any], handles: list[int]) -> int:
    code = words[-1]
    if "multiprocessing.forkserver" not in str(code):
        return _spawn(path, words, handles)
    if child := os.fork():
        return child
    kept = {0, 1, 2, *handles}
    gc.freeze()  # whoever held the others is never collected, and closes nothing
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):
                os.close(int(name))
    _become("loader", dict(os.environ))
    from segfleet.core import served

    sys.excepthook = served.report  # as its first import does
    _end(lambda: exec(code, {}))


def _become(role: str, environment: dict[str, str]) -> None:
    """A process that was just started, as far as it can see."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, role.encode(), 0, 0, 0)
    os.environ.clear()
    os.environ.update(environment)
    for number in signal.Signals:
        with suppress(OSError, ValueError):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    weakref.finalize._registry.clear()  # temporary folders of the process that was copied
    sys.modules["__main__"] = types.ModuleType("__main__")  # which children would import
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)


def _end(function: Callable[[], Any], last: Callable[[], Any] = lambda: None) -> NoReturn:
    code: Any = 1
    try:
        code = function() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    with suppress(BaseException):
        last()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def tree() -> dict[int, str]:
    """All living processes below this one, and what they are called."""
    below, names = defaultdict(list), {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                before, _, after = Path(f"/proc/{entry}/stat").read_text().rpartition(")")
                state, parent = after.split()[:2]
                below[int(parent)].append(int(entry))
                if state not in "ZX":
                    names[int(entry)] = before.partition("(")[2]
    found, ahead = {}, list(below[os.getpid()])
    while ahead:
        one = ahead.pop()
        ahead += below[one]
        if one in names:
            found[one] = names[one]
    return found


def reap(ended: dict[int, int]) -> dict[int, int]:
    """Exit codes of the children that have ended, added to `ended`."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def end(processes: dict[int, str]) -> None:
    for number in processes:
        with suppress(OSError):
            os.kill(number, signal.SIGKILL)


def run(folder: Path, words: list[str], *, seconds: float, err: Path, **more: Any) -> int | None:
    """Exit code; None: it hung, and was killed with all it started."""
    child, limit, ended = start(folder, words, err=err, **more), time.monotonic() + seconds, {}
    while child not in reap(ended):
        if time.monotonic() > limit:
            while left := tree():
                end(left)
                time.sleep(0.05)
                reap(ended)
            return None
        time.sleep(0.01)
    return ended[child]


def cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    return sum(os.times()[:4])
