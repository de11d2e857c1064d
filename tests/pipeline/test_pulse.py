"""A rank that hangs or lags is named, its stacks are written, and the job ends to come back."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segfleet.core.errors import ExitCode
from segfleet.pipeline.training.pulse import Beat, Pulse, hung, slow


def beat(number: int = 2, step: int = 5, waits: bool = True, **more) -> Beat:
    facts = {"where": "read (slow.py, line 3)", "place": "node, cpu", "looks": 100, "waited": 0}
    facts["data"] = False
    return Beat(number=number, step=step, waits=waits, **{**facts, **more})


def test_who_hangs():
    before = {rank: beat(number=1) for rank in range(3)}
    fine = {rank: beat() for rank in range(3)}
    assert hung(before, fine) == {}  # all wait for each other
    assert list(hung(before, fine | {1: beat(number=1)})) == [1]  # no further note
    assert list(hung(before, fine | {2: None})) == [2]
    assert list(hung(before, fine | {1: beat(waits=False)})) == [1]
    late = hung(before, fine | {0: beat(step=4, waits=False)})
    assert list(late) == [0] and "still at step 4, the others at 5" in late[0]
    # who only waits is not at fault, one step behind or not
    assert list(hung(before, {0: beat(step=4), 1: beat(waits=False), 2: beat()})) == [1]
    assert hung(before, {rank: beat(waits=False) for rank in range(3)}) == {}


def test_who_is_slow():
    before = {rank: beat() for rank in range(3)}

    def after(*waited: int) -> dict[int, Beat]:
        return {rank: beat(looks=200, waited=count) for rank, count in enumerate(waited)}

    assert slow(before, after(60, 5, 70)) == [1]
    assert slow(before, after(60, 5, 40)) == []  # less than half of the time
    assert slow(before, after(5, 5, 5)) == [] and slow({}, after(60, 5, 70)) == []
    assert slow({0: beat()}, {0: beat(looks=200)}) == []


def lag(ranks, seconds: float) -> list[str]:
    """Rank 1 sleeps in its second step; what each rank says."""
    import torch

    os.environ["SEGFLEET_WATCHDOG"] = "1"
    said, file = [], open("/proc/self/fd/2", "w")
    ranks.give_up = lambda message: said.append("gives up: " + message)
    pulse = Pulse(ranks, said.append, file)
    for step in range(2):
        pulse.beat(step)
        if step and ranks.rank == 1:
            time.sleep(seconds)
        ranks.sum(torch.ones(1))
    pulse.close()
    return said


def test_the_rank_that_sleeps_is_named_by_one(run_in_ranks):
    said = sum(run_in_ranks("test_pulse.py:lag", 3, seconds=8.0), [])
    named = [line for line in said if "hangs" in line]
    assert len(named) == 1 and named[0].startswith("rank 1 (") and "in lag (" in named[0]


def test_a_single_rank_says_where_and_ends_for_another_try(monkeypatch):
    from segfleet.pipeline.ranks import Ranks

    monkeypatch.setenv("SEGFLEET_WATCHDOG", "0.2")
    ranks, said, ended = Ranks(), [], []
    ranks.give_up = ended.append
    with open(os.devnull, "w") as file:
        pulse = Pulse(ranks, said.append, file)
        pulse.beat(7)
        time.sleep(3)
        pulse.close()
    assert len(said) == 1 and "hangs: is in" in said[0]
    assert ended and ended[0].startswith("step 7 did not end within 2 s")


def loading(ranks, read, **settings) -> list[str]:
    """Rank 1 waits for its batch from `read(pulse)`; what each rank says. `settings`: of pulse."""
    import torch

    from segfleet.pipeline.data import loader
    from segfleet.pipeline.training import pulse as module

    vars(module).update(settings)
    said, file = [], open("/proc/self/fd/2", "w")
    ranks.give_up = lambda message: said.append("gives up: " + message)
    pulse = Pulse(ranks, said.append, file)
    pulse.beat(0)
    if ranks.rank == 1:
        assert list(loader._in_time(read(pulse))) == ["batch"]
    ranks.sum(torch.ones(1))
    pulse.close()
    return said


def away(ranks, seconds: float) -> list[str]:
    """A file system is away for `seconds`, three times as long as a rank may hang."""

    def read(pulse):
        time.sleep(seconds)
        yield "batch"

    os.environ["SEGFLEET_WATCHDOG"] = str(seconds / 30)
    return loading(ranks, read, INTERVAL=0.2)


def test_a_file_system_that_is_away_ends_no_job_that_waits_for_it(run_in_ranks):
    said = sum(run_in_ranks("test_pulse.py:away", 2, seconds=5.0), [])
    assert len(said) == 1, said
    assert "rank 1 (" in said[0] and "it waits for data" in said[0] and "after 8 s" in said[0]


def stopped(ranks, seconds: float) -> list[str]:
    """Rank 1 says last that it waits for data, then nothing more."""

    def read(pulse):
        time.sleep(0.4)
        pulse._end.set()
        time.sleep(seconds)
        yield "batch"

    os.environ["SEGFLEET_WATCHDOG"] = "0.5"
    return loading(ranks, read, INTERVAL=0.1, PATIENCE=2.0)


def test_a_stopped_rank_waits_for_nothing_whatever_it_said_last(run_in_ranks):
    """Or the job would end ten times as late as for any other rank that hangs."""
    said = run_in_ranks("test_pulse.py:stopped", 2, seconds=9.0)[0]
    assert "gives no sign of life" in said[0] and "waits for data" not in said[0], said
    assert said[1].startswith("gives up: step 0 did not end within"), said


def test_nobody_hangs_in_a_save_or_between_fast_steps(monkeypatch):
    from segfleet.pipeline.ranks import Ranks

    monkeypatch.setenv("SEGFLEET_WATCHDOG", "0.3")
    said: list[str] = []
    pulse = Pulse(Ranks(), said.append, io.StringIO())
    for step in range(10):
        pulse.beat(step)
        time.sleep(0.05)
    pulse.rest()
    time.sleep(0.8)
    pulse.close()
    assert said == []


SUSPENDED = """
import sys, time
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.training import pulse

