"""Stores as axes of a space: each is made once, before the plan, and is what its points train
on."""

from __future__ import annotations

import pytest

from segfleet.cli.sweep import prepare
from segfleet.core.errors import InputError
from segfleet.preprocess.phantoms.phantom import write_msd_phantom
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.space.checks import check_read
from segfleet.sweeps.space.plan import Stores, make_plan
from segfleet.sweeps.space.space import parse_search


@pytest.fixture
def prepared(space, tmp_path):
    """A search with two spacings and two normalisations of one data set."""
    write_msd_phantom(tmp_path / "raw", cases=5, size=(8, 16, 16))
    asked = {
        "name": "msd",
        "raw": str(tmp_path / "raw"),
        "out": str(tmp_path / "stores"),
        "spacing": [[4.0, 2.0, 2.0], None],
        "normalisation": ["zscore", "rescale_to_0_1"],
    }
    return parse_search({**space, "axes": {}, "prepare": asked})


NAMES = [
    f"spacing={spacing},normalisation={how}"
    for spacing in ("4x2x2", "planned")
    for how in ("zscore", "rescale_to_0_1")
]


def test_every_store_is_made_once_and_trained_on(prepared, tmp_path):
    assert len(prepared.points()) == 4 * 2 * 3
    prepare(prepared, "local", dry_run=False)
    stores = {name: load_manifest(tmp_path / "stores" / name) for name in NAMES}
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == sorted(NAMES)
    assert stores[NAMES[0]].plan.target_spacing == (4.0, 2.0, 2.0)
    assert stores[NAMES[2]].plan.target_spacing != (4.0, 2.0, 2.0)
    assert set(stores[NAMES[1]].plan.normalisation) == {"rescale_to_0_1"}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").glob("*/manifest.json")}
    prepare(prepared, "local", dry_run=False)
    prepare(prepared, "slurm", dry_run=True)  # nothing is missing
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    plan = make_plan(prepared, tmp_path / "runs", build=False)
    check_read(prepared, Stores())
    assert len(plan.tree.nodes) == 4 * (2 + 2 * 3), "stages are shared within a store"
    for trial in plan.trials:
        spacing = trial.point["prepare.spacing"]
        name = f"spacing={'4x2x2' if spacing else 'planned'},normalisation="
        assert trial.recipe.data.store.endswith(name + trial.point["prepare.normalisation"])


def test_a_value_that_is_not_legal_is_found_before_a_store_is_made(prepared, space, tmp_path):
    asked = prepared.space.prepare.model_dump() | {"normalisation": ["zscore", "imagenet"]}
    with pytest.raises(InputError, match="normalisation: found 'imagenet', which is for pictures"):
        prepare(parse_search({**space, "axes": {}, "prepare": asked}), "local", dry_run=False)
    assert not (tmp_path / "stores").exists()


def test_who_only_looks_is_told_how_the_stores_are_made(prepared, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for on, dry_run in (("local", True), ("slurm", False)):
        with pytest.raises(InputError) as caught:
            prepare(prepared, on, dry_run)
        words = str(caught.value)
        assert "4 store(s) are missing" in words
        command = "segfleet submit --array 8 -- preprocess msd --raw"
        assert words.count(command) == 4 and words.count("--spacing 4x2x2") == 2
        assert words.count("--normalisation rescale_to_0_1") == 2
    assert not (tmp_path / "stores").exists()


def test_one_value_is_no_axis_and_a_list_of_numbers_is_one_value(space, tmp_path):
    asked = {"name": "msd", "raw": "raw", "out": str(tmp_path / "one"), "spacing": [1.0, 1.0, 1.0]}
    found = parse_search({**space, "axes": {}, "prepare": asked})
    assert [axis.label for axis in found.axes] == ["stages.0.lr", "stages.1.lr"]
    assert found.trials(found.points()[0])[0].recipe.data.store == str(tmp_path / "one")
    with pytest.raises(
        InputError, match=r"prepare.spacings: unknown key; expected one of: name, raw"
    ):
        parse_search({**space, "prepare": {**asked, "spacings": [[1, 1, 1]]}})
