"""What a user types wrong or ambiguously, and what a narrow terminal shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from segfleet.cli.status import render
from segfleet.core.errors import InputError
from segfleet.pipeline.reports.status import Row
from segfleet.pipeline.run import find_run


def segfleet(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *words],
        env={**os.environ, "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def runs(tmp_path):
    """Three runs of one name, two of them scored, and another one."""
    for uid, name, fold, dice in (
        ("aa00", "hippocampus", 0, 0.75),
        ("bb11", "hippocampus", 1, 0.8125),
        ("cc22", "hippocampus", 1, None),
        ("dd33", "other", 0, 0.5),
    ):
        folder = tmp_path / "runs" / uid
        folder.mkdir(parents=True)
        document = {
            "name": name,
            "data": {"fold": fold},
            "model": {"name": "unext"},
            "stages": [{"epochs": 1, "lr": 1.0}],
        }
        (folder / "recipe.json").write_text(json.dumps(document))
        if dice:
            scores = {"summary": {"mean_foreground_dice": dice}}
            (folder / "evaluation.json").write_text(json.dumps(scores))
            (folder / "done.json").write_text('{"checkpoint": "step-1"}')
    return tmp_path / "runs"


def test_a_misspelt_word_gets_a_suggestion():
    done = segfleet("trian")
    assert done.returncode == 2
    assert "No such command 'trian'. Did you mean 'train'?" in done.stderr
    assert "Did you mean 'hippocampus'?" in segfleet("recipe", "hipocampus").stderr
    assert "Did you mean 'kvasir_seg'?" in segfleet("datasets", "kvasirseg").stderr


def test_an_error_is_a_document_too(tmp_path):
    for words, text in (
        (["train", "hipocampus", "--json"], "found no file 'hipocampus'"),
        (["train", "--json"], "Missing argument"),
        (["datasets", "msd", "check", str(tmp_path), "--json"], "dataset.json"),
    ):
        done = segfleet(*words)
        document = json.loads(done.stdout)
        assert done.returncode == document["exit_code"] == 2 and text in document["error"], words
        assert done.stderr


def test_several_runs_of_a_name_are_told_apart(runs):
    with pytest.raises(InputError) as caught:
        find_run("hippocampus", runs)
    message = str(caught.value)
    assert "fits 3 runs" in message and "--fold all, an ensemble" in message
    assert "dd33" not in message
    assert (
        "  aa00  fold 0  Dice 0.7500\n  bb11  fold 1  Dice 0.8125\n  cc22  fold 1  not" in message
    )
    assert find_run("hippocampus", runs, fold=0).name == "aa00"
    assert find_run("hippocampus", runs, best=True).name == "bb11"
    assert find_run("hippocampus", runs, fold=0, best=True).name == "aa00"
    with pytest.raises(InputError, match="with fold 1 fits 2 runs"):
        find_run("hippocampus", runs, fold=1)
    with pytest.raises(InputError, match="with fold 7 fits 0 runs"):
        find_run("hippocampus", runs, fold=7)


def test_status_fits_into_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = Row(
        run="1e5360ec4446", path="runs/1e5360ec4446", recipe="rec_unet_lits_tumour", fold=4,
        stages=2, stage=2,
        step=123456, steps=234567, loss=0.12345, samples_per_second=81.234, remaining_seconds=7322,
        restarts=3, score=0.88888, date="2026-11-29 07:15", state="unreadable",
    )  # fmt: skip
    render([row, replace(row, state="training")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[1:3]] == [
        ["1e5360ec", "rec_unet_lits_tumour", "4", state, "2/2", "0.8889", "11-29", "07:15"]
        for state in ("unreadable", "training")
    ]
    assert lines[5].split()[:5] == ["1e5360ec", "123456/234567", "0.1235", "81.234", "2"]
    assert "2 h 02 min" in lines[5]


def test_the_shell_completes_commands():
    done = segfleet(_SEGFLEET_COMPLETE="complete_bash", COMP_WORDS="segfleet sta", COMP_CWORD="1")
    assert done.stdout.split() == ["status"], done.stderr
