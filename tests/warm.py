"""`python -m segfleet...` that starts at once: a fork of a process that has imported torch.

Most of the suite's time went into interpreters that import the same seconds of packages. `install`
lets `subprocess` fork such a command from a warm process instead. What comes out is what
`subprocess` expects: a child of its own with that command line, environment, folder, pipes and
session, which runs the module as `python -m` does and ends as an interpreter ends. Its own
`segfleet` children (ranks, the loader's fork server) start the same way. So do the workers of
pytest-xdist, whose forks have a warm process of their own, and programs that begin with `FORKED`.

A new interpreter is started after all where the test is about that (SEGFLEET_TESTS_COLD in the
environment), where the environment holds what is read while importing, such as PYTHONPATH, on a
terminal, and for every other command. `SEGFLEET_TESTS_COLD=1 make test` warms nothing.
"""

from __future__ import annotations

import _posixsubprocess
import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

PACKAGES = ("torch._dynamo", "segfleet.pipeline.jobs", "tensorboardX", "typer")
# What is read while Python, torch or segfleet are imported.
EARLY = ("PYTHON", "LD_", "OMP_", "MKL_", "LC_", "LANG", "SEGFLEET_PLUGINS", "SEGFLEET_TESTS_COLD")
FORKED = "# A fork will do.\n"  # the first line of a program for -c that may start so, too
COMMANDS = {
    "-m": ("segfleet.",),
    # fork servers, and the workers of pytest-xdist
    "-c": ("from multiprocessing.forkserver import main", "import sys;exec(eval(", FORKED),
}
SUBREAPER = 36  # of prctl: who inherits the orphans among its descendants
ROOM = 8192  # bytes for the command line and for the variables of a fork
ABOVE = 200  # our own files, out of the way of those that a command gets by number

start_cold = _posixsubprocess.fork_exec


def early(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(EARLY)}


class Warm:
    """The near end: gives orders to the warm process, which `open_channel` leads to."""

    def __init__(self, open_channel: Callable[[], socket.socket], same: dict[str, str]):
        self.open_channel, self.same = open_channel, same
        self.channel: socket.socket | None = None
        self.lock = threading.Lock()

    def use(self) -> None:
        subprocess._fork_exec = _posixsubprocess.fork_exec = self.fork_exec
        subprocess._USE_POSIX_SPAWN = False  # what Python 3.13 prefers for plain commands

    def fork_exec(self, *arguments: Any) -> int:
        """In place of `_posixsubprocess.fork_exec`: start a process, return its id."""
        order = self.order(arguments)
        return self.start(*order) if order else start_cold(*arguments)

    def order(self, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], list[int]] | None:
        """What to fork, with which open files; None: a command for a new interpreter."""
        words, _, _, kept, folder, environment, *pipes, _, error_pipe = arguments[:14]
        _, session, group, gid, gids, uid, umask, prepare = arguments[14:22]
        words = [os.fsdecode(word) for word in words]
        program, *rest = words
        flags = list(takewhile(("-P", "-B", "-u").__contains__, rest))
        rest = rest[len(flags) :]
        how, what = (*rest, "", "")[:2]
        if program != sys.executable or not what.startswith(COMMANDS.get(how, ())):
            return None
        plain = (group, gid, gids, uid, umask, prepare) == (-1, None, None, None, -1, None)
        variables = dict(os.environ)
        if environment is not None:
            variables = dict(os.fsdecode(pair).split("=", 1) for pair in environment)
        ends = (pipes[0], pipes[3], pipes[5])  # of the child
        files = [end if end >= 0 else number for number, end in enumerate(ends)]
        if not plain or early(variables) != self.same or any(map(os.isatty, files)):
            return None
        further = [number for number in kept if number != error_pipe]
        order = {
            "words": words,
            "flags": flags,
            "rest": rest,
            "environment": variables,
            "folder": os.getcwd() if folder is None else os.fsdecode(folder),
            "session": bool(session),
            "ignored": sorted(ignored()),
            "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
            "group": os.getpgid(0),
            "numbers": [0, 1, 2, *further],
        }
        return order, [*files, *further]

    def start(self, order: dict[str, Any], files: list[int]) -> int:
        with self.lock:
            self.channel = self.channel or self.open_channel()
            prctl(SUBREAPER, 1)  # so that the fork of the warm process becomes our child
            try:
                socket.send_fds(self.channel, [json.dumps(order).encode()], files)
                return int(self.channel.recv(32))
            finally:
                prctl(SUBREAPER, 0)


