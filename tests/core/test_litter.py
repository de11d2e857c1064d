"""What killed processes left is removed by the next one, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from segfleet.core import litter
from tests.states import until


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed(place) -> str:
    """What a process printed that held a temporary folder and was killed."""
    program = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from segfleet.core import litter\n"
        "with litter.temporary_folder() as folder:\n"
        "    print(folder, flush=True); os.kill(os.getpid(), 9)\n"
    )
    words = [sys.executable, "-c", program, str(place)]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def test_the_folder_of_a_killed_process_goes_and_no_other(place):
    left = killed(place)
    assert os.path.isdir(left)
    strange = place / "segfleet-1000"  # copies of stores: no note
    (strange / "key").mkdir(parents=True)
    other = place / "segfleet-elsewhere"  # of another machine that shares the disk
    other.mkdir()
    note = {"host": "elsewhere", "process": 1, "began": None}
    (other / litter.NOTE).write_text(json.dumps(note))
    broken = place / "segfleet-broken"
    broken.mkdir()
    (broken / litter.NOTE).write_text("{")
    (place / "segfleet-link").symlink_to(strange)
    with litter.temporary_folder() as first, litter.temporary_folder() as second:
        assert not os.path.exists(left) and first.is_dir() and second.is_dir()
    assert sorted(path.name for path in place.iterdir()) == sorted(
        [strange.name, other.name, broken.name, "segfleet-link"]
    )


@pytest.mark.parametrize("after", range(7))
def test_whoever_is_killed_while_tidying_up_leaves_it_to_the_next_one(place, after):
    left = Path(killed(place))
    (left / "listener").touch()
    (left / "cache").mkdir()
    (left / "cache" / "file").touch()
    if (child := os.fork()) == 0:
        count = [after]
        for name in ("unlink", "rmdir"):
            setattr(os, name, until(getattr(os, name), count))
        try:
            litter.remove_folders(place)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    litter.remove_folders(place)
    assert list(place.iterdir()) == []


def test_a_process_killed_before_its_note_leaves_nothing_either(place):
    gone = subprocess.Popen(["true"])
    gone.wait()
    bare, empty, full = (place / f"segfleet-{gone.pid}-{8 * letter}" for letter in "abc")
    living = place / f"segfleet-{os.getpid()}-dddddddd"
    for folder in (bare, empty, full, living):
        folder.mkdir()
    (empty / litter.NOTE).touch()
    (full / "something").touch()
    litter.remove_folders(place)
    assert set(place.iterdir()) == {full, living}


def test_a_process_that_ended_and_that_nobody_asks_for_is_gone(place):
    """As in a container whose first process is no init."""
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        folder = place / f"segfleet-{ended.pid}-aaaaaaaa"
        folder.mkdir()
        litter.remove_folders(place)
        assert not folder.exists()


END = {"killed": "os.kill(os.getpid(), 9)", "at its end": "pass", "at once": "exit_now(0)"}


@pytest.fixture
def short():
    """A place whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize("how", END)
def test_sockets_of_multiprocessing_go_with_their_process(short, how):
    place = short
    program = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from multiprocessing import forkserver\n"
        "from segfleet.core.litter import note_multiprocessing\n"
        "from segfleet.pipeline.launch.worker import exit_now\n"
        "note_multiprocessing(); forkserver.ensure_running()\n"
        f"assert len(os.listdir(tempfile.tempdir)) == 1; {END[how]}\n"
    )
    subprocess.run([sys.executable, "-c", program, str(place)], capture_output=True)
    assert [path.name for path in place.iterdir() if how != "killed"] == []
    litter.remove_folders(place)
    assert list(place.iterdir()) == []


def test_what_libraries_put_into_the_temporary_folder_goes_too(place):
    with litter.temporary_files():
        tempfile.mkdtemp()
        (folder,) = place.iterdir()
        assert len(list(folder.iterdir())) == 2 and (folder / litter.NOTE).is_file()
    assert tempfile.gettempdir() == str(place) and list(place.iterdir()) == []


def test_a_number_that_is_another_process_now_says_nothing(place):
    left = place / "segfleet-old"
    left.mkdir()
    note = {**litter._this_process(), "began": "1 of another boot"}
    (left / litter.NOTE).write_text(json.dumps(note))
    litter.remove_folders(place)
    assert not left.exists()


def test_a_process_may_have_any_name(place):
    program = (
        "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff)\\xe4'); print(flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        child.stdout.readline()
        assert litter._began(child.pid).split()[0].isdigit()
        child.communicate(b"\n")


def test_shared_memory_of_killed_processes_goes_by_their_own_note(place, monkeypatch):
    """Torch takes a name in /dev/shm away once it has given it: a kill may come in between."""
    monkeypatch.setattr(litter, "SHARED", place / "shm")
    (place / "shm").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {number: place / "shm" / f"torch_{number}_123_0" for number in (gone.pid, os.getpid())}
    strange = place / "shm" / f"torch_{gone.pid + 1}_123_0"  # nobody has noted it
    for path in (*names.values(), strange):
        path.touch()
    left = Path(killed(place))
    for number in names:
        (left / f"{litter.SHARES}{number}").touch()
    (left / f"{litter.SHARES}x").touch()
    litter.remove_folders(place)
    assert not left.exists() and set((place / "shm").iterdir()) == {names[os.getpid()], strange}
    litter.remove_shared_memory(os.getpid())
    assert list((place / "shm").iterdir()) == [strange]


def test_a_process_notes_that_it_shares_memory_beside_its_parents_sockets(place, monkeypatch):
    config = litter.multiprocessing.current_process()._config
    monkeypatch.setitem(config, "tempdir", str(place))
    litter.note_shared_memory()  # a folder of Python's own, which nobody removes by a note
    assert list(place.iterdir()) == []
    (place / litter.NOTE).touch()
    litter.note_shared_memory()
    assert (place / f"{litter.SHARES}{os.getpid()}").exists()
