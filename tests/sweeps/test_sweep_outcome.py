"""Ranking, intervals, paired differences, files. The scores are written by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from segfleet.cli.sweep import render
from segfleet.pipeline.recipe import load_recipe
from segfleet.pipeline.scoring.scored import score_facts
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.outcome import (
    _difference,
    as_csv,
    outcome,
    paired,
    replicates,
    student,
    write_outcome,
)
from segfleet.sweeps.space.objectives import Objective
from segfleet.sweeps.space.plan import make_plan
from segfleet.sweeps.space.space import Trial


def test_students_interval():
    # t(0.975, 2) = 4.3027
    assert student([0.7, 0.8, 0.9]) == pytest.approx([0.8 - 0.24841, 0.8 + 0.24841], abs=1e-4)


def test_paired_differences():
    generator = np.random.default_rng(0)
    clear = paired([[0.1 + generator.normal(0, 0.01)] for _ in range(20)])
    assert (
        clear["mean"] == pytest.approx(0.1, abs=0.01)
        and 0.09 < clear["ci95"][0] < clear["ci95"][1] < 0.11
        and clear["p"] < 0.001
    )
    nothing = paired([[generator.normal(0, 0.1)] for _ in range(20)])
    assert nothing["ci95"][0] < 0 < nothing["ci95"][1] and nothing["p"] > 0.05
    assert paired([[0.1, 0.3]]) == {"mean": pytest.approx(0.2), "ci95": None, "p": None}
    assert paired([[0.0]] * 5)["p"] == 1.0


def test_seeds_of_a_fold_are_one_value():
    dice = {0: [0.60, 0.62, 0.64], 1: [0.70, 0.72, 0.74], 2: [0.80, 0.82, 0.84]}
    runs = [
        {"seed": seed, "fold": fold, "dice": value}
        for fold, values in dice.items()
        for seed, value in enumerate(values)
    ]
    for given, values, words in (
        (runs, [0.62, 0.72, 0.82], "3 folds of 3 seeds"),
        ([run for run in runs if run["seed"] == 1], [0.62, 0.72, 0.82], "3 folds"),
        ([run for run in runs if run["fold"] == 1], [0.70, 0.72, 0.74], "3 seeds"),
    ):
        interval, over = replicates(given)
        assert interval == pytest.approx(student(values)) and over == words


@pytest.fixture
def scored(search, tmp_path):
    """A sweep with two seeds, all scored but one point whose first seed is missing; the best has lr
    1e-3, then 3e-4."""
    plan = make_plan(search(axes={}, seeds=[0, 1]), tmp_path / "runs")
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    plan.folder.mkdir(parents=True)
    for node in plan.tree.nodes.values():
        folder = ledger.path(node)
        folder.mkdir(parents=True)
        first, *rest = [stage.lr for stage in node.recipe.stages]
        if rest == [1e-4] and first == 1e-2 and node.recipe.seed == 0:
            continue
        done = {"checkpoint": "step-00000001"}
        (folder / "done.json").write_text(json.dumps(done))
        base = 0.5 + 0.2 * (first == 1e-3) + 0.1 * (rest == [3e-4]) + 0.01 * node.recipe.seed
        if rest:
            cases = [
                {"id": f"c{i}", "group": f"p{i // 2}", "mean_dice": base + 0.02 * i}
                for i in range(6)
            ]
            mean = sum(case["mean_dice"] for case in cases) / 6
            summary = {
                "mean_foreground_dice": mean,
                "mean_foreground_dice_ci95": [mean - 0.1, mean + 0.1],
                "patients": 3,
            }
            document = {"cases": cases, "summary": summary, "store": "s", "parameters": 7}
            document["scored"] = score_facts(node.recipe, plan.stores(node.recipe), done)
            (folder / "evaluation.json").write_text(json.dumps(document))
    return plan, ledger


def test_ranking(scored):
    plan, ledger = scored
    document = outcome(plan, ledger)
    assert [row["rank"] for row in document["ranking"]] == [1, 2, 3, 4, 5] and len(
        document["unranked"]
    ) == 1
    best, second = document["ranking"][:2]
    assert best["point"] == {"stages.0.lr": 1e-3, "stages.1.lr": 3e-4}
    assert (
        best["score"] == pytest.approx(0.855)
        and best["over"] == "2 seeds"
        and best["ci95"][0] < 0.855 < best["ci95"][1]
    )
    assert (
        second["against_best"]["mean"] == pytest.approx(0.1)
        and second["against_best"]["patients"] == 3
    )
    assert (
        second["against_best"]["shared_stages"] == 1
        and document["ranking"][-1]["against_best"]["shared_stages"] == 0
    )
    missing = document["unranked"][0]
    assert missing["score"] is None and sorted(run["state"] for run in missing["runs"]) == [
        "done",
        "ready",
    ]
    assert document["nodes"] == {"done": 15, "ready": 1}


def test_who_ranks_a_part_says_so_in_the_first_line(scored, capsys):
    plan, ledger = scored
    document = write_outcome(plan, ledger) | {"report": "r", "folder": "f"}
    render(document)
    said = capsys.readouterr()
    line = "5 of 6 points are ranked (1 not finished); the best is the best of these"
    assert said.out.splitlines()[0] == line
    assert (
        "no rank stages.0.lr=0.01, stages.1.lr=0.0001: not finished: its stage 2 is ready"
        in said.err
    )


def test_savings_count_what_was_trained_and_what_early_stopping_left_out(scored):
    """Two seeds of two rates and three: 4 stages of 100 epochs, 11 of 20; the last one is stopped
    after 5."""
    plan, ledger = scored
    whole = {"epochs_naive": 12 * 100 + 11 * 20, "epochs_trained": 4 * 100 + 11 * 20}
    assert outcome(plan, ledger)["savings"] == {**whole, "epochs_left_out": 0, "ratio": 2.29}
    ready = next(node for node in plan.tree.nodes.values() if ledger.state(node) == "ready")
    event = {"event": "validation", "step": 5, "dice": 0.25}
    (ledger.path(ready) / "events.jsonl").write_text(json.dumps(event) + "\n")
    ledger.mark(ready, "pruned", epochs=105, dice=0.25)
    document = outcome(plan, ledger)
    assert document["savings"] == {
        "epochs_naive": whole["epochs_naive"] + 5,
        "epochs_trained": whole["epochs_trained"] + 5,
        "epochs_left_out": 15,
        "ratio": 2.28,
    }
    [row] = document["unranked"]
    assert row["reason"] == "stopped early: after 105 of 120 epochs, Dice 0.2500"


def test_points_on_two_stores_are_paired_by_the_hash_of_their_files():
    def row(store, offset, prefix, dice):
        cases = [
            {"id": f"{prefix}{i}", "group": "p", "source": f"hash{i}", "mean_dice": dice + i / 10}
            for i in range(offset, offset + 3)
        ]
        document = {"store": store, "cases": cases}
        return {"_documents": [document], "runs": [{"seed": 0, "fold": 0}], "stages": [["a"]]}

    dice = Objective(metric="dice")
    first, second = row("fine", 0, "case", 0.5), row("coarse", 1, "c", 0.25)
    found = _difference(second, first, dice)
    assert found["cases"] == 2 and found["mean"] == pytest.approx(0.25)
    for case in second["_documents"][0]["cases"]:
        case["source"] = None  # of an older store: an id says nothing beyond its own
    assert _difference(second, first, dice) is None


def test_a_run_and_its_copy_are_no_replicates(scored):
    plan, ledger = scored
    copies = [
        Trial(number=100 + trial.number, point=trial.point, recipe=trial.recipe)
        for trial in plan.trials
        if trial.recipe.seed == 0
    ]
    before = outcome(plan, ledger)
    plan.tree.add(copies)
    assert outcome(plan, ledger)["ranking"] == before["ranking"]


def test_a_failed_stage_is_named_with_what_it_took(scored):
    plan, ledger = scored
    ready = next(node for node in plan.tree.nodes.values() if ledger.state(node) == "ready")
    ledger.mark(ready, "failed", message="rank 0 <broke>")
    document = write_outcome(plan, ledger)
    assert document["failed"] == {ready.uid: "rank 0 <broke>"} and document["nodes"] == {
        "done": 15,
        "failed": 1,
    }
    assert "rank 0 &lt;broke&gt;" in (plan.folder / "report.html").read_text()


def test_files(scored):
    plan, ledger = scored
    document = write_outcome(plan, ledger)
    assert json.loads((plan.folder / "outcome.json").read_text()) == document
    lines = as_csv(document).splitlines()
    assert (
        lines[0].startswith("rank,stages.0.lr,stages.1.lr,seed,fold,state,dice")
        and len(lines) == 1 + 12
    )
    best = load_recipe(str(plan.folder / "best.yaml"))
    assert [stage.lr for stage in best.stages] == [1e-3, 3e-4] and best.name == "tiny-best"
    uid = plan.tree.leaves[
        next(trial.number for trial in plan.trials if trial.point == document["best"]["point"])
    ]
    assert plan.tree.nodes[uid].recipe.model_copy(update={"name": best.name}) == best
    page = (plan.folder / "report.html").read_text()
    assert (
        page.count("<svg") >= 3
        and "Content-Security-Policy" in page
        and "http" not in page.replace("http-equiv", "")
    )
    for words in ("2.29 times fewer", "tiny", "stages.1.lr", "chosen on the cases it is scored on"):
        assert words in page, words


def pretended(space, folder, dice):
    """The plan and ledger of a space all of whose stages lie there, trained; `dice(recipe)` is the
    first of six cases of a run."""
    plan = make_plan(space, folder / "runs")
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    plan.folder.mkdir(parents=True)
    for node in plan.tree.nodes.values():
        path, done = ledger.path(node), {"checkpoint": "step-00000001"}
        path.mkdir(parents=True)
        (path / "done.json").write_text(json.dumps(done))
        if len(node.recipe.stages) < 2:
            continue
        cases = [
            {"id": f"c{i}", "group": f"p{i}", "mean_dice": dice(node.recipe) + 0.01 * i}
            for i in range(6)
        ]
        mean = sum(case["mean_dice"] for case in cases) / 6
        summary = {"mean_foreground_dice": mean, "mean_foreground_dice_ci95": None, "patients": 6}
        document = {"cases": cases, "summary": summary, "store": "s", "parameters": 7}
        document["scored"] = score_facts(node.recipe, plan.stores(node.recipe), done)
        (path / "evaluation.json").write_text(json.dumps(document))
    return plan, ledger


def test_learning_curves_are_paired_at_equal_numbers_of_cases(search, tmp_path):
    """Two ways, two numbers of cases: the gain is what the second way adds, and with one missing
    there is none."""
    stages = [
        {"name": "train", "epochs": 4, "steps": 1, "lr": [1e-2, 1e-3]},
        {"name": "finetune", "epochs": 2, "steps": 1, "lr": 3e-4},
    ]
    space = search(axes={"stages.1.data.cases": [1, 2]}, stages=stages, seeds=[0])
    gains = {1: 0.2, 2: 0.05}

    def dice(recipe):
        many = recipe.data.cases
        return 0.3 * many + (gains[many] if recipe.stages[0].lr == 1e-3 else 0.0)

    plan, ledger = pretended(space, tmp_path, dice)
    found = write_outcome(plan, ledger)["learning"]
    assert found["axis"] == "stages.1.data.cases" and "0.01" in found["reference"]
    rows = {(row["way"] == found["reference"], row["cases"]): row for row in found["rows"]}
    assert len(rows) == 4
    for many, expected in gains.items():
        assert rows[True, many]["gain"] is None
        gain = rows[False, many]["gain"]
        assert gain["mean"] == pytest.approx(expected) and gain["patients"] == 6
        assert gain["ci95"] == pytest.approx([expected, expected])
    text = (plan.folder / "report.html").read_text()
    assert "With how many labelled cases" in text and "+0.2000" in text and "+0.0500" in text


@pytest.mark.parametrize("cases", [None, [1, 2]])
def test_what_a_pretraining_adds_is_over_the_same_without_it(search, tmp_path, cases, capsys):
    """Whatever else differs, here the rate of the fine-tuning, which is worth more than the
    pre-training: its gain is not the pre-training's."""
    stages = [
        {"name": "pretrain", "epochs": [0, 4], "steps": 1, "lr": 1e-2},
        {"name": "finetune", "epochs": 2, "steps": 1, "lr": [3e-4, 1e-3]},
    ]
    axes = {"stages.1.data.cases": cases} if cases else {}
    space = search(axes=axes, stages=stages, seeds=[0])

    def dice(recipe):
        first, second = recipe.stages
        return 0.1 + (0.03 if first.epochs else 0) + (0.4 if second.lr == 1e-3 else 0)

    plan, ledger = pretended(space, tmp_path, dice)
    document = write_outcome(plan, ledger)
    render({**document, "folder": "F", "report": "R"})
    shown = capsys.readouterr().out
    assert "Gains over the same with stages.0.epochs=0" in " ".join(shown.split())
    assert shown.count("+0.0300") == 2 * len(cases or [None])
    found = document["learning"]
    gains = [row["gain"] for row in found["rows"]]
    several = len(cases or [None])
    assert len(gains) == 4 * several and gains.count(None) == 2 * several
    assert [gain["mean"] for gain in gains if gain] == pytest.approx([0.03] * 2 * several)
    assert found["reference"] == "the same with stages.0.epochs=0"
    text = (plan.folder / "report.html").read_text().partition('id="learning"')[2]
    text = text.partition("</section>")[0]
    assert "Does pre-training help" in text and "+0.0300" in text and "+0.4300" not in text
    assert ("Labelled cases" in text) == bool(cases)


def test_without_an_axis_of_cases_there_are_no_learning_curves(scored):
    assert outcome(*scored)["learning"] is None