def install() -> Callable[[], None]:
    """Use a warm process from here on; what undoes that. Not at all if SEGFLEET_TESTS_COLD is set
    already, nor in a fork, which has a warm process of its own."""
    forked = not isinstance(start_cold, types.BuiltinFunctionType)
    if forked or "SEGFLEET_TESTS_COLD" in os.environ:
        return lambda: None
    same = early(os.environ) | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    server: list[subprocess.Popen] = []

    def open_channel() -> socket.socket:
        near, far = pair()
        command = [sys.executable, "-P", __file__, str(far.fileno()), " " * ROOM]
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        environment = {**os.environ, **same, "TORCH_CPP_LOG_LEVEL": "ERROR", "ROOM": " " * ROOM}
        server.append(
            subprocess.Popen(command, env=environment, pass_fds=[far.fileno()], **nothing)
        )
        far.close()
        return near

    warm, spawns = Warm(open_channel, same), subprocess._USE_POSIX_SPAWN
    warm.use()

    def undo() -> None:
        subprocess._fork_exec = _posixsubprocess.fork_exec = start_cold
        subprocess._USE_POSIX_SPAWN = spawns
        if warm.channel:
            warm.channel.close()
            server[0].wait(60)

    return undo


def main() -> None:
    """The warm process. Every fork has one of its own, for what it will start, forked before
    anything has happened in it."""
    channel = socket.socket(fileno=lift(int(sys.argv[1])))
    os.setpgid(0, 0)  # Ctrl-C is for the others
    for name in PACKAGES:
        importlib.import_module(name)
    import segfleet.models as networks

    for module in pkgutil.iter_modules(networks.__path__):
        with suppress(Exception):  # whoever asks for the network is told
            importlib.import_module(f"segfleet.models.{module.name}")
    from segfleet.pipeline import sources

    for name in sources.computing():  # every command and rank asks what its code says
        sources.source_hash(sources.HOME / name)
    gc.freeze()
    while True:
        order, files = serve(channel)
        near, far = pair()
        if os.fork():
            break
        near.close()
        channel = far
        let_go(files)
    far.close()
    Warm(lambda: near, early(order["environment"])).use()
    become(order, files)
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    how, what, *arguments = order["rest"]
    sys.argv, sys.orig_argv = [how, *arguments], order["words"]
    if "-u" in order["flags"]:
        sys.stdout.reconfigure(write_through=True)
    if "-P" not in order["flags"]:
        sys.path.insert(0, order["folder"] if how == "-m" else "")
    code = 0
    try:
        runpy._run_module_as_main(what) if how == "-m" else exec(what, module.__dict__)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finish(code)


def serve(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for every order; ends when nobody is left to give orders. Returns in the forks, each a
    child of the process that gave the order, with its order and files."""
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 20, 64)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            break
        os.waitpid(between, 0)
        for file in files:
            os.close(file)
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        os.sched_yield()
    order = json.loads(message)
    if order["session"]:
        os.setsid()
    else:
        os.setpgid(0, order["group"])
    channel.send(str(os.getpid()).encode())
    channel.close()
    return order, [lift(file) for file in files]


def let_go(files: list[int]) -> None:
    """Hold nothing of the process this was forked from."""
    os.setpgid(0, 0)
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for file in (nothing, *files):
        os.close(file)
    os.environ.clear()  # nobody else points to what is overwritten
    show(["warm"], {})


def become(order: dict[str, Any], files: list[int]) -> None:
    """The process that was ordered, as far as the system sees it."""
    for file, number in zip(files, order["numbers"], strict=True):
        os.dup2(file, number)
        os.close(file)
    for number in ignored() ^ set(order["ignored"]):
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in order["ignored"] else usual)
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # TMPDIR may be another one
    show(order["words"], order["environment"])


def ignored() -> set[int]:
    """Signals that this process ignores, and thus a new interpreter would; those that Python itself
    ignores are restored by `subprocess`."""
    found = {n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN}
    return {int(n) for n in found} - {signal.SIGPIPE, signal.SIGXFSZ}


def finish(code: Any) -> None:
    """As an interpreter ends, but for taking torch apart, which takes longer than many a
    command."""
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def show(words: list[str], environment: Mapping[str, str]) -> None:
    """What `ps` and /proc show, in the place of our own words and variables."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    pairs = [f"{key}={value}" for key, value in environment.items()]
    for texts, begin, end in ((words, *stat[45:47]), (pairs, *stat[47:49])):
        room = int(end) - int(begin)
        block = b"".join(os.fsencode(text) + b"\0" for text in texts)[: room - 1]
        ctypes.memmove(int(begin), block.ljust(room, b"\0"), room)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a channel that keeps messages apart."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, far = (socket.socket(fileno=lift(end.detach())) for end in ends)
    return near, far


def lift(file: int) -> int:
    """The same open file under a number that nobody asks for."""
    high = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, ABOVE)
    os.close(file)
    return high


def prctl(what: int, value: int) -> None:
    ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


if __name__ == "__main__":
    main()
