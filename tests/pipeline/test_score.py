"""A run's score is of its own cases, taken as its recipe says; what makes a score optimistic is
said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Score, Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import override, parse
from segfleet.pipeline.run import lock_stage, stage_folders
from segfleet.pipeline.scoring import evaluate, score, scored
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import load_manifest, save_manifest

RECIPE = {
    "name": "scores",
    "data": {"batch": 2, "patch": [16, 16], "split": "a", "augment": None},
    "model": {"name": "unet_lite_standard", "options": {"width": 4}},
    "stages": [{"epochs": 2, "steps": 1, "lr": 1e-2}],
}


@pytest.fixture(scope="module")
def store(tiny_store, tmp_path_factory):
    """Six cases, the first and the fifth of one patient; the splits "a" and "a-test" have the same
    training cases."""
    root = tmp_path_factory.mktemp("scores") / "store"
    shutil.copytree(tiny_store(dims=2), root)
    manifest = load_manifest(root)
    ids = tuple(case.id for case in manifest.cases)
    cases = [
        case.model_copy(update={"group": ids[0] if case.id == ids[4] else case.id})
        for case in manifest.cases
    ]
    splits = {
        name: ({"train": ids[:3], "val": val},)
        for name, val in (("a", ids[3:4]), ("a-test", ids[4:]))
    }
    save_manifest(
        root,
        manifest.model_copy(
            update={"cases": tuple(cases), "splits": {**manifest.splits, **splits}}
        ),
    )
    return root


@pytest.fixture
def train(store, tmp_path):
    """`train(*changes, kind=Train)`: the run's folder and its evaluation.json."""

    def go(*changes, kind=Train, **job):
        recipe = parse(override(RECIPE, [f"data.store={store}", *changes]))
        job = kind(recipe=recipe.model_dump(mode="json"), root=tmp_path, **job)
        run_job(job, Ranks(torch.device("cpu")), StopRequest())
        leaf = stage_folders(tmp_path, recipe, load_manifest(store))[-1].path
        assert scored.is_scored(leaf, recipe, load_manifest(store))
        return leaf, json.loads((leaf / "evaluation.json").read_text())

    return go


def ids(document):
    return [case["id"] for case in document["cases"]]


def test_a_score_of_other_cases_or_other_settings_is_not_taken_over(train):
    leaf, first = train()
    changed = (leaf / "evaluation.json").stat().st_mtime_ns
    assert ids(first) == ["case03"] and train(
        "data.batch=2", "data.workers=0", "evaluation.batch=3"
    ) == (leaf, first)
    assert (leaf / "evaluation.json").stat().st_mtime_ns == changed, "nothing is scored twice"
    there, test = train("data.split=a-test")
    assert there == leaf and ids(test) == ["case04", "case05"] and test["split"] == "a-test"
    assert ids(train()[1]) == ["case03"]
    assert train("evaluation.mirror=[2,1]")[1]["settings"]["mirror_axes"] == [2, 1]
    assert train("evaluation.overlap=0.25")[1]["settings"]["overlap"] == 0.25
    assert ids(train("data.split=a-test", kind=Score, again=True)[1]) == ["case04", "case05"]
    assert train()[1]["cases"] == first["cases"]
    (leaf / "evaluation.json").write_text("{")
    assert train()[1]["cases"] == first["cases"]


def test_scores_of_training_cases_and_patients_are_said_to_be_optimistic(train, capfd):
    leaf, document = train("data.split=all")
    assert document["seen_in_training"] == {"cases": 6, "others_of_the_same_patients": 0}
    assert (
        "6 of the 6 scored cases are training cases: the scores are optimistic"
        in capfd.readouterr().err
    )
    assert "6 of the 6 scored cases are training cases" in (leaf / "report.html").read_text()
    train("data.split=all")
    assert "6 of the 6" in capfd.readouterr().err, "also when the score is there already"
    leaf, document = train("data.split=a-test")
    assert document["seen_in_training"] == {"cases": 0, "others_of_the_same_patients": 1}
    assert (
        "1 of the 2 scored cases are of patients with training cases"
        in (leaf / "report.html").read_text()
    )
    capfd.readouterr()
    leaf, document = train()
    assert document["seen_in_training"] == {"cases": 0, "others_of_the_same_patients": 0}
    assert "optimistic" not in (leaf / "report.html").read_text() and capfd.readouterr().err == ""


