"""A run scored on another store: its own score stays, and a store that does not fit is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from segfleet.cli.evaluate import job_on
from segfleet.core.errors import InputError
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import override, parse
from segfleet.pipeline.run import stage_folders
from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import write_msd_phantom
from segfleet.preprocess.planning.plan import Overrides
from segfleet.preprocess.stores.manifest import load_manifest, save_manifest

RECIPE = {
    "name": "outside",
    "data": {"batch": 2, "patch": [16, 16], "augment": None},
    "model": {"name": "unet_lite_standard", "options": {"width": 4}},
    "stages": [{"epochs": 1, "steps": 1, "lr": 1e-2}],
}


def copy(store, path, **changes):
    """A store with the same shards and another manifest."""
    shutil.copytree(store, path)
    manifest = load_manifest(path)
    for part, facts in changes.items():
        changed = getattr(manifest, part).model_copy(update=facts)
        manifest = manifest.model_copy(update={part: changed})
    save_manifest(path, manifest)
    return path


@pytest.fixture(scope="module")
def trained(tiny_store, tmp_path_factory):
    root = tmp_path_factory.mktemp("outside")
    store = copy(tiny_store(dims=2), root / "store")
    recipe = parse(override(RECIPE, [f"data.store={store}"]))
    job = Train(recipe=recipe.model_dump(mode="json"), root=root / "runs")
    run_job(job, Ranks(torch.device("cpu")), StopRequest())
    return stage_folders(root / "runs", recipe, load_manifest(store))[-1].path, store


def go(job):
    run_job(job, Ranks(torch.device("cpu")), StopRequest())


def test_a_test_set_has_a_score_of_its_own(trained, tmp_path):
    run, store = trained
    before = (run / "evaluation.json").read_bytes()
    other = copy(store, tmp_path / "other", dataset={"name": "elsewhere"})
    shutil.move(store, tmp_path / "away")  # a test set does not need the training data
    try:
        go(job_on(run, ["evaluation.tolerance=1"], other, None, 0))
        go(job_on(run, [], other, "kfold", 0))
    finally:
        shutil.move(tmp_path / "away", store)
    assert (run / "evaluation.json").read_bytes() == before
    name = load_manifest(other).id[:12]
    whole, part = (evaluation_of(run / "on" / folder) for folder in (name, f"{name}-kfold-0"))
    assert whole["dataset"] == "elsewhere" and len(whole["cases"]) == 6
    assert whole["scored"]["run"] == run.name
    assert set(whole["settings"]["tolerance"].values()) == {1.0}
    assert [c["id"] for c in part["cases"]] == sorted(load_manifest(other).fold("kfold", 0)["val"])
    page = (run / "on" / name / "report.html").read_text()
    assert "outside on elsewhere" in page


def test_training_cases_in_a_test_set_are_counted(trained):
    run, store = trained
    go(job_on(run, [], store, None, 0))
    (out,) = (run / "on").glob(f"{load_manifest(store).id[:12]}")
    document = json.loads((out / "evaluation.json").read_text())
    hashes = [case.source_sha256 for case in load_manifest(store).cases]
    if all(hashes):  # else nothing can be said
        assert document["seen_in_training"]["cases"] == document["training_cases"]


def test_a_store_that_does_not_fit_is_refused(trained, tmp_path):
    run, store = trained
    labels = load_manifest(store).dataset.labels
    renamed = {f"{name}s" if value else name: value for name, value in labels.items()}
    other = copy(store, tmp_path / "labels", dataset={"labels": renamed})
    with pytest.raises(InputError, match="its labels are .*s 1.*, those of the run"):
        job_on(run, [], other, None, 0)
    plan = copy(store, tmp_path / "plan", plan={"target_spacing": (0.0, 3.0, 3.0)})
    with pytest.raises(InputError, match="target_spacing .0.0, 3.0, 3.0., of the run .*--like"):
        job_on(run, [], plan, None, 0)
    with pytest.raises(InputError, match="changes training"):
        job_on(run, ["seed=1"], store, None, 0)
    with pytest.raises(InputError, match="data.split: found 'nope'"):
        job_on(run, [], store, "nope", 0)


def test_a_test_set_is_preprocessed_like_the_training_set(tmp_path):
    write_msd_phantom(tmp_path / "a", cases=3, size=(10, 24, 24))
    write_msd_phantom(tmp_path / "b", cases=2, size=(8, 30, 20))
    first = build(BuildRequest("msd", tmp_path / "a", tmp_path / "first", workers=1))
    like = Overrides(like=str(tmp_path / "first"))
    second = build(
        BuildRequest("msd", tmp_path / "b", tmp_path / "second", workers=1, overrides=like)
    )
    assert second.plan == first.plan and len(second.cases) == 2
    again = build(
        BuildRequest("msd", tmp_path / "b", tmp_path / "second", workers=1, overrides=like)
    )
    assert again == second, "a finished store is only compared"
    both = Overrides(like=str(tmp_path / "first"), spacing=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="like: found --spacing beside it"):
        build(BuildRequest("msd", tmp_path / "b", tmp_path / "third", workers=1, overrides=both))