pulse.END = 2
said = []
watch = pulse.Pulse(Ranks(), said.append)
watch.beat(1)
print("begun", flush=True)
for _ in range(40):
    time.sleep(0.02)
watch.close()
sys.exit("; ".join(said) or 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
def test_a_job_that_slurm_suspends_is_not_late():
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SUSPENDED],
        env={**os.environ, "SEGFLEET_WATCHDOG": "1", "SEGFLEET_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
def test_a_stopped_rank_is_named_and_the_command_ends_to_be_run_again(tiny_recipe, tmp_path):
    folder = tiny_recipe([{"name": "long", "epochs": 400, "steps": 100, "lr": 1e-3}], 2)
    words = [sys.executable, "-m", "segfleet.cli.main", "train", str(folder / "tiny.yaml")]
    environment = {"OMP_NUM_THREADS": "1", "SEGFLEET_DEVICE": "cpu", "SEGFLEET_WATCHDOG": "2.5"}
    process = subprocess.Popen(
        [*words, "--ranks", "2", "--runs", str(tmp_path / "runs")],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not list((tmp_path / "runs").rglob("step-*")) and time.monotonic() < end:
            time.sleep(0.1)
        workers = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/environ")
            if _is_rank(path, process.pid, 1)
        ]
        os.kill(workers[0], signal.SIGSTOP)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert re.search(r"rank 1 \(.*\) hangs: gives no sign of life", said)
    assert "in train_stage" in said and "goes on from the last checkpoint" in said


def _is_rank(path: Path, parent: int, rank: int) -> bool:
    try:
        words = path.read_bytes().split(b"\0")
    except OSError:
        return False
    return f"SEGFLEET_PARENT={parent}".encode() in words and f"RANK={rank}".encode() in words
