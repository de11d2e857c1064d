"""From trained runs to a paper's table by commands alone: scores of a test set and of any folder of
predictions, a comparison in every format, a table of all cases."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from segfleet.cli import main
from segfleet.core.errors import InputError
from segfleet.pipeline.launch import local
from segfleet.pipeline.run import run_folders


def segfleet(*words):
    done = CliRunner().invoke(main.app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def scored(two_folds, tmp_path_factory):
    """Predictions of both runs for the same pictures, scored against those of their ensemble."""
    root = tmp_path_factory.mktemp("scored")
    runs = sorted(run_folders(two_folds / "runs"), key=lambda run: run.name)
    images, place = two_folds / "images", ("--runs", two_folds / "runs")
    segfleet("predict", *runs, images, "--out", root / "truth", *place)
    for name, run in zip(("first", "second"), runs, strict=True):
        segfleet("predict", run, images, "--out", root / name, *place)
        segfleet("score", root / name, "--truth", root / "truth")
    return root


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_any_folder_of_predictions_is_scored(scored):
    """By hand: the Dice of the files as they lie there; the same report and table as of a run."""
    scores = scored / "first" / "scores"
    document = json.loads((scores / "evaluation.json").read_text())
    assert {path.name for path in scores.iterdir()} >= {"report.html", "cases.csv"}
    for case in document["cases"]:
        a, b = (
            np.asarray(Image.open(scored / part / f"{case['id']}.png"))
            for part in ("first", "truth")
        )
        for value, name in ((1, "blob1"), (2, "blob2")):
            if (a == value).any() or (b == value).any():
                assert case["scores"][name]["dice"] == pytest.approx(dice(a == value, b == value))
    rows = list(csv.DictReader((scores / "cases.csv").open()))
    assert len(rows) == 2 * 2 and {row["case"] for row in rows} == {"one", "two"}


def test_cases_that_are_not_scored_are_named(scored, tmp_path):
    for name in ("first", "truth"):
        shutil.copytree(scored / name, tmp_path / name, ignore=shutil.ignore_patterns("scores"))
    (tmp_path / "truth" / "two.png").unlink()
    done = segfleet("score", tmp_path / "first", "--truth", tmp_path / "truth")
    assert "1 case(s) without a truth are not scored: two\n" in done.stderr
    shutil.copy(tmp_path / "truth" / "one.png", tmp_path / "truth" / "three.png")
    done = segfleet("score", tmp_path / "first", "--truth", tmp_path / "truth", "--partial")
    assert "1 case(s) without a prediction are not scored: three\n" in done.stderr


def test_a_comparison_is_written_in_every_format(scored):
    """The difference is the later minus the earlier; LaTeX, Markdown, CSV and the page say it."""
    names = [scored / name / "scores" for name in ("first", "second")]
    done = segfleet("compare", *names, "--metric", "dice", "--out", scored / "cmp", "--json")
    document = json.loads(done.stdout)
    assert {path.suffix for path in (scored / "cmp").iterdir()} == {
        ".json", ".csv", ".md", ".tex", ".html",
    }  # fmt: skip
    means = [
        json.loads((one / "evaluation.json").read_text())["summary"]["structures"] for one in names
    ]
    latex, seen = (scored / "cmp" / "comparison.tex").read_text(), set()
    for row in document["differences"]:
        if (name := row["structure"]) in means[0] and row["one_missing"] == 0:
            first, second = (mean[name]["dice"]["mean"] for mean in means)
            assert row["difference"] == pytest.approx(second - first)
            assert name in latex
            seen.add(name)
    assert seen == {"blob1", "blob2"}
    assert r"\toprule" in latex
    page = (scored / "cmp" / "comparison.html").read_text()
    assert "<svg" in page and all(case["id"] in page for case in document["differ_most"])
    wrong = CliRunner().invoke(main.app, ["compare", str(names[0]), str(names[0])])
    assert isinstance(wrong.exception, InputError) and "named twice" in str(wrong.exception)


def test_a_test_set_and_the_table_of_all_cases(two_folds, tmp_path, monkeypatch):
    shutil.copytree(two_folds / "runs", tmp_path / "runs")
    run = sorted(run_folders(tmp_path / "runs"), key=lambda one: one.name)[0]
    before = (run / "evaluation.json").read_bytes()
    words = ("evaluate", run, "--on", two_folds / "store", "--split", "kfold", "--fold", 1)
    document = json.loads(segfleet(*words, "--runs", tmp_path / "runs", "--json").stdout)
    assert [case["id"] for case in document["cases"]] == ["case01", "case03", "case05"]
    assert (run / "evaluation.json").read_bytes() == before
    # as if the ranks of another evaluation had been the last to write
    monkeypatch.setattr(local, "run_ranks", lambda *_: None)
    for command in (("evaluate", run), words):
        asked = [*map(str, command), "evaluation.overlap=0.75", "--runs", str(tmp_path / "runs")]
        said = CliRunner().invoke(main.app, asked).exception
        assert isinstance(said, InputError) and "was replaced by another evaluation" in str(said)
    written = json.loads(
        segfleet("report", run, "--csv", "--runs", tmp_path / "runs", "--json").stdout
    )
    rows = list(csv.DictReader(open(written["csv"])))
    scores = {case["id"]: case["scores"] for case in json.loads(before)["cases"]}
    assert len(rows) == sum(map(len, scores.values()))
    for row in rows:
        known = scores[row["case"]][row["structure"]]["dice"]
        assert row["dice"] == "" if known is None else float(row["dice"]) == pytest.approx(known)