def test_selection_is_said_where_a_best_checkpoint_was_chosen_on_the_scored_cases(train):
    leaf, document = train("evaluation.weights=best")
    assert (
        json.loads((leaf / "done.json").read_text())["best"] == {}
        and document["selected_on_these_cases"] is False
    )
    every = ("evaluation.every=1", "seed=1")
    best, last = train(*every, "evaluation.weights=best")[1], train(*every)[1]
    assert best["selected_on_these_cases"] is True and last["selected_on_these_cases"] is False
    other = train(*every, "evaluation.weights=best", "data.split=a-test")[1]
    assert other["selected_on_these_cases"] is False, "it was chosen on the cases of the split 'a'"


class AfterTwo(StopRequest):
    """Asks for a stop once two cases are scored."""

    def __init__(self, predicted):
        super().__init__()
        self.predicted = predicted

    def asked(self):
        return len(self.predicted) >= 2


def test_a_run_is_scored_by_one_command_at_a_time(train):
    """Two would print one score: that of whoever wrote last."""
    leaf, whole = train("data.split=all")
    recipe = parse(json.loads((leaf / "recipe.json").read_text()))
    folders = stage_folders(leaf.parent, recipe, load_manifest(recipe.data.store))
    (leaf / "evaluation.json").unlink()

    def again():
        store, ranks = open_store(recipe.data.store), Ranks(torch.device("cpu"))
        scorer = score.Scorer(recipe=recipe, store=store, ranks=ranks, stop=StopRequest())
        scorer.score(folders)

    with lock_stage(leaf), pytest.raises(InputError, match="is in use by"):
        again()
    assert not (leaf / "evaluation.json").exists()
    again()
    assert json.loads((leaf / "evaluation.json").read_text())["summary"] == whole["summary"]


def test_a_score_whose_process_was_killed_before_its_report_is_reported(train):
    """Before, the same command said that there is nothing to do, and named a report that was not
    there."""
    leaf, whole = train("data.split=all")
    recipe = parse(json.loads((leaf / "recipe.json").read_text()))
    folders = stage_folders(leaf.parent, recipe, load_manifest(recipe.data.store))
    report, note = leaf / "report.html", leaf / score.SCORING
    phase = json.dumps({"phase": "report", "done": 1, "total": 2})

    def again() -> int:
        store, ranks, reported = open_store(recipe.data.store), Ranks(torch.device("cpu")), []
        facts = {"recipe": recipe, "store": store, "ranks": ranks, "stop": StopRequest()}
        score.Scorer(**facts, report=reported.append).score(folders)
        assert set(reported) <= {leaf}
        return len(reported)

    report.write_text("whole")
    assert again() == 0
    report.unlink()
    assert again() == 1
    report.write_text("of the score before")
    note.write_text(phase)
    with lock_stage(leaf):
        assert again() == 0  # whoever works there does it
    assert again() == 1 and not note.exists()
    assert again() == 0
    assert json.loads((leaf / "evaluation.json").read_text())["summary"] == whole["summary"]


def test_an_interrupted_score_goes_on_with_the_cases_that_are_missing(train, monkeypatch):
    predicted, predict = [], evaluate.raw_label

    def noted(found, store, case, task):
        predicted.append(case.id)
        return predict(found, store, case, task)

    monkeypatch.setattr(evaluate, "raw_label", noted)
    leaf, whole = train("data.split=all", "evaluation.overlap=0.25")
    recipe, cases = parse(json.loads((leaf / "recipe.json").read_text())), ids(whole)
    folders = stage_folders(leaf.parent, recipe, load_manifest(recipe.data.store))

    def score_again(recipe, stop=None):
        predicted.clear()
        store, ranks = open_store(recipe.data.store), Ranks(torch.device("cpu"))
        score.Scorer(recipe=recipe, store=store, ranks=ranks, stop=stop or StopRequest()).score(
            folders
        )
        return list(predicted)

    (leaf / "evaluation.json").unlink()
    with pytest.raises(Interrupted):
        score_again(recipe, AfterTwo(predicted))
    assert predicted == cases[:2]
    lines = (leaf / score.CASES / "0.jsonl").read_text()
    # the writer was killed
    (leaf / score.CASES / "0.jsonl").write_text(lines + lines[: len(lines) // 3])
    (leaf / score.CASES / "0.jsonl").rename(leaf / score.CASES / "5.jsonl")  # there were more ranks
    assert score_again(recipe)[: len(cases) - 2] == cases[2:]
    assert (
        json.loads((leaf / "evaluation.json").read_text())["cases"] == whole["cases"]
        and not (leaf / score.CASES).exists()
    )

    with pytest.raises(Interrupted):
        score_again(
            parse(override(recipe.model_dump(mode="json"), ["evaluation.overlap=0.5"])),
            AfterTwo(predicted),
        )
    (leaf / "evaluation.json").unlink()
    assert score_again(recipe)[: len(cases)] == cases, "scored in another way"
