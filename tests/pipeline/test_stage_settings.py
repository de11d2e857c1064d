"""A stage may say otherwise whatever its recipe says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline import identity, run, stage_data
from segfleet.pipeline.jobs import Stores, run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.parts import check_recipe
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import (
    OVERRIDES,
    Recipe,
    cut,
    override,
    parse,
    resolve,
    with_absolute_store,
)
from segfleet.pipeline.scoring.scored import seen_in_training
from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.stores.manifest import load_manifest


@pytest.fixture
def document(two_stages):
    return two_stages({}, {})


def recipe_of(document, *changes) -> Recipe:
    return with_absolute_store(parse(override(document, list(changes))))


def uids(recipe) -> list[str]:
    return identity.stage_uids(recipe, load_manifest(Path(recipe.data.store)))


def test_what_a_stage_does_not_say_is_the_recipes(document):
    recipe = recipe_of(
        document, "data.augment.rotation=0.5", "stages.0.data.augment.flip=[2]",
        "stages.0.optimizer.clip=1", "stages.0.data.batch=4", "stages.1.engine.precision=bf16",
        "stages.1.evaluation.overlap=0.25", "stages.0.seed=7",
    )  # fmt: skip
    first, second = resolve(recipe, 0), resolve(recipe, 1)
    assert (first.data.batch, second.data.batch) == (4, 2)
    assert first.data.augment.flip == (2,) and second.data.augment.flip is None
    assert first.data.augment.rotation == second.data.augment.rotation == 0.5
    assert (first.optimizer.clip, second.optimizer.clip) == (1, 12)
    assert (first.engine.precision, second.engine.precision) == ("fp32", "bf16")
    assert (first.evaluation.overlap, second.evaluation.overlap) == (0.5, 0.25)
    assert (first.seed, second.seed) == (7, 0)


def test_a_stage_may_say_everything(document):
    says = {
        "seed": 7,
        "task": "segment",
        "data": {"batch": 4},
        "model": {"options": {"width": 4}},
        "loss": {"name": "bce_dice"},
        "optimizer": {"clip": 1},
        "engine": {"precision": "bf16"},
        "evaluation": {"overlap": 0.25},
    }
    assert says.keys() == set(OVERRIDES)
    document["stages"][0] |= says
    document["stages"] = document["stages"][:1]
    found = resolve(recipe_of(document), 0)
    assert (found.seed, found.data.batch, found.loss.name) == (7, 4, "bce_dice")
    assert (found.optimizer.clip, found.engine.precision) == (1, "bf16")
    assert (found.evaluation.overlap, found.model.options) == (0.25, {"width": 4})


def test_options_belong_to_the_name_they_were_given_with(document):
    document["loss"] = {"name": "dice_ce", "options": {"dice_weight": 0.5}}
    recipe = recipe_of(document, "stages.0.loss.name=ss", "stages.1.loss.deep_supervision=[1.0]")
    assert resolve(recipe, 0).loss.options == {}
    assert resolve(recipe, 1).loss.options == {"dice_weight": 0.5}


def test_augmentation_of_one_stage_may_be_off_and_of_another_on(document):
    recipe = recipe_of(document, "data.augment=null", "stages.1.data.augment.rotation=1")
    assert resolve(recipe, 0).data.augment is None
    assert resolve(recipe, 1).data.augment.rotation == 1


def test_a_resolved_recipe_means_the_same_and_survives_its_file(document, tiny_store):
    other = tiny_store(dims=2, classes=1)
    recipe = recipe_of(
        document, f"stages.0.data.store={other}", "stages.0.data.batch=3", "stages.0.seed=1"
    )
    for index in (0, 1):
        again = resolve(recipe, index)
        assert [resolve(again, i).data for i in (0, 1)] == [resolve(recipe, i).data for i in (0, 1)]
        assert parse(json.loads(json.dumps(again.model_dump(mode="json")))) == again
        assert uids(again) == uids(recipe)
    assert resolve(resolve(recipe, 0)) == recipe


def test_equal_beginnings_are_shared_however_they_are_said(document, tiny_store):
    other = str(tiny_store(dims=2, classes=1))
    above = recipe_of(document, f"data.store={other}", "data.batch=4", "loss.name=bce_dice",
                      f"stages.1.data.store={document['data']['store']}", "stages.1.loss.name=auto",
                      "stages.1.data.batch=2")  # fmt: skip
    below = recipe_of(document, f"stages.0.data.store={other}", "stages.0.data.batch=4",
                      "stages.0.loss.name=bce_dice")  # fmt: skip
    assert uids(above) == uids(below) and above == below
    alone = recipe_of({**document, "stages": document["stages"][:1]}, f"data.store={other}",
                      "data.batch=4", "loss.name=bce_dice")  # fmt: skip
    assert uids(alone)[0] == uids(below)[0]
    assert uids(cut(below, 0)) == uids(below)[:1]


@pytest.mark.parametrize(
    "change",
    ["data.batch=4", "data.patch=[16,16]", "data.foreground=0.9", "data.augment=null", "seed=3",
     "loss.name=dice_ce", "loss.deep_supervision=[1.0]", "optimizer.clip=1", "optimizer.name=sgd",
     "engine.precision=bf16", "engine.accumulate=2", "model.options.width=8"],
)  # fmt: skip
def test_what_changes_a_stage_changes_its_uid_and_those_after_it_alone(document, change):
    plain, changed = uids(recipe_of(document)), uids(recipe_of(document, f"stages.1.{change}"))
    assert changed[0] == plain[0] and changed[1] != plain[1]
    first = uids(recipe_of(document, f"stages.0.{change}"))
    assert first[0] != plain[0] and first[1] != plain[1]


def test_what_changes_no_result_changes_no_uid(document):
    changes = ["stages.0.data.workers=1", "stages.0.evaluation.overlap=0.1", "stages.0.seed=0"]
    assert uids(recipe_of(document, *changes)) == uids(recipe_of(document))


def test_another_store_has_a_split_of_its_own(document, tiny_store):
    other = tiny_store(dims=2, classes=1)
    document["data"] |= {"split": "all", "made_for": {"dataset": "tiny"}}
    first = resolve(recipe_of(document, f"stages.0.data.store={other}"), 0).data
    assert (first.split, first.fold, first.made_for) == ("kfold", 0, None)
    said = resolve(
        recipe_of(document, f"stages.0.data.store={other}", "stages.0.data.split=all"), 0
    )
    assert said.data.split == "all"
    # the same store is the same split
    assert resolve(recipe_of(document, "stages.0.data.batch=4"), 0).data.split == "all"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.0.data.stoer=x", "stages.0.data.stoer: unknown key.*did you mean 'store'"),
        ("stages.0.data.batch=0", "stages.0.data.batch: found 0.*greater than 0"),
        ("stages.1.engine.accumulate=3", r"stages.1 \(second\): data.batch 2 must be a multiple"),
        ("stages.0.patience=1", "a stage with patience needs evaluation.every > 0"),
        ("stages.0.data.store=nowhere", r"stages.0 \(first\): store: .*nowhere holds no"),
        ("stages.0.data.split=x", r"stages.0 \(first\): data.split: found 'x'"),
        ("stages.1.data.fold=9", r"data.fold: found 9, expected 0 to 0"),
        (
            "stages.0.data.patch=[8,8,8,8]",
            r"stages.0 \(first\): data.patch: found .* expected 2 or 3 sizes",
        ),
        ("stages.1.loss.name=nothing", "loss.name: found 'nothing'"),
        ("stages.0.freeze=[nobody]", "stages.0.freeze: no parameter"),
    ],
)
def test_one_message_names_the_stage(document, change, words):
    with pytest.raises(InputError, match=f"(?s){words}") as caught:
        recipe = recipe_of(document, change)
        check_recipe(recipe, load_manifest(Path(recipe.data.store)))
    assert str(caught.value).count("stages.") <= 1 or "stages.0.freeze" in str(caught.value)


def test_moments_are_those_of_the_stage_before(document):
    """Of three stages; the last is trained by another optimizer, and takes none over."""
    first, second = document["stages"]
    moments = {"inherit": {"weights": "all", "optimizer": True}}
    last = {**second, "name": "last", "optimizer": {"name": "sgd"}}
    three = {**document, "stages": [first, {**second, **moments}, last]}
    assert len(recipe_of(three).stages) == 3
    assert [len(cut(recipe_of(three), index).stages) for index in range(3)] == [1, 2, 3]
    with pytest.raises(InputError, match="stages.2.inherit.optimizer: .* trained by adamw"):
        recipe_of({**document, "stages": [first, second, {**last, **moments}]})


def test_an_epoch_is_one_pass_over_the_training_cases(document):
    manifest = load_manifest(Path(document["data"]["store"]))
    cases = len(manifest.fold("kfold", 0)["train"])
    assert cases == 4
    for batch, steps in ((1, 4), (2, 2), (3, 2), (8, 1)):
        changes = [f"data.batch={batch}", "data.split=kfold", "stages.0.steps=null"]
        recipe = recipe_of(document, *changes, "stages.1.steps=7")
        assert stage_data.stage_steps(recipe, manifest) == [steps, 7]


def test_a_message_names_its_stage_once(document):
    stage = recipe_of(document).stages[0]
    for text, several, said in (
        ("seed: no", False, "seed: no"),
        ("seed: no", True, f"stages.0 ({stage.name}): seed: no"),
        ("stages.0.seed: no", True, "stages.0.seed: no"),
    ):
        assert stage_data.named(InputError(text), several, 0, stage) == said


def test_a_stage_without_a_store_is_named(document):
    store = document["data"].pop("store")
    with pytest.raises(InputError, match=r"stages\.0\.data\.store: missing"):
        recipe_of(document, f"stages.1.data.store={store}")


def work(recipe, root, kind=Train, **more):
    job = kind(recipe=recipe.model_dump(mode="json"), root=root, **more)
    run_job(job, Ranks(torch.device("cpu")), StopRequest())
    return run.stage_folders(root, recipe, Stores().manifest)


def test_stages_train_on_their_own_stores_and_the_run_is_scored_on_the_last(
    document, tiny_store, tmp_path, monkeypatch
):
    other = tiny_store(dims=2, cases=4)
    recipe = recipe_of(
        document, f"stages.0.data.store={other}", "stages.0.data.patch=[16,16]",
        "stages.0.loss.name=dice_ce", "stages.0.optimizer.name=sgd", "stages.0.steps=null",
        "evaluation.every=1",
    )  # fmt: skip
    folders = work(recipe, tmp_path / "runs")
    scored = json.loads((folders[-1].path / "evaluation.json").read_text())
    assert scored["scored"]["store"] == load_manifest(Path(document["data"]["store"])).id
    assert folders[0].done()["steps"] == 1  # 2 training cases there, a batch of 2
    assert run.open_run(folders[-1].path)[0] == recipe
    first = next(line for line in (folders[0].path / "events.jsonl").read_text().splitlines()
                 if '"validation"' in line)  # fmt: skip
    assert json.loads(first)["dice"] is not None
    # the same beginning trained alone, said in other words: the same folder, the same bits
    alone = recipe_of(
        {**document, "stages": document["stages"][:1]}, f"data.store={other}",
        "stages.0.steps=null",
        "data.patch=[16,16]", "loss.name=dice_ce", "optimizer.name=sgd",
    )  # fmt: skip
    there = work(alone, tmp_path / "alone")[0]
    assert there.path.name == folders[0].path.name
    mine, its = folders[0].final().tensors("weights"), there.final().tensors("weights")
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_cases_seen_by_an_earlier_stage_are_told(document, tiny_store):
    document["stages"][0]["data"] = {"split": "all"}
    recipe = recipe_of(document)
    manifest = load_manifest(Path(recipe.data.store))
    ids = manifest.fold("kfold", 0)["val"]
    assert seen_in_training(ids, recipe, manifest)["cases"] == len(ids)
    document["stages"][0]["data"] = {"batch": 1}
    assert seen_in_training(ids, recipe_of(document), manifest)["cases"] == 0


def test_a_run_keeps_what_its_store_said(tiny_store, tmp_path):
    """Data set and plan, without cases; written anew only where they are others."""
    manifest = load_manifest(tiny_store(dims=2))
    run.note_data(tmp_path / "run", manifest)
    file = tmp_path / "run" / run.DATA
    kept, before = json.loads(file.read_text()), file.stat().st_ino
    assert kept["dataset"] == manifest.dataset.model_dump(mode="json") and kept["cases"] == []
    run.note_data(tmp_path / "run", manifest)
    assert file.stat().st_ino == before, "left as it is"
    dataset = manifest.dataset.model_copy(update={"name": "another"})
    run.note_data(tmp_path / "run", manifest.model_copy(update={"dataset": dataset}))
    assert json.loads(file.read_text())["dataset"]["name"] == "another"


def test_a_uid_is_the_hash_of_its_parent_and_of_what_was_said(document, tmp_path):
    """By hand, as the docstring says it; settings that came later count where they are said."""
    recipe = recipe_of(document)
    manifest = load_manifest(Path(recipe.data.store))
    parent = None
    for index, uid in enumerate(uids(recipe)):
        facts = identity.stage_facts(resolve(recipe, index), lambda own: manifest, index)
        text = json.dumps([parent, facts], sort_keys=True)
        assert uid == hashlib.sha256(text.encode()).hexdigest()[:12]
        later = {"unfreeze_at", "freeze_statistics", "layer_decay", "rates", "anchor", "lora"}
        assert later.isdisjoint(facts["stage"]) and facts["stage"]["lr"]
        parent = uid
    identity.note_identity(tmp_path, recipe, manifest, 0)
    noted = json.loads((tmp_path / "identity.json").read_text())
    facts = identity.stage_facts(resolve(recipe, 0), lambda own: manifest, 0)
    train = hashlib.sha256(json.dumps(facts["train"]).encode()).hexdigest()[:16]
    assert noted["facts"] == json.loads(json.dumps({**facts, "train": train}))
    assert identity.differences(recipe, manifest, 0, tmp_path) == []
    for wrong in ({"name": "x"}, {"facts": [1]}):
        (tmp_path / "identity.json").write_text(json.dumps(wrong))
        assert identity.differences(recipe, manifest, 0, tmp_path) is None
