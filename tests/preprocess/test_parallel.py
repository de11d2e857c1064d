"""What crosses a process border, and how often."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import forkserver

import pytest

from segfleet.core import parallel
from segfleet.core.parallel import SMALL, Apart, Died, run

PICKLED = [0]


class Heavy:
    """Stands for a reader with its list of cases."""

    def __reduce__(self):
        PICKLED[0] += 1
        return Heavy, ()


def double(heavy: Heavy, item: int) -> int:
    assert isinstance(heavy, Heavy)
    return 2 * item


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_bound_to_the_function_crosses_once_per_process(workers):
    counts = []
    for many in (4, 40):
        PICKLED[0] = 0
        found = dict(
            run(
                partial(double, Heavy()),
                range(many),
                weights=[0] * many,
                names=[""] * many,
                workers=workers,
            )
        )
        assert found == {n: 2 * n for n in range(many)}
        counts.append(PICKLED[0])
    assert max(counts) <= (workers if workers > 1 else 0)


def crash_at(bad: int, item: int) -> int:
    if item == bad:
        os.kill(os.getpid(), signal.SIGSEGV)  # as a library of C code does
    return 2 * item


@pytest.mark.parametrize("workers", [1, 2])
def test_what_kills_its_process_costs_itself_alone(workers):
    many = 12
    found = dict(
        run(
            partial(crash_at, 3),
            range(many),
            weights=[2**25] * many,  # worth a process, even one
            names=[f"case {n}" for n in range(many)],
            workers=workers,
            died=lambda item, cause: f"{item} died of {cause}",
        )
    )
    assert found == {n: 2 * n if n != 3 else "3 died of SIGSEGV" for n in range(many)}
    with pytest.raises(RuntimeError, match=r"died \(SIGSEGV\) while it worked on one of: case 3$"):
        list(
            run(
                partial(crash_at, 3), range(many), weights=[2**25] * many,
                names=[f"case {n}" for n in range(many)], workers=workers,
            )
        )  # fmt: skip


ORPHANED = """
import _multiprocessing, multiprocessing, os, pickle, time
from multiprocessing import context, forkserver, reduction, spawn
from segfleet.core import parallel

if __name__ == "__main__":
    parallel.start_server("__main__", parallel.SERVED)
    lock = multiprocessing.get_context("forkserver").Lock()
    context.set_spawning_popen(lock)
    late = pickle.dumps(spawn.get_preparation_data("late")) + reduction.ForkingPickler.dumps(lock)
    _multiprocessing.sem_unlink(lock._semlock.name)  # as the tracker does, once its process is gone
    for orders in (b"", b"cut off", late):
        parent, write = forkserver.connect_to_new_process([])
        os.write(write, orders)
        os.close(write)
        os.read(parent, 8), os.read(parent, 8)  # its number, and how it ended
    os._exit(0)  # the lock would be removed again
