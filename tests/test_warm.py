"""What warm.py starts is what a new interpreter would be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "SEGFLEET_TESTS_COLD" in os.environ, reason="nothing is warm"
)
LOOK = """from multiprocessing.forkserver import main; import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "stdin": sys.stdin.read(),
    "environment": dict(os.environ),
    "shown": sorted(filter(None, open("/proc/self/environ").read().split(chr(0)))),
    "main": sys.modules["__main__"].__name__, "parent": os.getppid(),
    "leads": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(),
    "command": open("/proc/self/cmdline").read().strip(chr(0)).split(chr(0)),
    "handlers": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    "files": [os.path.exists(f"/proc/self/fd/{number}") for number in range(100)],
}))
print("torch" in sys.modules, file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(params=["warm", "cold"])
def how(request, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if request.param == "cold":
        request.getfixturevalue("cold")
    return request.param


@pytest.mark.parametrize("session", [True, False])
def test_a_fork_finds_what_a_new_interpreter_finds(tmp_path, monkeypatch, request, session):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, found = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with open(os.devnull) as kept:
        for early in ({}, {"SEGFLEET_TESTS_COLD": "1"}):
            done = subprocess.run(
                [sys.executable, "-c", LOOK, "a", "b c"], cwd=tmp_path,
                env={**os.environ, "X": "1", **early}, input="in", text=True,
                capture_output=True, start_new_session=session, pass_fds=[kept.fileno()],
            )  # fmt: skip
            assert done.returncode == 7, done.stderr
            assert done.stderr == f"{not early}\n", "only a fork has torch"
            found.append(json.loads(done.stdout))
            found[-1]["environment"].pop("SEGFLEET_TESTS_COLD", None)
            found[-1]["shown"] = [
                one for one in found[-1]["shown"] if "SEGFLEET_TESTS_COLD" not in one
            ]
    warm, cold = found
    assert {key for key in cold if warm[key] != cold[key]} == set()
    assert warm["parent"] == os.getpid()


def test_commands_say_the_same(how):
    def run(*words):
        command = [sys.executable, "-m", "segfleet.cli.main", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--version")
    assert (code, out.count("."), err) == (0, 2, "")
    code, out, err = run("nope")
    assert code == 2 and out == "" and "No such command 'nope'" in err
    code, out, err = run("recipe", "hippocampus", "--json")
    assert code == 0 and json.loads(out)["name"] == "hippocampus" and err == ""


def test_a_program_may_ask_for_a_fork(how):
    code = "# A fork will do.\nimport sys; print('torch' in sys.modules, sys.argv)"
    for first, fork in ((0, how == "warm"), (1, False)):  # without the line: a new interpreter
        words = [sys.executable, "-u", "-c", "\n".join(code.split("\n")[first:]), "a"]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        assert done.stdout == f"{fork} ['-c', 'a']\n"


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1",
    reason="no worker of `make test`",
)
def test_a_worker_is_a_fork():
    """An interpreter has a loader for its main module, a fork made that module itself."""
    assert sys.modules["__main__"].__loader__ is None


def test_a_fork_blocks_the_signals_of_who_starts_it_not_those_of_who_came_first(how):
    """Worker processes are started while signals are blocked, and may be the first of all."""
    code = (
        "from multiprocessing.forkserver import main; import signal\n"
        "print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    )

    def blocked() -> bool:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        return {"True\n": True, "False\n": False}[done.stdout]

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert blocked()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert not blocked()


def test_a_process_can_be_signalled_and_starts_others(how):
    """Its own command comes the same way, and neither outlives the other's pipe."""
    inner = (
        "from multiprocessing.forkserver import main; print('inner', 'torch' in "
        "__import__('sys').modules)"
    )
    code = (
        "from multiprocessing.forkserver import main; import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {inner!r}])\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == f"inner {how == 'warm'}\n"
        assert process.stdout.readline() == "ready\n" and process.poll() is None
        family = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
        assert process.stdout.read() == ""
