"""A search driven by threads, without Ray: what is waited for is played, the search is real."""

from __future__ import annotations

import json
import threading

import pytest

from segfleet.core.errors import InputError
from segfleet.pipeline.launch.job import Train
from segfleet.slurm import cluster
from segfleet.slurm.job import JobStatus
from segfleet.sweeps import slurm_backend, threads
from segfleet.sweeps.order import Order
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.outcome import write_outcome
from segfleet.sweeps.run import Resources, run_sweep
from segfleet.sweeps.search.asha import Rungs
from segfleet.sweeps.search.tree_search import TreeSearch
from segfleet.sweeps.slurm_backend import Detached
from segfleet.sweeps.space.plan import make_plan
from segfleet.sweeps.space.space import Asha


@pytest.fixture
def tree(search, space, tmp_path):
    """`tree(**options)`: a search over four runs of one stage of 100 epochs."""
    space["base"]["evaluation"] = {"every": 1}
    found = search(stages=[{"epochs": 100, "steps": 1, "lr": [1e-2, 1e-3]}])
    plan = make_plan(found, tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)

    def made(**options):
        return TreeSearch(Ledger(plan.tree, plan.runs, plan.folder), plan.order, slots=2, **options)

    return made


def ends(order):
    """What the ranks of a node leave, and its score."""
    from segfleet.pipeline.recipe import parse
    from segfleet.pipeline.scoring.scored import score_facts, write_evaluation
    from segfleet.preprocess.stores.manifest import load_manifest

    path, done = order.path, {"checkpoint": "step-00000001"}
    path.mkdir(parents=True, exist_ok=True)
    (path / "done.json").write_text(json.dumps(done))
    recipe = parse(order.job.recipe)
    facts = score_facts(recipe, load_manifest(recipe.data.store), done)
    dice = 0.5 + int(path.name[:2], 16) / 1000
    summary = {"mean_foreground_dice": dice, "mean_foreground_dice_ci95": None, "patients": 1}
    cases = [{"id": "c0", "group": "p0", "mean_dice": dice}]
    write_evaluation(
        path, {"scored": facts, "summary": summary, "cases": cases, "parameters": 7, "store": "s"}
    )


def test_every_node_is_trained_once_and_no_more_than_the_slots_at_a_time(tree, monkeypatch):
    at_work, most, seen, both = set(), [], [], threading.Barrier(2, timeout=60)

    def play(order, report, watch):
        at_work.add(order.node)
        both.wait()  # two are at work together, always
        most.append(len(at_work))
        ends(order)
        seen.append(order.node)
        at_work.discard(order.node)
        return {"state": "done"}

    monkeypatch.setattr(threads, "perform", play)
    search = tree()
    threads.drive(search, 2, threading.Event())
    assert sorted(seen) == sorted(search.ledger.tree.nodes) and max(most) == 2
    assert set(search.ledger.states().values()) == {"done"}


