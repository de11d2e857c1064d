"""What Ray Tune is told: which node next, and ASHA's rungs along the path. No Ray is started
here."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from segfleet.pipeline.scoring.scored import score_facts
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.ray.optuna import Suggestions
from segfleet.sweeps.ray.searcher import PathAsha, TreeSearcher
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.plan import make_plan


@pytest.fixture
def ledger(search, space, tmp_path):
    space["base"]["evaluation"] = {"every": 1}
    plan = make_plan(search(), tmp_path / "runs")
    plan.folder.mkdir(parents=True)
    made = Ledger(plan.tree, plan.runs, plan.folder)
    made.order_of = plan.order
    return made


def finish(ledger, uid, **evaluation):
    node, done = ledger.tree.nodes[uid], {"checkpoint": "step-00000001"}
    folder = ledger.path(node)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps(done))
    facts = score_facts(node.recipe, load_manifest(node.recipe.data.store), done)
    (folder / "evaluation.json").write_text(json.dumps({"scored": facts, **evaluation}))


def test_a_whole_sweep_runs_every_node_once(ledger):
    searcher, ran, waited = TreeSearcher(ledger, ledger.order_of, slots=3), [], 0
    running = []
    for number in range(1000):
        given = searcher.suggest(f"t{number}")
        if given == "FINISHED":
            break
        if given is not None:
            order = json.loads(given["order"])
            assert (
                given["begin"]
                == order["begin"]
                == (0 if len(order["job"]["recipe"]["stages"]) == 1 else 100)
            )
            assert order["job"]["score"] == (order["begin"] == 100)
            running.append((f"t{number}", given["node"]))
        waited += given is None
        if given is None or len(running) == 3:
            name, uid = running.pop(0)
            finish(ledger, uid)
            ran.append(uid)
            searcher.on_trial_complete(name, {"state": "done"})
    assert sorted(ran) == sorted(ledger.tree.nodes) and waited and not running


def test_every_ending_is_noted(ledger):
    searcher = TreeSearcher(ledger, ledger.order_of)
    nodes = [searcher.suggest(f"t{i}")["node"] for i in range(4)]
    assert searcher.suggest("wait") is None
    searcher.on_trial_complete("t0", {"state": "failed", "message": "why"})
    searcher.on_trial_complete("t1", {"epochs": 3, "dice": 0.1})  # stopped by the scheduler
    searcher.on_trial_complete("t2", None, error=True)
    searcher.on_trial_complete("t3", {"state": "busy"})
    assert [ledger.state(ledger.tree.nodes[uid]) for uid in nodes] == [
        "failed",
        "pruned",
        "failed",
        "ready",
    ]
    assert ledger.note(ledger.tree.nodes[nodes[1]], "pruned")["epochs"] == 3
    assert searcher.suggest("t4")["node"] == nodes[3]
    (ledger.folder / "stop").touch()
    assert searcher.suggest("t5") == "FINISHED"


@pytest.fixture
def suggestions(search, tmp_path):
    """`suggestions(count, **space)`: a session of Optuna that is asked so often, every point scored
    at once; the plan as read again."""

    def session(count, **changes):
        made = search(
            axes={}, search="optuna", stages=[{"epochs": 1, **changes.pop("stage")}], **changes
        )
        plan = make_plan(made, tmp_path / "runs", build=False)
        plan.folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(plan.tree, plan.runs, plan.folder)
        ask = Suggestions(plan, ledger)
        for _ in range(count):
            if not ask():
                break
            finish(ledger, next(reversed(plan.tree.nodes)), summary={"mean_foreground_dice": 0.5})
        return make_plan(made, tmp_path / "runs", build=False)

    return session


@pytest.mark.parametrize("sessions", [[9], [1, 1, 9]])
def test_optuna_never_gets_a_point_twice_and_a_finite_space_ends(suggestions, sessions):
    for count in sessions:
        plan = suggestions(
            count,
            stage={"lr": {"choice": [1e-3, 3e-4, 1e-4]}, "warmup": [0, 1]},
            budget={"trials": 9},
        )
    points = [(trial.point["stages.0.lr"], trial.point["stages.0.warmup"]) for trial in plan.trials]
    assert (
        sorted(points) == [(lr, warmup) for lr in (1e-4, 3e-4, 1e-3) for warmup in (0, 1)]
        and plan.complete
    )


def test_a_restart_continues_what_optuna_draws(suggestions):
    for _ in range(2):
        plan = suggestions(3, stage={"lr": {"loguniform": [1e-5, 1e-2]}}, budget={"trials": 6})
    assert (
        len({trial.point["stages.0.lr"] for trial in plan.trials}) == len(plan.trials) == 6
        and plan.complete
    )


def asha():
    made = PathAsha(
        time_attr="epochs",
        metric="dice",
        mode="max",
        max_t=100,
        grace_period=10,
        reduction_factor=2,
        stop_last_trials=False,
    )
    made.rungs = dict(made._brackets[0]._rungs)
    return made


def trial_of(name, begin):
    return SimpleNamespace(trial_id=name, config={"begin": begin})


def test_a_child_counts_only_at_rungs_of_its_own_epochs():
    scheduler = asha()
    assert sorted(scheduler.rungs) == [10, 20, 40, 80]
    scheduler.on_trial_add(None, trial_of("parent", 0))
    for epochs in (10, 20):
        assert (
            scheduler.on_trial_result(None, trial_of("parent", 0), {"epochs": epochs, "dice": 0.5})
            == "CONTINUE"
        )
    for name, dice, expected in (("good", 0.9, "CONTINUE"), ("bad", 0.3, "STOP")):
        scheduler.on_trial_add(None, trial_of(name, 20))
        # no rung at 30
        assert (
            scheduler.on_trial_result(None, trial_of(name, 20), {"epochs": 30, "dice": dice})
            == "CONTINUE"
        )
        assert (
            scheduler.on_trial_result(None, trial_of(name, 20), {"epochs": 40, "dice": dice})
            == expected
        )
    own = {
        milestone: {n for n, v in recorded.items() if not math.isnan(v)}
        for milestone, recorded in scheduler.rungs.items()
    }
    assert own == {10: {"parent"}, 20: {"parent"}, 40: {"good", "bad"}, 80: set()}


def test_rungs_are_remembered_from_disk(ledger):
    first = ledger.next()
    finish(ledger, first.uid)
    # one step is an epoch
    lines = [{"event": "validation", "step": step, "dice": step / 100} for step in range(5, 101, 5)]
    (ledger.path(first) / "events.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    scheduler = asha()
    scheduler.remember(ledger, ledger.order_of)
    assert scheduler.rungs == {
        milestone: {first.uid: milestone / 100} for milestone in (10, 20, 40, 80)
    }