"""


def test_a_worker_whose_orders_never_came_says_nothing(tmp_path):
    (tmp_path / "orphaned.py").write_text(ORPHANED)
    done = subprocess.run(
        [sys.executable, tmp_path / "orphaned.py"], capture_output=True, text=True, timeout=200
    )
    assert done.stderr == ""


def test_other_errors_are_told(capsys):
    from segfleet.core.served import report

    try:
        raise EOFError("of a file")
    except EOFError as error:
        report(type(error), error, error.__traceback__)
    assert "EOFError: of a file" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["resource_sharer", "spawn", "forkserver"])
def test_a_worker_whose_process_is_gone_says_nothing(part, capsys):
    from multiprocessing import connection

    from segfleet.core.served import report

    def run(program: str, **names) -> str:
        try:
            exec(program, {"__name__": f"multiprocessing.{part}", **names})
        except Exception as error:
            report(type(error), error, error.__traceback__)
        return capsys.readouterr().err

    ours, theirs = connection.Pipe()
    theirs.close()
    assert run("connection.recv()", connection=ours) == ""
    assert "ZeroDivisionError" in run("1 / 0")
    # of what it was asked to do
    assert "FileNotFoundError" in run("shutil.rmtree('/nowhere')", shutil=shutil)


def refuse(item: int) -> int:
    raise ValueError(f"{item} is refused")


def test_a_process_apart_dies_alone():
    with Apart() as apart:
        first = apart(os.getpid)
        assert first == apart(os.getpid) != os.getpid()
        with pytest.raises(Died):
            apart(crash_at, 3, 3)
        assert apart(crash_at, 3, 4) == 8 and apart(os.getpid) != first
        with pytest.raises(ValueError, match="5 is refused"):
            apart(refuse, 5)


def fail_at(bad: int, item: int) -> int:
    if item == bad:
        raise ValueError(f"item {item}")
    return 2 * item


@pytest.fixture
def dying_server():
    """The server that processes start from is killed while the next one is asked for."""
    assert Apart()(os.getpid)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (server, signal.SIGKILL)).start()
    yield server
    assert forkserver._forkserver._forkserver_pid not in (server, None)


def test_a_pool_goes_on_when_the_server_of_its_processes_is_killed(dying_server):
    plain = {"weights": [0] * 9, "names": [""] * 9, "workers": 2}
    assert dict(run(partial(double, Heavy()), range(9), **plain)) == {n: 2 * n for n in range(9)}


def test_a_process_apart_starts_when_the_server_of_processes_is_killed(dying_server):
    with Apart() as apart:
        assert apart(double, Heavy(), 4) == 8
        (process,) = apart._pool._processes
        os.kill(process, signal.SIGKILL)  # between two calls: nobody is to blame
        while not apart._pool._broken:
            time.sleep(0.01)
        assert apart(double, Heavy(), 5) == 10


@pytest.mark.parametrize("begin", ["pool", "loader"])
def test_the_server_of_processes_outlives_what_slurm_sends_to_all(begin, tmp_path):
    """Without it a rank that is asked to stop may get no further batch, and fails instead."""
    start = {
        "pool": "from segfleet.core.parallel import start_server, SERVED; start_server(SERVED)",
        "loader": "from segfleet.pipeline.data import loader; loader._forkserver()",
    }
    words = (
        "import os, signal, time\nfrom multiprocessing import forkserver\n"
        f"{start[begin]}\nserver = forkserver._forkserver._forkserver_pid\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):\n"
        "    os.kill(server, number)\n"
        "time.sleep(1)\nprint(os.waitpid(server, os.WNOHANG)[0])"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_a_suspect_is_tried_alone_when_the_server_of_processes_is_killed(dying_server):
    assert parallel._alone(partial(double, Heavy()), 4) == (8, "")


def test_processes_that_never_start_are_one_sentence(monkeypatch):
    def refused(*_):
        raise ConnectionRefusedError

    monkeypatch.setattr(ProcessPoolExecutor, "submit", refused)
    plain = {"weights": [0] * 9, "names": [""] * 9, "workers": 2}
    with pytest.raises(RuntimeError, match="worker processes are killed as they start"):
        dict(run(partial(double, Heavy()), range(9), **plain))


def test_small_items_cross_many_at_a_time(monkeypatch):
    """Counted: what is handed over. Large ones still go one by one, and so does what is left for
    several workers."""
    handed = []
    plain = ProcessPoolExecutor.submit
    monkeypatch.setattr(
        ProcessPoolExecutor,
        "submit",
        lambda pool, call, group: handed.append(len(group)) or plain(pool, call, group),
    )
    for weight, most in ((1000, 64), (SMALL // 4, 4), (SMALL, 1)):
        handed.clear()
        found = run(
            partial(double, Heavy()),
            range(300),
            weights=[weight] * 300,
            names=[""] * 300,
            workers=2,
            budget=2**40,
        )
        assert dict(found) == {n: 2 * n for n in range(300)}
        assert sum(handed) == 300 and max(handed) == min(most, 300 // 8) and handed[-1] == 1


def test_what_was_done_before_an_error_is_kept():
    found = {}
    with pytest.raises(ValueError, match="item 70") as caught:
        for one in run(
            partial(fail_at, 70), range(90), weights=[1] * 90, names=[""] * 90, workers=2
        ):
            found.update([one])
    assert set(range(60)) <= set(found) and all(found[n] == 2 * n for n in found)
    assert "in fail_at" in caught.value.__notes__[0]


LAST = """
import multiprocessing, os, sys, time
from pathlib import Path
from segfleet.core import parallel

def work(path, ready):
    parallel.end_with_parent(lambda: Path(path).touch())
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    context.Process(target=work, args=(sys.argv[1], ready)).start()
    ready.wait()
    os.kill(os.getpid(), 9)
"""


def test_who_ends_with_its_parent_tidies_up_first(tmp_path):
    (tmp_path / "last.py").write_text(LAST)
    subprocess.run([sys.executable, tmp_path / "last.py", tmp_path / "done"], timeout=200)
    end = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


UNSENT = """
import multiprocessing, os, sys, time
from segfleet.core import parallel

class Unsendable:
    def __reduce__(self):
        raise FileNotFoundError("a socket's folder")

def work(queue, ready, go):
    parallel.guard_queues()
    ready.set()
    go.wait()
    queue.put(Unsendable())
    time.sleep(4 if sys.argv[1] == "ends" else 200)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    queue, ready, go = context.Queue(), context.Event(), context.Event()
    process = context.Process(target=work, args=(queue, ready, go), daemon=True)
    process.start()
    ready.wait()
    go.set()
    if sys.argv[1] == "ends":
        os._exit(0)
    process.join(100)
    print(process.exitcode)
"""


@pytest.mark.parametrize("parent", ["ends", "lives"])
def test_who_cannot_send_what_is_waited_for_ends_and_says_so(tmp_path, parent):
    (tmp_path / "unsent.py").write_text(UNSENT)
    words = [sys.executable, tmp_path / "unsent.py", parent]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    lives = parent == "lives"
    assert ("ends: FileNotFoundError: a socket's folder\n" in done.stderr) == lives, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ("1\n" if lives else "")
