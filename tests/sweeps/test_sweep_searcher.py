"""What Ray Tune is told: which node next, and ASHA's rungs along the path. No Ray is started
here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from segfleet.pipeline.scoring.scored import score_facts
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.outcome import outcome
from segfleet.sweeps.search.asha import Rungs, cutoff
from segfleet.sweeps.search.optuna import Suggestions
from segfleet.sweeps.search.tree_search import FINISHED, TreeSearch
from segfleet.sweeps.space.plan import make_plan
from segfleet.sweeps.space.space import Asha


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
    search, ran, waited = TreeSearch(ledger, ledger.order_of, slots=3), [], 0
    running = []
    for number in range(1000):
        order = search.next(f"t{number}")
        if order == FINISHED:
            break
        if order is not None:
            assert order.begin == (0 if len(order.job.recipe["stages"]) == 1 else 100)
            assert order.job.score == (order.begin == 100)
            running.append((f"t{number}", order.node))
        waited += order is None
        if order is None or len(running) == 3:
            name, uid = running.pop(0)
            finish(ledger, uid)
            ran.append(uid)
            search.ended(name, {"state": "done"})
    assert sorted(ran) == sorted(ledger.tree.nodes) and waited and not running


def test_every_ending_is_noted(ledger):
    search = TreeSearch(ledger, ledger.order_of)
    nodes = [search.next(f"t{i}").node for i in range(4)]
    assert search.next("wait") is None
    search.ended("t0", {"state": "failed", "message": "why"})
    search.ended("t1", {"epochs": 3, "dice": 0.1})  # stopped by the scheduler
    search.ended("t2", None, error=True)
    search.ended("t3", {"state": "busy"})
    assert [ledger.state(ledger.tree.nodes[uid]) for uid in nodes] == [
        "failed",
        "pruned",
        "failed",
        "ready",
    ]
    assert ledger.note(ledger.tree.nodes[nodes[1]], "pruned")["epochs"] == 3
    assert search.next("t4").node == nodes[3]
    (ledger.folder / "stop").touch()
    assert search.next("t5") == FINISHED


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
            if plan.tree.nodes:
                last = next(reversed(plan.tree.nodes))
                facts = {"mean_foreground_dice_ci95": None, "patients": 1}
                summary = {"mean_foreground_dice": 0.5, **facts}
                finish(ledger, last, summary=summary, parameters=1, cases=[], store="")
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


@pytest.mark.parametrize("count", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_the_cutoff_is_the_percentile_of_numpy(count, factor):
    values = np.random.default_rng(count).random(count)
    assert cutoff(values, factor) == pytest.approx(
        np.percentile(values, 100 * (1 - 1 / factor)), abs=1e-12
    )


def node_of(uid, end):
    return SimpleNamespace(uid=uid, end=end)


def test_a_child_counts_only_at_rungs_of_its_own_epochs():
    rungs = Rungs(Asha(grace=10, factor=2))
    for epochs in (10, 20):
        assert not rungs.stops(node_of("parent", 20), 0, epochs, 0.5)
    for name, dice, stopped in (("good", 0.9, False), ("bad", 0.3, True)):
        # no rung at 30
        assert not rungs.stops(node_of(name, 100), 20, 30, dice)
        assert rungs.stops(node_of(name, 100), 20, 40, dice) is stopped
    assert rungs.values == {
        10: {"parent": 0.5},
        20: {"parent": 0.5},
        40: {"good": 0.9, "bad": 0.3},
    }


def test_a_node_at_its_last_epoch_is_finished_and_not_stopped():
    rungs = Rungs(Asha(grace=10, factor=2))
    assert not rungs.stops(node_of("good", 40), 0, 40, 0.9)
    assert not rungs.stops(node_of("worse", 40), 0, 40, 0.1)
    assert rungs.stops(node_of("longer", 80), 0, 40, 0.1)


def test_of_paused_nodes_the_best_go_on_and_none_is_thrown_away():
    rungs = Rungs(Asha(type="promotion", grace=2, factor=3))
    scores = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5, "f": 0.6}
    for uid, dice in scores.items():
        assert rungs.pause_of(uid, 0, 100) == 2
        assert not rungs.stops(node_of(uid, 100), 0, 2, dice)
        assert rungs.pause_of(uid, 0, 100) == 6
    paused = set(scores)
    assert rungs.promoted(paused) == "f"
    paused.discard("f")
    assert rungs.promoted(paused) == "e"
    paused.discard("e")
    assert rungs.promoted(paused) is None, "two of six are a third"
    rungs.stops(node_of("f", 100), 0, 6, 0.7)  # alone at its rung: a third of one is none
    assert rungs.promoted({*paused, "f"}) is None
    assert (
        rungs.promoted({*paused, "f"}, least=1) == "f" and rungs.promoted(paused, least=1) is None
    )
    rungs.stops(node_of("g", 100), 0, 2, 0.9)
    assert rungs.promoted({*paused, "g"}) == "g"
    assert rungs.pause_of("x", 0, 2) is None, "its end is no pause"


def test_a_search_hands_out_pauses_and_goes_on_with_the_best(search, space, tmp_path):
    space["base"]["evaluation"] = {"every": 1}
    stages = [{"epochs": 4, "steps": 3, "lr": [1e-2, 1e-3, 1e-4]}]
    made = search(
        axes={},
        stages=stages,
        scheduler="asha",
        asha={"type": "promotion", "grace": 2, "factor": 3},
    )
    plan = make_plan(made, tmp_path / "runs")
    plan.folder.mkdir(parents=True)

    def session():
        return TreeSearch(
            Ledger(plan.tree, plan.runs, plan.folder), plan.order, rungs=Rungs(made.space.asha)
        )

    tree = session()
    orders = [tree.next(f"t{i}") for i in range(3)]
    assert [order.job.pause_at for order in orders] == [6, 6, 6]
    for i, order in enumerate(orders):
        path = plan.runs / plan.tree.nodes[order.node].path
        path.mkdir(parents=True)
        event = {"event": "validation", "step": 6, "dice": 0.1 * (i + 1)}
        (path / "events.jsonl").write_text(json.dumps(event) + "\n")
        assert not tree.validated(f"t{i}", 2, 0.1 * (i + 1))
        tree.ended(f"t{i}", {"state": "paused", "epochs": 2, "dice": 0.1 * (i + 1)})
    for again in (tree, tree := session()):  # another one knows it from disk
        order = again.next("again")
        assert order.node == orders[2].node and order.job.pause_at is None
        again.ledger.mark(plan.tree.nodes[order.node], "paused", epochs=2, dice=0.3)
    finish(tree.ledger, order.node, summary={"mean_foreground_dice": 0.3})
    tree.ledger.unmark(plan.tree.nodes[order.node], "paused")
    tree.ended("again", {"state": "done"})
    assert tree.next("end") == FINISHED
    assert sorted(tree.ledger.states().values()) == ["done", "paused", "paused"]


def test_a_promotion_of_few_ends_with_a_finished_point(search, space, tmp_path):
    """Of two at a rung a third is none; when nothing else is left the better one goes on, over all
    rungs that it meets alone."""
    space["base"]["evaluation"] = {"every": 1}
    stages = [{"epochs": 9, "steps": 1, "lr": [1e-2, 1e-3]}]
    asha = {"type": "promotion", "grace": 1, "factor": 3}
    made = search(axes={}, stages=stages, scheduler="asha", asha=asha)
    plan = make_plan(made, tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    tree = TreeSearch(ledger, plan.order, rungs=Rungs(made.space.asha))
    handed = []
    while (order := tree.next("t")) != FINISHED:
        handed.append((plan.tree.nodes[order.node].stage.lr, order.pause))
        epochs = order.pause or 9
        tree.validated("t", epochs, 0.5 + plan.tree.nodes[order.node].stage.lr)
        if order.pause is None:
            finish(ledger, order.node, summary={"mean_foreground_dice": 0.5})
        tree.ended(
            "t", {"state": "paused" if order.pause else "done", "epochs": epochs, "dice": 0.5}
        )
    assert handed == [(1e-2, 1), (1e-3, 1), (1e-2, 3), (1e-2, None)]
    assert sorted(ledger.states().values()) == ["done", "paused"]


def test_rungs_are_remembered_from_disk(ledger):
    first = ledger.next()
    finish(ledger, first.uid)
    # one step is an epoch
    lines = [{"event": "validation", "step": step, "dice": step / 100} for step in range(5, 101, 5)]
    (ledger.path(first) / "events.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    rungs = Rungs(Asha(grace=10, factor=2))
    rungs.remember(ledger, ledger.order_of)
    assert rungs.values == {
        milestone: {first.uid: milestone / 100} for milestone in (10, 20, 40, 80)
    }


def test_tune_is_told_what_the_search_says(ledger):
    pytest.importorskip("ray")
    from segfleet.sweeps.ray.searcher import TreeScheduler, TreeSearcher

    search = TreeSearch(ledger, ledger.order_of, rungs=Rungs(Asha(grace=10, factor=2)))
    searcher, scheduler = TreeSearcher(search), TreeScheduler(search)
    given = [searcher.suggest(name) for name in ("a", "b")]
    assert json.loads(given[0]["order"])["node"] == given[0]["node"]
    said = [
        scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), result)
        for name, result in (
            ("a", {"epochs": 10, "dice": 0.9}),
            ("b", {"epochs": 10, "dice": 0.1}),
            ("a", {"state": "done"}),
        )
    ]
    assert said == ["CONTINUE", "STOP", "CONTINUE"]
    searcher.on_trial_complete("b", {"epochs": 10, "dice": 0.1})
    assert ledger.state(ledger.tree.nodes[given[1]["node"]]) == "pruned"
    (ledger.folder / "stop").touch()
    assert searcher.suggest("c") == "FINISHED"


def test_optuna_draws_later_stages_several_times_per_first_one(search, tmp_path):
    rate = {"loguniform": [1e-5, 1e-2]}
    stages = [{"epochs": 4, "lr": rate}, {"epochs": 1, "lr": rate}]
    made = search(axes={}, search="optuna", stages=stages, budget={"trials": 6}, forks=3)
    plan = make_plan(made, tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)
    ask = Suggestions(plan, Ledger(plan.tree, plan.runs, plan.folder))
    while ask():
        pass
    firsts = [trial.point["stages.0.lr"] for trial in plan.trials]
    assert [firsts.count(rate) for rate in dict.fromkeys(firsts)] == [3, 3]
    assert len({trial.point["stages.1.lr"] for trial in plan.trials}) == 6
    assert plan.tree.shared_epochs == 2 * 4 + 6


def test_a_point_that_does_not_fit_is_failed_and_another_is_asked_for(suggestions):
    for count in (2, 9):
        plan = suggestions(
            count,
            stage={"lr": [1e-3, 1e-4], "epochs": 1, "warmup": [0, 0.5, 1]},
            budget={"trials": 3},
        )
    assert len(plan.trials) == 3 and plan.complete and plan.misfits
    assert all(trial.point["stages.0.warmup"] != 0.5 for trial in plan.trials)
    for point, why in plan.misfits:
        assert point["stages.0.warmup"] == 0.5 and "warmup" in why
    rows = outcome(plan, Ledger(plan.tree, plan.runs, plan.folder))["unranked"]
    assert [row["reason"].partition(":")[0] for row in rows] == ["does not fit"] * len(rows)
    assert len(rows) == len(plan.misfits)
