"""One node, trained by real ranks: trunks are exact, failures are told apart, a stop saves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from segfleet.pipeline.devices.out_of_memory import OutOfMemory
from segfleet.pipeline.events import read_events
from segfleet.pipeline.launch.local import RankFailed, run_ranks
from segfleet.sweeps import slurm_backend, stopping, trial
from segfleet.sweeps.space.plan import make_plan


def final(folder: Path, group: str = "weights") -> dict[str, torch.Tensor]:
    done = json.loads((folder / "done.json").read_text())
    return load_file(folder / "checkpoints" / done["checkpoint"] / f"{group}.safetensors")


def same(first: Path, second: Path) -> bool:
    pairs = [(final(first, group), final(second, group)) for group in ("weights", "optimizer")]
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in pairs
    )


@pytest.fixture
def plan(search, space, tmp_path):
    """Two lengths of a constant rate; validated every epoch."""
    space["base"]["evaluation"] = {"every": 1}
    return make_plan(
        search(axes={}, stages=[{"epochs": [1, 3], "steps": 2, "lr": 1e-2, "warmup": 3}]),
        tmp_path / "runs",
    )


@pytest.mark.slow
def test_a_trunk_goes_on_bitwise_like_the_long_stage_alone(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short, long = plan.tree.walk()
    assert long.trunk == short.uid
    plan.folder.mkdir(parents=True)
    reports = {short.uid: [], long.uid: []}
    for node in (short, long):
        assert trial.perform(plan.order(node), reports[node.uid].append) == {"state": "done"}
    assert [report["epochs"] for report in reports[short.uid]] == [1] and [
        report["epochs"] for report in reports[long.uid]
    ] == [2, 3]
    events = list(read_events(plan.runs / long.path))
    # not one step of the trunk again
    assert [event["from_step"] for event in events if event["event"] == "resumed"] == [2]
    assert [event["steps"] for event in events if event["event"] == "stage_start"] == [6]
    alone = plan.order(long).of_job(root=tmp_path / "straight", score=False)
    run_ranks(alone.job, 1, threads=1)
    assert same(plan.runs / long.path, tmp_path / "straight" / long.path)
    assert (
        not (tmp_path / "straight" / long.path / "evaluation.json").exists()
        and (plan.runs / long.path / "evaluation.json").exists()
    )
    before = final(plan.runs / short.path)
    # the branch point is kept
    assert len(list((plan.runs / short.path / "checkpoints").glob("step-*"))) == 1 and before


@pytest.mark.slow
def test_a_trunk_brings_its_best_checkpoint_along(search, space, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    space["base"]["evaluation"] = {"every": 1, "weights": "best"}
    # nothing is learned: the first validation stays the best
    stages = [{"epochs": [2, 3], "steps": 1, "lr": 1e-12}]
    plan = make_plan(search(axes={}, stages=stages), tmp_path / "runs")
    short, long = plan.tree.walk()
    plan.folder.mkdir(parents=True)
    assert trial.perform(plan.order(short), print) == {"state": "done"}
    checkpoints = plan.runs / long.path / "checkpoints"
    trial.continue_from(plan.runs / short.path, plan.runs / long.path, 3)
    (checkpoints / "step-00000002").rename(tmp_path / "gone")  # as if killed between the two
    assert trial.perform(plan.order(long), print) == {"state": "done"}
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000003"]
    run_ranks(plan.order(long).of_job(root=tmp_path / "straight").job, 1, threads=1)
    assert same(plan.runs / long.path, tmp_path / "straight" / long.path)
    ours, straight = (
        json.loads((root / long.path / "evaluation.json").read_text())
        for root in (plan.runs, tmp_path / "straight")
    )
    assert (
        ours["checkpoint"] == "step-00000001"
        and ours["cases"] == straight["cases"]
        and ours["summary"] == straight["summary"]
    )


class Scripted(trial.Local):
    """A back end that does what it is told, in turn."""

    def __init__(self, *acts):
        self.acts, self.runs = list(acts), 0

    def run(self, order, poll):
        self.runs += 1
        poll()
        act = self.acts.pop(0)
        if isinstance(act, Exception):
            raise act


@pytest.mark.parametrize(
    ("acts", "runs", "expected"),
    [
        # a fault of the machine is tried again
        (
            [RankFailed("rank 0 was killed by SIGKILL", 1), None],
            2,
            {"state": "done"},
        ),
        (
            [RankFailed("broken", 1), RankFailed("broken", 1)],
            2,
            {"state": "failed", "message": "broken"},
        ),
        (
            [RankFailed("freeze: no parameter", 2)],
            1,
            {"state": "failed", "message": "freeze: no parameter"},
        ),
        # it would be full again: the point fails, and the sweep goes on
        (
            [RankFailed("out of memory on cuda:0", OutOfMemory.exit_code)],
            1,
            {"state": "failed", "message": "out of memory on cuda:0"},
        ),
        ([RankFailed("saved", 75)], 1, {"state": "stopped"}),
        ([RankFailed("run: x is in use by process 7", 2)], 1, {"state": "busy"}),
    ],
)
def test_how_a_trial_ends(plan, monkeypatch, acts, runs, expected):
    scripted = Scripted(*acts)
    monkeypatch.setitem(trial.BACKENDS, "local", lambda: scripted)
    node = next(iter(plan.tree.walk()))
    assert trial.perform(plan.order(node), print) == expected and scripted.runs == runs
    assert not (plan.runs / node.path / "stop").exists()


def test_the_sweeps_stop_file_reaches_the_ranks(plan, monkeypatch):
    node = next(iter(plan.tree.walk()))
    path, seen = plan.runs / node.path, []

    class Stopping(Scripted):
        def run(self, order, poll):
            poll()
            seen.append((path / "stop").exists())
            (plan.folder / "stop").touch()
            poll()
            seen.append((path / "stop").exists())
            raise RankFailed("saved", 75)

    plan.folder.mkdir(parents=True)
    monkeypatch.setitem(trial.BACKENDS, "local", Stopping)
    assert trial.perform(plan.order(node), print) == {"state": "stopped"}
    assert seen == [False, True] and not (path / "stop").exists()
    # nothing is started any more
    assert trial.perform(plan.order(node), print) == {"state": "stopped"} and len(seen) == 2


def test_validations_are_reported_once_whatever_is_rewritten(plan):
    short, long = plan.tree.walk()
    path, reports = plan.runs / long.path, []
    path.mkdir(parents=True)
    order = plan.order(long).model_copy(update={"begin": 10})
    follow = trial.Validations(path, order, reports.append)
    line = '{"event": "validation", "step": %d, "epoch": 0, "dice": 0.5}\n'
    follow.poll()
    (path / "events.jsonl").write_text(line % 2 + line % 4 + (line % 6)[:20])
    follow.poll()
    (path / "events.jsonl").write_text(line % 2)  # a resume cut it back
    follow.poll()
    (path / "events.jsonl").write_text(line % 2 + line % 4 + line % 6)
    follow.poll()
    # the trunk's own epoch is the trunk's to report
    assert [report["epochs"] for report in reports] == [
        12,
        13,
    ]


def test_ranks_can_be_started_outside_the_main_thread(tmp_path):
    """Ray runs a trial in a thread, where no signal handler can be set."""
    caught = []

    def work():
        try:
            run_ranks(SimpleNamespace(document=lambda: {"do": "nothing"}), 1, threads=1)
        except RankFailed as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1 and caught[0].exit_code == 2 and "found 'nothing'" in str(caught[0])


def test_the_stop_file_and_the_run_of_somebody_else_are_left_alone(plan, monkeypatch):
    from segfleet.pipeline.run import lock_stage

    node = next(iter(plan.tree.nodes.values()))
    path = plan.runs / node.path
    path.mkdir(parents=True, exist_ok=True)
    (path / "stop").touch()
    monkeypatch.setitem(trial.BACKENDS, "local", lambda: pytest.fail("it was started"))
    lock = lock_stage(path)  # as another command would
    try:
        assert trial.perform(plan.order(node), print) == {"state": "busy"}
    finally:
        lock.release()
    assert (path / "stop").read_text() == ""
    assert stopping.ask(path, lambda holder: False), "nobody trains it"
    stopping.withdraw(path)
    assert (path / "stop").read_text() == "", "the person's"
    (path / "stop").unlink()
    stopping.ask(path, lambda holder: False)
    stopping.withdraw(path)
    assert not (path / "stop").exists()


HOLD = """
import sys, time
from segfleet.pipeline.run import lock_stage
lock = lock_stage(__import__("pathlib").Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold():
    """`hold(stage, through="")`: another process has the stage's lock, a child of this one or,
    `through` a shell, somebody else's."""
    started = []

    def start(stage, through=()):
        words = [*through, sys.executable, "-c", HOLD, str(stage)]
        started.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        assert started[-1].stdout.readline() == "held\n"

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


NOT_OURS = ("sh", "-c", '"$@" & wait', "sh")


@pytest.mark.parametrize("through", [(), NOT_OURS], ids=["ours", "theirs"])
def test_a_sweep_that_stops_stops_its_own_ranks_alone(plan, monkeypatch, hold, through):
    """Somebody may begin with the stage while our ranks are started."""
    node = next(iter(plan.tree.walk()))
    path, seen = plan.runs / node.path, []

    class Starting(trial.Local):
        def run(self, order, poll):
            hold(path, through)
            (plan.folder / "stop").touch()
            poll()
            seen.append((path / "stop").exists())
            raise RankFailed("run: x is in use by process 7", 2)

    plan.folder.mkdir(parents=True)
    monkeypatch.setitem(trial.BACKENDS, "local", Starting)
    assert trial.perform(plan.order(node), print) == {"state": "busy"}
    assert seen == [not through] and not (path / "stop").exists()


@pytest.mark.parametrize("job", ["", "7", "8"])
def test_a_job_that_waits_for_somebody_elses_run_is_taken_back(
    plan, monkeypatch, hold, job, tmp_path
):
    order = plan.order(next(iter(plan.tree.walk())), on="slurm")
    order.path.mkdir(parents=True)
    monkeypatch.setattr(slurm_backend, "attach", lambda path: SimpleNamespace(id="7"))
    monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", False)
    hold(order.path)
    if job == "7":
        slurm_backend.Slurm().stop(order)
        assert (order.path / "stop").read_text() == stopping.WORDS
        return
    with pytest.raises(RankFailed, match="another process") as end:
        slurm_backend.Slurm().stop(order)
    assert end.value.exit_code == 75 and not (order.path / "stop").exists()


def test_a_job_that_somebody_else_submitted_is_neither_waited_for_nor_stopped(plan, monkeypatch):
    """It may still be queued, so that no lock says whose the stage is."""
    order = plan.order(next(iter(plan.tree.nodes.values())), on="slurm")
    path, sweep = order.path, [None]
    path.mkdir(parents=True, exist_ok=True)
    (path / "stop").touch()
    queued = SimpleNamespace(
        submission=SimpleNamespace(settings=lambda: SimpleNamespace(sweep=sweep[0]))
    )
    monkeypatch.setattr(slurm_backend.Slurm, "_known", lambda *_: queued)
    monkeypatch.setattr(slurm_backend.Slurm, "run", lambda *_: waited.append(order))
    waited = []
    assert trial.perform(order, print) == {"state": "busy"}
    sweep[0] = Path("/runs/sweeps/another")
    assert trial.perform(order, print) == {"state": "busy"}
    assert waited == [] and (path / "stop").read_text() == ""
    sweep[0] = order.sweep  # an earlier controller of this sweep submitted it
    assert trial.perform(order, print) == {"state": "done"} and waited == [order]
