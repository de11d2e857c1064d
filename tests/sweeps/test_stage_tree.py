"""The stage tree: every prefix once, trunks, order, and what a failure takes with it."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from pathlib import Path

import pytest

from segfleet.core.errors import InputError
from segfleet.pipeline.identity import stage_facts, stage_uid, stage_uids
from segfleet.pipeline.scoring.scored import score_facts
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.plan import make_plan, within_budget
from segfleet.sweeps.space.sharing import Sections
from segfleet.sweeps.space.tree import StageTree


@pytest.fixture
def plan(search, tmp_path):
    return lambda **changes: make_plan(search(**changes), tmp_path / "runs")


def finish(ledger, node, **evaluation):
    """What a rank leaves behind; `evaluation`: how it is scored, if not as the node asks for."""
    folder, done = ledger.path(node), {"checkpoint": "step-00000001"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps(done))
    if node.leaf_of:
        recipe = node.recipe.model_copy(
            update={"evaluation": node.recipe.evaluation.model_copy(update=evaluation)}
        )
        facts = score_facts(recipe, load_manifest(recipe.data.store), done)
        (folder / "evaluation.json").write_text(json.dumps({"scored": facts}))


def test_sixteen_nodes_instead_of_twenty_four(plan):
    tree = plan().tree
    assert len(tree.trials) == 12 and len(tree.nodes) == 16
    assert (tree.naive_epochs, tree.shared_epochs) == (1440, 640)
    assert sorted(len(node.trials) for node in tree.nodes.values()) == [1] * 12 + [3] * 4
    for trial in tree.trials.values():  # the folders of a node are those of `segfleet train`
        uids = stage_uids(trial.recipe, load_manifest(trial.recipe.data.store))
        assert tree.nodes[tree.leaves[trial.number]].path.as_posix() == "/".join(uids)


def test_a_uid_is_the_plain_hash_of_its_facts(plan):
    trial = plan().trials[0]
    facts = stage_facts(trial.recipe, load_manifest(trial.recipe.data.store), 1)
    assert sorted(facts)[-1] == "train"
    assert (
        stage_uid("p", facts)
        == hashlib.sha256(json.dumps(["p", facts], sort_keys=True).encode()).hexdigest()[:12]
    )


@pytest.mark.parametrize(
    "schedule", [{"schedule": "constant"}, {"schedule": "cosine", "period": 10}]
)
def test_lengths_of_an_endless_rate_are_one_trunk(plan, schedule):
    stages = [
        {"epochs": [150, 50, 100], "lr": 1e-3, **schedule},
        {"epochs": 20, "lr": [1e-3, 1e-4]},
    ]
    tree = plan(axes={}, stages=stages).tree
    trunk = {node.stage.epochs: node for node in tree.nodes.values() if node.index == 0}
    assert (
        trunk[50].trunk is None
        and trunk[100].trunk == trunk[50].uid
        and trunk[150].trunk == trunk[100].uid
    )
    assert [tree.epochs(trunk[n]) for n in (50, 100, 150)] == [50, 50, 50]
    assert tree.shared_epochs == 150 + 6 * 20 and tree.naive_epochs == 2 * (300 + 60)
    assert tree.remaining[trunk[50].uid] == 170 and next(iter(tree.walk())) is trunk[50]


@pytest.mark.parametrize("changes", [{"schedule": "poly"}, {"schedule": "cosine"}, {"patience": 3}])
def test_lengths_that_decide_the_rate_or_may_end_early_share_nothing(
    search, space, tmp_path, changes
):
    space["base"]["evaluation"] = {"every": 1}
    tree = make_plan(
        search(axes={}, stages=[{"epochs": [50, 100], "lr": 1e-3, **changes}]), tmp_path
    ).tree
    assert all(node.trunk is None for node in tree.nodes.values()) and tree.shared_epochs == 150


def test_a_budget_of_epochs_keeps_whole_points(plan):
    stages = {"axes": {}, "stages": [{"epochs": [1, 2], "lr": [1e-2, 1e-3]}], "seeds": [0, 1, 2]}
    # lengths of one rate are a trunk: 3 seeds x 1 epoch, + 3 x 1 of the second rate, then 9
    made = plan(**stages, budget={"epochs": 8})
    kept = [
        (trial.point["stages.0.epochs"], trial.point["stages.0.lr"], trial.recipe.seed)
        for trial in made.trials
    ]
    assert kept == [(1, lr, seed) for lr in (1e-2, 1e-3) for seed in (0, 1, 2)]
    assert (
        made.tree.shared_epochs == 6
        and made.warnings[0] == "budget.epochs 8 keeps the first 6 of 12 trials"
    )
    with pytest.raises(
        InputError, match=r"less than one point: the first takes 3 epochs with its 3 run\(s\)"
    ):
        plan(**stages, budget={"epochs": 2})


def test_longest_path_first_and_children_only_after_their_parent(plan, tmp_path):
    made = plan(
        axes={},
        stages=[
            {"epochs": 10, "lr": [1e-2, 1e-3]},
            {"epochs": [5, 30], "lr": 1e-4, "schedule": "poly"},
        ],
    )
    ledger = Ledger(made.tree, made.runs, made.folder)
    first, second = ledger.next(), ledger.next()
    assert {first.index, second.index} == {0} and ledger.next() is None and ledger.open()
    finish(ledger, first)
    ledger.give_back(first)
    child = ledger.next()
    assert child.parent == first.uid and child.stage.epochs == 30 and ledger.state(first) == "done"


def test_a_leaf_that_is_scored_in_another_way_is_not_complete(plan):
    made = plan(axes={}, stages=[{"epochs": 1, "lr": 1e-3}])
    (leaf,) = made.tree.nodes.values()
    ledger = Ledger(made.tree, made.runs, made.folder)
    finish(ledger, leaf, mirror=(1, 2))
    assert ledger.trained(leaf) and ledger.state(leaf) == "ready"
    finish(ledger, leaf)
    assert ledger.state(leaf) == "done"


def test_a_failed_node_takes_only_its_own_subtree(plan):
    made = plan()
    ledger = Ledger(made.tree, made.runs, made.folder)
    victim = ledger.next()
    ledger.mark(victim, "failed", message="broken")
    while node := ledger.next():
        finish(ledger, node)
        ledger.give_back(node)
    states = list(ledger.states().values())
    assert (states.count("failed"), states.count("lost"), states.count("done")) == (
        1,
        3,
        12,
    ) and not ledger.open()
    again = Ledger(made.tree, made.runs, made.folder)  # another process, later
    assert again.states() == ledger.states()
    again.forget_failures()
    assert again.next() is victim


@pytest.mark.parametrize("epochs", [None, 10**6])
def test_a_thousand_nodes_are_planned_in_two_seconds(search, epochs):
    made = search(
        axes={"optimizer.weight_decay": [i / 1000 for i in range(10)]},
        stages=[
            {"epochs": [50, 100], "lr": [1e-3 * (i + 1) for i in range(5)]},
            {"epochs": 20, "lr": [1e-4 * (i + 1) for i in range(9)]},
        ],
        budget={"epochs": epochs},
    )
    manifest = load_manifest(made.base["data"]["store"])
    start, before = time.perf_counter(), time.process_time()
    trials = []
    for point in made.points():
        trials += made.trials(point, first=len(trials))
    trials, _ = within_budget(trials, lambda _: manifest, made)
    tree = StageTree(trials, lambda _: manifest)
    assert len(tree.nodes) == 1000
    assert time.process_time() - before < 2.0, f"{time.perf_counter() - start:.2f} s on the clock"


def test_a_point_of_a_plan_takes_little_memory(search, tmp_path):
    """10,000 points have room in the 150 MiB of the process that waits for SLURM jobs."""
    made = search(
        axes={},
        stages=[
            {"epochs": 5, "lr": [1e-3 * (i + 1) for i in range(30)]},
            {"epochs": 1, "lr": [1e-4 * (i + 1) for i in range(10)]},
        ],
    )
    make_plan(made, tmp_path / "warm", build=False)  # what is imported and kept once
    tracemalloc.start()
    try:
        plan = make_plan(made, tmp_path / "runs", build=False)
        taken = tracemalloc.get_traced_memory()[1] / len(plan.trials)
    finally:
        tracemalloc.stop()
    assert len(plan.trials) == 300
    assert taken < 4500, f"{taken:.0f} bytes a point"


def test_recipes_share_what_is_equal_and_say_what_they_said(search):
    """Also what a stage says of a section, which is not the same as its values."""
    made = search(
        axes={"optimizer.weight_decay": [0.01, 0.02]},
        stages=[
            {"epochs": 5, "lr": 1e-3, "data": {"batch": 2}},
            {"epochs": 1, "lr": [1e-3, 1e-4], "data": {"fold": 0}},
        ],
    )
    trials = [trial for point in made.points() for trial in made.trials(point)]
    shared = Sections()
    kept = [shared(trial.recipe) for trial in trials]
    manifest = load_manifest(made.base["data"]["store"])
    for trial, recipe in zip(trials, kept, strict=True):
        assert recipe == trial.recipe
        assert recipe.model_dump_json(exclude_unset=True) == trial.recipe.model_dump_json(
            exclude_unset=True
        )
        assert stage_uids(recipe, manifest) == stage_uids(trial.recipe, manifest)
    assert all(one.data is kept[0].data and one.model is kept[0].model for one in kept)
    assert len({id(stage) for one in kept for stage in one.stages}) == 3
    batches = [stage.data for stage in kept[0].stages]
    assert [sorted(one.model_fields_set) for one in batches] == [["batch"], ["fold"]]


class Looks:
    """Path.exists, counted."""

    def __init__(self):
        self.count, self.exists = 0, Path.exists

    def __get__(self, path, _):
        self.count += 1
        return lambda: self.exists(path)


def test_what_a_finished_node_costs_does_not_grow_with_the_tree(search, tmp_path, monkeypatch):
    """Looks at the disk and places in the tree, per node, of a sweep from its start to its end."""
    costs = []
    for firsts in (10, 40):
        made = search(
            axes={},
            stages=[
                {"epochs": 50, "lr": [1e-3 * (i + 1) for i in range(firsts)]},
                {"epochs": 20, "lr": [1e-4 * (i + 1) for i in range(10)]},
            ],
        )
        runs = tmp_path / str(firsts)
        plan = make_plan(made, runs, build=False)
        ledger, looks = Ledger(plan.tree, plan.runs, plan.folder), Looks()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "exists", looks)
            while node := ledger.next():
                ledger.epochs_done()
                path = ledger.path(node)
                path.mkdir(parents=True)
                (path / "done.json").write_text("{}")
                ledger._complete.add(node.uid)
                ledger.give_back(node)
        assert len(list(runs.rglob("done.json"))) == len(plan.tree.nodes) == 11 * firsts
        costs.append(looks.count / len(plan.tree.nodes))
    assert costs[1] <= 1.1 * costs[0]


def test_a_tree_that_grows_point_by_point_is_the_tree_made_at_once(search, space):
    made = search(
        axes={},
        stages=[
            {"epochs": [30, 10, 20], "lr": [1e-2, 1e-3]},
            {"epochs": [4, 2], "lr": [1e-3, 1e-4]},
        ],
    )
    manifest = load_manifest(made.base["data"]["store"])
    trials = [made.trials(point, first=number)[0] for number, point in enumerate(made.points())]
    whole = StageTree(trials, lambda _: manifest)
    for order in (trials, trials[::-1], trials[1::2] + trials[::2]):
        tree = StageTree([], lambda _: manifest)
        for trial in order:
            tree.add([trial])
        assert tree.shared_epochs == whole.shared_epochs == 2 * 30 + 2 * 2 * 3 * 4
        assert tree.remaining == whole.remaining
        facts = [{uid: node.after for uid, node in one.nodes.items()} for one in (tree, whole)]
        assert facts[0] == facts[1]
        below = [
            {uid: {child.uid for child in found} for uid, found in one.children.items() if found}
            for one in (tree, whole)
        ]
        assert below[0] == below[1]
        assert len(list(tree.walk())) == len(tree.nodes)