def test_a_sweep_of_a_hundred_points_adds_ten_files_to_those_of_its_stages(
    search, tmp_path, monkeypatch
):
    """Trained and scored stages are played; their own files: tests/pipeline/test_file_counts.py."""
    played = []

    def play(order, report, watch):
        played.append(order.path)
        ends(order)
        return {"state": "done"}

    monkeypatch.setattr(threads, "perform", play)
    firsts, seconds = ([10.0**-power * (1 + i) for i in range(10)] for power in (3, 4))
    stages = [{"epochs": 4, "steps": 1, "lr": firsts}, {"epochs": 1, "steps": 1, "lr": seconds}]
    plan = make_plan(search(axes={}, stages=stages), tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    threads.drive(TreeSearch(ledger, plan.order, slots=8), 8, threading.Event())
    write_outcome(plan, ledger)
    assert len(played) == 110 and json.loads((plan.folder / "outcome.json").read_text())["ranking"]
    stages = {path for own in played for path in (own, *own.iterdir())}
    other = set((tmp_path / "runs").rglob("*")) - stages
    assert len(other) <= 10, sorted(other)


def test_what_the_search_stops_is_stopped_and_noted(tree, monkeypatch):
    scores = [0.9, 0.3, 0.2, 0.1]

    def play(order, report, watch):
        report({"epochs": 10, "dice": (dice := scores.pop(0))})
        if dice == 0.9:
            ends(order)
            return {"state": "done"}
        for _ in range(600):
            watch()
            threading.Event().wait(0.1)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(threads, "perform", play)
    search = tree(rungs=Rungs(Asha(grace=10, factor=2)))
    threads.drive(search, 1, threading.Event())
    assert sorted(search.ledger.states().values()) == ["done", "pruned", "pruned", "pruned"]


def test_a_process_that_leaves_marks_nothing(tree, monkeypatch):
    detach, waits = threading.Event(), threading.Event()

    def play(order, report, watch):
        waits.set()
        for _ in range(600):
            watch()
            threading.Event().wait(0.1)
        raise AssertionError("nobody left")

    monkeypatch.setattr(threads, "perform", play)
    search = tree()
    threading.Thread(target=lambda: (waits.wait(60), detach.set())).start()
    with pytest.raises(Detached):
        threads.drive(search, 2, detach)
    assert not list(search.ledger.folder.rglob("*/*.json"))


def test_a_cluster_whose_limits_are_below_one_stages_need_is_one_message(
    search, tmp_path, monkeypatch
):
    node = "gpu*|12:00:00|g01|64|512000|gpu:a100:4|(null)\n"
    monkeypatch.setattr(cluster, "call", lambda *command, **_: node)
    plan = make_plan(search(), tmp_path / "runs", build=False)
    wanted = {"cluster": None, "spec": {"gpus_per_node": 8, "time": "1d"}}
    with pytest.raises(InputError) as caught:
        run_sweep(plan, Resources(on="slurm", options=wanted))
    said = str(caught.value)
    assert "gpus_per_node: found 8, a node of partition gpu has 4" in said
    assert "time: found 1d, partition gpu allows 720 minutes" in said
    assert not plan.folder.exists(), "nothing was written"


def test_one_question_to_the_queue_serves_all_jobs(monkeypatch):
    asked = []

    class Job:
        def __init__(self, number):
            self.id = str(number)

    def look(jobs, age=0.0):
        asked.append(len(jobs))
        return [(job, JobStatus(state="running")) for job in jobs]

    monkeypatch.setattr(slurm_backend, "look_at_all", look)
    for count in (10, 100):
        queue = slurm_backend.Queue()
        jobs = [Job(number) for number in range(count)]
        for _ in range(3):
            for job in jobs:
                queue.look(job)
        assert len(asked) == 1, "within LOOK seconds"
        monkeypatch.setattr(queue, "looked", -slurm_backend.LOOK * 2)
        assert {queue.look(job).state for job in jobs} == {"running"}
        assert asked == [1, count]
        asked.clear()


def test_a_full_queue_is_waited_for(tmp_path, monkeypatch):
    """A limit of submitted jobs is no failure of the stage; what SLURM refuses for good is."""
    from segfleet.core.errors import InputError
    from segfleet.slurm.submitit_launcher import QueueFull, SlurmLauncher

    answers = [QueueFull("QOSMaxSubmitJobPerUserLimit"), QueueFull("busy"), "job"]

    def submit(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    monkeypatch.setattr(SlurmLauncher, "submit_jobs", submit)
    monkeypatch.setattr(slurm_backend, "LOOK", 0.01)
    monkeypatch.setattr(slurm_backend.cluster, "there_is_one", lambda: True)
    job = Train(root=tmp_path, recipe={"data": {"workers": 0}})
    order = Order(job=job, node="a", path=tmp_path, sweep=tmp_path, begin=0, steps=1)
    stop, polls = tmp_path / "stop", []
    assert slurm_backend.Slurm()._submit(order, lambda: polls.append(1), stop) == "job"
    assert len(polls) == 2 and not answers
    answers.append(InputError("SLURM refused the job: Invalid qos specification"))
    with pytest.raises(InputError, match="Invalid qos"):
        slurm_backend.Slurm()._submit(order, lambda: None, stop)


def test_stages_that_others_train_are_waited_for(tree, monkeypatch):
    """Nothing to start and nothing at work here is no end while another process trains."""
    from segfleet.pipeline.run import LOCK, lock_stage

    search, played = tree(), []
    monkeypatch.setattr("segfleet.sweeps.results.ledger.LOOK", 0.1)
    nodes = list(search.ledger.tree.nodes.values())
    locks = [lock_stage(search.ledger.path(node)) for node in nodes[:2]]
    assert (search.ledger.path(nodes[0]) / LOCK).exists()

    def play(order, report, watch):
        played.append(order.node)
        ends(order)
        return {"state": "done"}

    def later():
        for node, lock in zip(nodes, locks, strict=False):
            ends(search.order_of(node))
            lock.release()

    monkeypatch.setattr(threads, "perform", play)
    threading.Timer(3.0, later).start()
    threads.drive(search, 2, threading.Event())
    assert sorted(played) == sorted(node.uid for node in nodes[2:])
    assert set(search.ledger.states().values()) == {"done"}
