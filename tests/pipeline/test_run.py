"""Folders of runs: where they lie, what is in them, who works there."""

from __future__ import annotations

import json
import re

import pytest

from segfleet.core.errors import InputError
from segfleet.core.lock import Lock
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.run import (
    StageFolder,
    data_of,
    find_run,
    folder_at,
    lock_stage,
    note_data,
    open_run,
    root_of,
    run_folders,
)
from segfleet.preprocess.stores.manifest import load_manifest


@pytest.fixture
def recipe(two_stages):
    return parse(two_stages({}, {}))


@pytest.fixture
def runs(tmp_path, recipe):
    """One run of two stages in runs/aaa/bbb, and what is none."""
    text = json.dumps(recipe.model_dump(mode="json"))
    for place in ("aaa/bbb", "aaa/bbb/checkpoints/x", ".hidden/aaa/bbb", "folds/ccc"):
        (tmp_path / "runs" / place).mkdir(parents=True)
        (tmp_path / "runs" / place / "recipe.json").write_text(text)
    return tmp_path / "runs"


def test_runs_are_found_in_order_and_nothing_else(runs, recipe):
    assert run_folders(runs) == [runs / "aaa" / "bbb"]
    (runs / "aaa" / "abc").mkdir()
    (runs / "aaa" / "abc" / "recipe.json").write_text("{}")
    assert run_folders(runs) == [runs / "aaa" / "abc", runs / "aaa" / "bbb"]
    assert root_of(runs / "aaa" / "bbb", recipe) == runs


def test_a_run_is_found_by_its_name_its_fold_or_its_score(tmp_path):
    scores = {"abc1": (0, 0.5), "abd2": (1, 0.9), "bcd3": (2, None)}
    for uid, (fold, score) in scores.items():
        (tmp_path / uid).mkdir()
        document = {"name": "mine", "data": {"fold": fold}}
        (tmp_path / uid / "recipe.json").write_text(json.dumps(document))
        if score is not None:
            summary = {"summary": {"mean_foreground_dice": score}}
            (tmp_path / uid / "evaluation.json").write_text(json.dumps(summary))
    assert find_run("abc", tmp_path) == find_run("mine", tmp_path, fold=0) == tmp_path / "abc1"
    assert find_run("mine", tmp_path, best=True) == tmp_path / "abd2"
    assert find_run("mine", tmp_path, fold=2, best=True) == tmp_path / "bcd3"  # the only one
    with pytest.raises(InputError, match=r"'ab' fits 2 runs .*") as caught:
        find_run("ab", tmp_path)
    listed = str(caught.value).splitlines()[1:]
    assert listed == ["  abc1  fold 0  Dice 0.5000", "  abd2  fold 1  Dice 0.9000"]
    with pytest.raises(InputError, match="found no run 'min'; .*Did you mean 'mine'"):
        find_run("min", tmp_path)
    for uid in ("abc1", "abd2"):
        (tmp_path / uid / "evaluation.json").unlink()
    with pytest.raises(InputError, match="'mine' fits 3 runs") as caught:
        find_run("mine", tmp_path, best=True)
    assert str(caught.value).count("not scored") == 3


def test_stages_lie_inside_one_another(runs):
    recipe, folders = open_run(runs / "aaa" / "bbb")
    assert len(recipe.stages) == 2
    assert [(one.path, one.index) for one in folders] == [
        (runs / "aaa", 0),
        (runs / "aaa" / "bbb", 1),
    ]
    with pytest.raises(InputError, match="holds no recipe.json, so it is no run folder"):
        open_run(runs)


def test_a_link_to_a_run_is_that_run(runs, tmp_path):
    (tmp_path / "links").mkdir()
    near, far = tmp_path / "links" / "near", tmp_path / "far"
    near.symlink_to("../runs/aaa/bbb")
    far.symlink_to(near)
    for link in (near, far):
        assert folder_at(link).samefile(runs / "aaa" / "bbb") and not folder_at(link).is_symlink()
        assert [one.path.name for one in open_run(link)[1]] == ["aaa", "bbb"]


def test_a_run_says_what_its_store_was_or_that_it_is_damaged(runs, recipe, tmp_path):
    store = load_manifest(recipe.data.store)
    folder = tmp_path / "new" / "run"
    note_data(folder, store)
    noted = (folder / "data.json").stat()
    note_data(folder, store)
    assert (folder / "data.json").stat().st_mtime_ns == noted.st_mtime_ns  # not written again
    kept = data_of(folder, recipe)
    assert (kept.dataset, kept.plan, len(kept.cases)) == (store.dataset, store.plan, 0)
    note_data(folder, store.model_copy(update={"split_seed": 7}))
    assert data_of(folder, recipe).split_seed == 7
    (folder / "data.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape(f"run: {folder / 'data.json'} is damaged")):
        data_of(folder, recipe)


def test_who_is_refused_hears_of_whom(tmp_path):
    with lock_stage(tmp_path / "run"):
        signed = (tmp_path / "run" / "lock").read_text()
        with pytest.raises(InputError, match=f"run is in use by {signed}; wait or stop it"):
            lock_stage(tmp_path / "run")
    (tmp_path / "run" / "lock").write_text("")
    with Lock(tmp_path / "run" / "lock") as unsigned:
        assert unsigned.acquire()
        with pytest.raises(InputError, match="run is in use by another process; wait"):
            lock_stage(tmp_path / "run")
    lock_stage(tmp_path / "run").release()


@pytest.mark.parametrize(
    ("document", "best"),
    [
        ({"checkpoint": "step-00000004"}, {}),
        ({"checkpoint": "step-00000004", "best": None}, {}),
        ({"checkpoint": "step-123456789", "best": {"step": 3}}, {"step": 3}),
        ({"checkpoint": "step-4"}, None),
        ({"checkpoint": "../step-00000004"}, None),
        ({"checkpoint": "step-00000004", "best": [1]}, None),
        ({"checkpoint": "step-00000004", "best": {"step": "x"}}, None),
        ({}, None),
    ],
)
def test_what_says_that_a_stage_is_done(tmp_path, document, best):
    stage = StageFolder(path=tmp_path, index=1)
    assert stage.done() is None
    (tmp_path / "done.json").write_text(json.dumps(document))
    if best is not None:
        assert stage.done()["best"] == best and stage.check_done() == stage.done()
        return
    assert stage.done() is None
    with pytest.raises(InputError, match="stage 2 in .* is not finished; train it first"):
        stage.check_done()
