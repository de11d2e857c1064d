"""Population based training as generations of the stage tree; nothing is trained here."""

from __future__ import annotations

import json

import pytest

from segfleet.pipeline.scoring.scored import score_facts, write_evaluation
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.outcome import outcome, write_outcome
from segfleet.sweeps.space.plan import make_plan
from segfleet.sweeps.space.population import FAILED, explored, next_generation

STAGE = {"epochs": 6, "steps": 1, "lr": {"loguniform": [1e-3, 1.1e-3]}, "warmup": [0, 1, 2]}


@pytest.fixture
def population(search, tmp_path):
    """`population(**options of pbt)`: a search; its plan is made anew at every call of the
    second."""

    def made(**options):
        found = search(
            axes={},
            stages=[STAGE],
            scheduler="pbt",
            pbt={"population": 4, "interval": 2, **options},
        )
        return found, lambda: make_plan(found, tmp_path / "runs", build=False)

    return made


def finish(plan, trial, dice):
    node = plan.tree.nodes[plan.tree.leaves[trial.number]]
    folder, done = plan.runs / node.path, {"checkpoint": "step-00000001"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps(done))
    facts = score_facts(node.recipe, load_manifest(node.recipe.data.store), done)
    summary = {"mean_foreground_dice": dice, "mean_foreground_dice_ci95": None, "patients": 2}
    write_evaluation(
        folder, {"scored": facts, "summary": summary, "parameters": 1, "store": "", "cases": []}
    )


def whole(make, score):
    """The plan, every generation trained."""
    plan = make()
    plan.folder.mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        for trial in plan.trials[-4:]:
            finish(plan, trial, score(trial))
        plan = make()
    return plan


def rate(trial):
    return trial.recipe.stages[-1].lr


def test_generations_follow_from_seed_and_scores_alone(population, tmp_path):
    _, make = population()
    first = make()
    assert len(first.trials) == 4 and not first.complete and first.expected_epochs == 24
    plan = whole(make, rate)
    assert [len(trial.recipe.stages) for trial in plan.trials] == [1] * 4 + [2] * 4 + [3] * 4
    again = make()
    assert [t.walk for t in again.trials] == [t.walk for t in plan.trials] and again.complete
    assert all(1e-3 <= stage.lr <= 1.1e-3 for t in plan.trials for stage in t.recipe.stages)
    later = [stage.inherit for t in plan.trials for stage in t.recipe.stages[1:]]
    assert all(inherit.weights == "all" and inherit.optimizer for inherit in later)


def test_every_path_that_was_trained_is_a_row_once(population):
    _, make = population()
    plan = whole(make, rate)
    document = outcome(plan, Ledger(plan.tree, plan.runs, plan.folder))
    leaves = {row["stages"][0][-1] for row in document["ranking"]}
    parents = {node.parent for node in plan.tree.nodes.values()}
    assert leaves == plan.tree.nodes.keys() - parents
    best = max(
        (rate(plan.tree.trials[t]), uid) for t, uid in plan.tree.leaves.items() if uid in leaves
    )
    assert document["best"]["stages"][0][-1] == best[1]
    # four members, and whoever was replaced on the way; none after the last generation
    assert len(leaves) == 4 + 2 and {row["epochs"] for row in document["ranking"]} == {2, 4, 6}


def test_the_schedules_of_all_members_are_written_down(population):
    _, make = population()
    plan = whole(make, rate)
    write_outcome(plan, Ledger(plan.tree, plan.runs, plan.folder))
    found = json.loads((plan.folder / "population.json").read_text())
    assert [[stage["lr"] for stage in member] for member in found] == [
        [stage.lr for stage in trial.recipe.stages] for trial in plan.trials[-4:]
    ]
    assert [len(member) for member in found] == [3] * 4
    assert all(1e-3 <= stage["lr"] <= 1.1e-3 for member in found for stage in member)


def test_the_worst_go_on_from_the_best_with_values_near_theirs(population):
    search, _ = population()
    walks = [[{"stages.0.lr": 1e-3 + m * 1e-5, "stages.0.warmup": 1}] for m in range(4)]
    made = next_generation(search, walks, [0.5, 0.9, 0.1, 0.7])
    assert [walk[0] for walk in made] == [walks[i][0] for i in (0, 1, 1, 3)]
    assert [made[i][1] == walks[i][0] for i in (0, 1, 3)] == [True] * 3
    failed = next_generation(search, walks, [FAILED, 0.9, FAILED, FAILED])
    assert [walk[0] for walk in failed] == [walks[1][0]] * 4


def test_values_are_shifted_inside_their_range(population):
    import random

    search, _ = population()
    seen = set()
    for draw in range(200):
        point = {"stages.0.lr": 1e-3, "stages.0.warmup": 1}
        found = explored(point, search.axes, random.Random(draw))
        assert 1e-3 <= found["stages.0.lr"] <= 1.1e-3
        seen.add(found["stages.0.warmup"])
    assert seen == {0, 1, 2}


def test_a_member_that_fails_is_replaced_and_one_that_is_not_over_holds_the_generation(population):
    _, make = population()
    plan = make()
    (plan.folder / "failed").mkdir(parents=True)
    for trial in plan.trials[:3]:
        finish(plan, trial, 0.5)
    assert len(make().trials) == 4
    uid = plan.tree.leaves[plan.trials[3].number]
    (plan.folder / "failed" / f"{uid}.json").write_text("{}")
    after = make()
    assert len(after.trials) == 8 and after.trials[7].walk[0] in [
        t.walk[0] for t in plan.trials[:3]
    ]


def test_one_generation_is_no_choice(population):
    from segfleet.core.errors import InputError

    _, make = population(interval=6)
    with pytest.raises(InputError, match="6 epochs make 1 generation"):
        make()
