"""However a training ends, none of its processes stays, and whoever reads its output gets to the
end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from segfleet.core import litter
from segfleet.core.errors import ExitCode
from segfleet.pipeline.data import handover, loader
from segfleet.pipeline.launch import local
from segfleet.preprocess.stores.base import open_store

SECONDS = 5.0  # in which all must be gone
MARK = "SEGFLEET_TEST_SESSION"


def marked(mark: str) -> dict[int, str]:
    """Every process that inherited the mark: its id and command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = words.decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
    return {number: words for number, words in found.items() if words}


def until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.fixture
def temporary():
    """TMPDIR of the training; a short path, for sockets lie in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def training(tiny_recipe, tmp_path, temporary):
    """`training()`: one with two ranks and two loader processes each, behind a pipe, at work."""
    folder = tiny_recipe([{"name": "long", "epochs": 400, "steps": 100, "lr": 1e-3}], 2)
    mark, started = uuid.uuid4().hex, []

    def start():
        words = [sys.executable, "-m", "segfleet.cli.main", "train", str(folder / "tiny.yaml")]
        process = subprocess.Popen(
            [*words, "data.workers=2", "--ranks", "2", "--runs", str(tmp_path / "runs")],
            env={
                **os.environ,
                MARK: mark,
                "OMP_NUM_THREADS": "1",
                "SEGFLEET_DEVICE": "cpu",
                "TMPDIR": str(temporary),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        assert until(lambda: list((tmp_path / "runs").rglob("step-*")), 120), marked(mark)
        assert sum("forkserver" in words for words in marked(mark).values()) >= 6  # 2 of them serve
        return process, mark

    yield start
    for number in marked(mark):
        os.kill(number, signal.SIGKILL)


def ranks_of(mark: str) -> list[int]:
    return [number for number, words in marked(mark).items() if "launch.worker" in words]


WAYS = {
    "the command is killed": lambda process, mark: process.kill(),
    "a rank is killed": lambda process, mark: os.kill(ranks_of(mark)[0], signal.SIGKILL),
    "Ctrl-C": lambda process, mark: process.send_signal(signal.SIGINT),
    "SIGTERM": lambda process, mark: process.send_signal(signal.SIGTERM),
    "a loader is killed": lambda process, mark: os.kill(loader_of(mark), signal.SIGKILL),
}


def loader_of(mark: str) -> int:
    """A forkserver's child."""
    servers = [number for number, words in marked(mark).items() if "forkserver" in words]
    parents = {number: int(_stat(number)[1]) for number in servers}
    return next(number for number, parent in parents.items() if parent in servers)


def _stat(number: int) -> list[str]:
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()


LONG = ("SIGTERM", "a loader is killed", "a rank is killed")  # Ctrl-C is a SIGTERM to the ranks


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.long) if way in LONG else way for way in WAYS]
)
def test_no_process_and_no_folder_is_left(training, way, temporary):
    process, mark = training()
    WAYS[way](process, mark)
    process.communicate(timeout=60)  # the end of its output: nobody holds the pipe any more
    assert until(lambda: not marked(mark), SECONDS), marked(mark)
    litter.remove_folders(temporary)  # as the next command does
    left = [path.name for path in temporary.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor")] == []


def test_ranks_that_do_not_stop_are_killed_when_their_time_is_over(monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf])
    try:
        begin = time.monotonic()
        codes = local._watch([process], lambda: None, [begin])
        assert codes == [None] and time.monotonic() - begin < 5
    finally:
        process.kill()
        process.wait()
    message, code = local._reason(Path("nowhere"), codes)
    assert "rank 0 did not stop within" in message and code == ExitCode.INTERRUPTED


SMALL = """
import torch
from segfleet.pipeline.data import loader

class Patches(torch.utils.data.Dataset):
    pinned = False

    def __getitems__(self, places):
        image = torch.full((2, 1, 64, 64, 64), float(places[0][1]))
        return loader.Batch(image, torch.zeros(2, 64, 64, 64).byte(), ("a", "b"))

if __name__ == "__main__":
    schedule = loader.Schedule(0, 1, 6, 2, 1, 0, 1)
    print([int(batch.image[1, 0, 3, 3, 3]) for batch in loader.batches(Patches(), schedule, 2)])
"""


def test_batches_larger_than_shared_memory_go_through_pipes(tmp_path):
    """And what was tried in vain leaves no name there."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm && "
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", mount + "true"], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    (tmp_path / "small.py").write_text(SMALL)
    command = mount + f"{sys.executable} {tmp_path / 'small.py'}; ls /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "[0, 2, 4, 6, 8, 10]", done.stderr
    assert done.stderr == loader.TOO_SMALL  # once, and no traceback of a thread


def test_loader_processes_whose_server_is_killed_are_one_sentence(monkeypatch, tiny_store):
    def iterate(_):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(loader.DataLoader, "__iter__", iterate)
    with pytest.raises(loader.LoaderDied, match="start from was killed .* Run the same command"):
        next(loader.training_batches(open_store(tiny_store(dims=2)), batch=2, steps=1, workers=1))


def test_a_batch_that_does_not_fit_is_sent_as_arrays(monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batch = loader.Batch(torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4).byte(), ("a",))
    sent = handover.Sender("")(batch)
    assert isinstance(sent.image, np.ndarray) and isinstance(sent.label, np.ndarray)


DYING = """
import os, signal, time, torch
from segfleet.core.errors import explain
from segfleet.pipeline.data import loader

class Lost:
    def __reduce__(self):
        raise OSError("a pipe that is none")

class Patches(torch.utils.data.Dataset):
    pinned = False

    def __getitems__(self, places):
        if places[0][1] == 6:
            HOW
        return loader.Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).byte(), ("a", "b"))

if __name__ == "__main__":
    loader.LOOK, loader.TIMEOUT = 0.5, LIMIT
    schedule = loader.Schedule(0, 1, 6, 2, 1, 0, 1)
    begun = 0
    try:
        for batch in loader.batches(Patches(), schedule, 2):
            begun += 1
    except loader.LoaderError as error:
        print(begun, error, explain(error) == (str(error), 1))
    else:
        print(begun, "no error")
"""


@pytest.mark.parametrize("how, limit, said", [
    ("os.kill(os.getpid(), signal.SIGKILL)", 60,
     r"\d loading: DataLoader worker \(pid\(s\) .* True"),
    ("return loader.Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).byte(), ('a', Lost()))", 60,
     r"\d loading: DataLoader worker \(pid\(s\) .* True"),
    ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(8)", 60,
     r"\d loading: DataLoader worker \(pid\(s\) .* True"),
    ("time.sleep(8)", 4, "3 loading: no batch for 4 s.* True"),
    ("time.sleep(3)", 60, "6 no error"),
])  # fmt: skip
def test_a_loader_process_that_dies_is_missed_soon(how, limit, said, tmp_path):
    """Long before the time that a slow disk is given."""
    program = DYING.replace("HOW", how).replace("LIMIT", str(limit))
    (tmp_path / "dying.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "dying.py")], capture_output=True, text=True, timeout=200
    )
    assert re.match(said, done.stdout, re.DOTALL), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert ("cannot hand over what it made and ends: OSError: a pipe" in done.stderr) == (
        "Lost" in how
    )
