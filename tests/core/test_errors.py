"""What is no fault of ours is one sentence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segfleet.core.errors import ExitCode, explain
from segfleet.core.files import make_folder
from segfleet.pipeline.stop import StopRequest


@pytest.fixture
def deep(tmp_path):
    """1,100 folders inside one another."""
    handle, made = os.open(tmp_path, os.O_RDONLY), tmp_path / "d"
    for _ in range(1100):
        os.mkdir("d", dir_fd=handle)
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    yield made
    subprocess.run(["rm", "-rf", made], check=True)


WAYS = {
    "rglob": lambda deep: list(deep.rglob("*")),
    "walk": lambda deep: list(os.walk(deep)),
    "copytree": lambda deep: shutil.copytree(deep, deep.parent / "copy"),
    "rmtree": shutil.rmtree,
    "make_folder": lambda deep: make_folder(deep.parent / ("e/" * 1100)),
}


@pytest.mark.parametrize("way", WAYS)
def test_folders_without_end_are_one_sentence(deep, way):
    try:
        WAYS[way](deep)  # newer Pythons walk some of them
    except RecursionError as error:
        message, code = explain(error)
        assert code == ExitCode.INPUT and str(deep.parent)[:80] in message
        assert "\n" not in message and len(message) < 300
    finally:
        subprocess.run(["rm", "-rf", deep.parent / "copy", deep.parent / "e"], check=True)


def test_a_recursion_of_ours_is_a_fault_of_ours():
    def again(path: Path):
        again(path)

    with pytest.raises(RecursionError) as raised:
        again(Path())
    assert explain(raised.value) is None


def test_ctrl_c_is_one_sentence_also_while_the_command_is_imported():
    message, code = explain(KeyboardInterrupt())
    assert code == ExitCode.INTERRUPTED and message.startswith("interrupted.")
    program = "import segfleet.cli; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stderr == "segfleet: interrupted\n" and ended.returncode in (130, -2)


def test_a_third_ctrl_c_cuts_off_nothing():
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in heard}
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        stop, asked = StopRequest(), []
        stop.at_once = lambda: asked.append(1)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked == [1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_full_place_of_shared_memory_is_named():
    """The error of a semaphore names no file."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16k tmpfs /dev/shm && $0 "$@"']
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    program = (
        "import multiprocessing; from segfleet.core.errors import explain\n"
        "try: locks = [multiprocessing.get_context('forkserver').Lock() for _ in range(9)]\n"
        "except OSError as error: print(*explain(error))"
    )
    done = subprocess.run([*mount, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("no space left in /dev/shm,"), done.stderr
    assert "--shm-size=2g" in done.stdout and done.stdout.endswith(" 2\n")
