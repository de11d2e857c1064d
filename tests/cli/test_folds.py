"""All folds of a recipe from one command: a run for each, one score over all cases, one line of
status."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from segfleet.cli import main
from segfleet.cli.status import render
from segfleet.core.errors import InputError
from segfleet.pipeline.events import read_events
from segfleet.pipeline.recipe import load_recipe
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.run import find_run, run_folders, stage_folders
from segfleet.pipeline.scoring.folds import every_fold, score_folds
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.slurm import prepare
from segfleet.slurm.status import status
from segfleet.sweeps.space.load import search_of
from segfleet.sweeps.space.space import SearchSpace


def segfleet(*words):
    return CliRunner().invoke(main.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def work(tiny_store, tmp_path_factory, write_folds):
    """A folder with tiny.yaml, a recipe of two steps on a store of two folds, and the runs of both
    in `runs`."""
    folder = tmp_path_factory.mktemp("folds")
    shutil.copytree(tiny_store(dims=2), folder / "store")
    write_folds(folder / "store", [[0, 2, 4], [1, 3]])
    recipe = {
        "name": "tiny",
        "data": {"store": str(folder / "store"), "batch": 2, "patch": [16, 16], "workers": 0},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [{"epochs": 1, "steps": 2, "lr": 1e-2}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ("train", folder / "tiny.yaml", "data.fold=all", "--runs", folder / "runs", "--json")
    done = segfleet(*command)
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout), command


def test_every_case_is_scored_by_the_network_that_has_not_seen_it(work):
    folder, document, _ = work
    assert [one["fold"] for one in document["folds"]] == [0, 1]
    assert document["cases"] == 5
    own = {}
    for one in document["folds"]:
        found = json.loads((Path(one["run"]) / "evaluation.json").read_text())
        own |= {case["id"]: case["scores"] for case in found["cases"]}
    together = json.loads((Path(document["report"]).parent / "evaluation.json").read_text())
    assert {case["id"]: case["scores"] for case in together["cases"]} == own
    assert {case["id"]: case["fold"] for case in together["cases"]} == {
        "case00": 0, "case02": 0, "case04": 0, "case01": 1, "case03": 1
    }  # fmt: skip
    # by hand: the mean over structures of each structure's mean over the five cases
    means = []
    for name in together["structures"]:
        dice = [scores[name]["dice"] for scores in own.values() if scores[name]["dice"] is not None]
        means.append(sum(dice) / len(dice))
    assert document["mean_foreground_dice"] == pytest.approx(sum(means) / len(means))
    assert together["seen_in_training"]["cases"] == 0
    page = Path(document["report"]).read_text()
    assert "fold all" in page and all(Path(one["run"]).name in page for one in document["folds"])
    # what a paper asks for, of all folds together
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Training cases"] == "3 to 4 of each fold" and "core" in facts["Hardware"]
    events = [read_events(Path(one["run"])) for one in document["folds"]]
    seconds = [[event["time"] for event in found if "time" in event] for found in events]
    worked = sum(max(times) - min(times) for times in seconds)
    assert together["training"]["seconds"] == pytest.approx(worked) and "Training time" in facts


def test_a_second_command_trains_nothing(work):
    _, document, command = work
    before = Path(document["report"]).stat().st_mtime_ns
    again = segfleet(*command)
    assert again.exit_code == 0 and json.loads(again.stdout) == document
    assert again.stderr.count("nothing to do") == 2
    assert Path(document["report"]).stat().st_mtime_ns == before


def test_status_says_it_in_one_line(work, capsys):
    folder, document, _ = work
    rows = status(folder / "runs")
    assert len(rows) == 2, "the folder of the score over all folds is no run"
    render(rows)
    first, second = (f"{one['mean_foreground_dice']:.3f}" for one in document["folds"])
    shown = capsys.readouterr().out
    assert shown.count("tiny") == 1 and f"{first} {second}" in shown
    assert f"{document['mean_foreground_dice']:.4f}" in shown and "2/2 done" in shown


def test_a_recipe_s_name_is_its_score_over_all_folds(work, tmp_path):
    """Where a score is asked for, not a network: five folds are one row of a table. A uid, or
    --fold, is one of them."""
    folder, document, _ = work
    runs, together = ("--runs", folder / "runs"), Path(document["report"]).parent
    said = json.loads(segfleet("report", "tiny", "--csv", *runs, "--json").stdout)
    assert Path(said["csv"]).parent.resolve() == together.resolve()
    assert len(set(csv.DictReader(open(said["csv"])).fieldnames) & {"case", "fold", "dice"}) == 3
    again = segfleet("report", "tiny", "--fold", "all", *runs, "--json")
    assert json.loads(again.stdout)["report"] == said["report"]
    one = json.loads(segfleet("report", "tiny", "--fold", "1", *runs, "--json").stdout)
    assert Path(one["report"]).parent.name == Path(document["folds"][1]["run"]).name
    # against a copy under another name
    other = tmp_path / "predictions" / "scores"
    other.mkdir(parents=True)
    shutil.copy(together / "evaluation.json", other)
    compared = segfleet("compare", "tiny", other.parent, *runs, "--json")
    assert compared.exit_code == 0, (compared.output, compared.exception)
    found = json.loads(compared.stdout)
    assert found["cases"] == 5
    assert all(not row["difference"] for row in found["differences"])
    # no score over all folds: the runs are listed
    alone = tmp_path / "runs"
    shutil.copytree(folder / "runs", alone)
    shutil.rmtree(alone / "folds")
    for words, message in (
        (("report", "tiny"), "fits 2 runs"),
        (("compare", "tiny", other), "or --fold N, or --best"),
        (("report", "tiny", "--fold", "all"), "have no score together yet"),
        (("report", "tinny"), "Did you mean 'tiny'"),
    ):
        assert message in str(segfleet(*words, "--runs", alone).exception), words


def test_a_fold_that_is_not_scored_as_asked_leaves_no_score_of_all(work, tmp_path):
    folder, document, _ = work
    recipe, manifest = load_recipe(str(folder / "tiny.yaml")), load_manifest(folder / "store")
    shutil.copytree(folder / "runs", tmp_path / "runs")
    folder = score_folds(tmp_path / "runs", recipe, manifest, write_report)
    assert folder is not None
    (folder / "report.html").unlink()  # as when it was killed before that
    assert score_folds(tmp_path / "runs", recipe, manifest, write_report) == folder
    assert (folder / "report.html").is_file()
    other = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"overlap": 0.25})}
    )
    assert score_folds(tmp_path / "runs", other, manifest, write_report) is None
    (tmp_path / "runs" / Path(document["folds"][1]["run"]).name / "evaluation.json").unlink()
    assert score_folds(tmp_path / "runs", recipe, manifest, write_report) is None


def test_folds_that_share_cases_have_no_score_of_all(work, tmp_path, write_folds):
    folder, _, _ = work
    shutil.copytree(folder / "store", tmp_path / "store")
    write_folds(tmp_path / "store", [[0, 1], [1, 2]])
    recipe = load_recipe(str(folder / "tiny.yaml"), [f"data.store={tmp_path / 'store'}"])
    assert score_folds(tmp_path, recipe, load_manifest(tmp_path / "store"), write_report) is None


def test_a_fold_with_fewer_cases_than_asked_for_hinders_no_other(work, tmp_path, write_folds):
    """Its run ended in that message, scored and all, because the other fold could not be trained
    so."""
    folder, _, _ = work
    shutil.copytree(folder / "store", tmp_path / "store")
    write_folds(tmp_path / "store", [[0], [1, 2]])  # they leave 5 and 4 of 6 cases to train on
    changes = [f"data.store={tmp_path / 'store'}", "data.cases=5", "data.fold=0"]
    recipe, manifest = (
        load_recipe(str(folder / "tiny.yaml"), changes),
        load_manifest(tmp_path / "store"),
    )
    assert stage_folders(tmp_path, recipe, manifest), "this one can"
    assert score_folds(tmp_path, recipe, manifest, write_report) is None


def test_submit_and_sweep_take_all_folds_too(work):
    folder, document, _ = work
    made = prepare.prepare(str(folder / "tiny.yaml"), ["data.fold=all"], folder / "runs")
    assert [str(run) for _, run in made] == [one["run"] for one in document["folds"]]
    base = {**yaml.safe_load((folder / "tiny.yaml").read_text())}
    space = {"name": "s", "base": "tiny", "axes": {"optimizer.weight_decay": [0.1, 0.2]}}
    for folds, data in (("all", {}), ((), {"fold": "all"})):
        search = search_of(
            SearchSpace(**space, folds=folds), {**base, "data": {**base["data"], **data}}
        )
        trials = search.trials(search.points()[0])
        assert [trial.recipe.data.fold for trial in trials] == [0, 1]
    with pytest.raises(InputError, match=r"folds: found \[0, 1\]; pbt trains one population"):
        search_of(
            SearchSpace(name="s", base="tiny", axes={"stages.0.lr": [0.1, 0.2]}, scheduler="pbt"),
            {**base, "data": {**base["data"], "fold": "all"}},
        )


def test_what_takes_one_fold_says_so(work):
    folder, document, _ = work
    uid = Path(document["folds"][0]["run"]).name
    told = segfleet("evaluate", uid, "data.fold=all", "--runs", folder / "runs")
    assert told.exit_code != 0 and isinstance(told.exception, InputError)
    assert "data.fold: found 'all'" in str(told.exception) and "0 to 1" in str(told.exception)
    with pytest.raises(InputError, match="data.fold: found 'al'"):
        load_recipe(str(folder / "tiny.yaml"), ["data.fold=al"])
    assert len(run_folders(folder / "runs")) == 2
    assert find_run("tiny", folder / "runs", fold=1).name == Path(document["folds"][1]["run"]).name
    recipe, manifest = load_recipe(str(folder / "tiny.yaml")), load_manifest(folder / "store")
    assert [one.data.fold for one in every_fold(recipe, manifest)] == [0, 1]
