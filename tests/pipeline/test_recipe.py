"""Recipes are strict, every shipped one validates and builds, and every message names what is
wrong."""

from __future__ import annotations

import os
import re

import pytest
import torch
import typer
import yaml

from segfleet.core.errors import InputError
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.parts import Objective, build_network, check_recipe
from segfleet.pipeline.task import make_task
from segfleet.pipeline.training.schedule import learning_rate
from segfleet.preprocess.readers.base import open_reader, readers
from segfleet.preprocess.stores.manifest import Dataset, Manifest, Plan, load_manifest
from segfleet.sweeps.space.load import load_search

MINIMAL = {"name": "x", "model": {"name": "resenc_unet_3d"}, "stages": [{"epochs": 2, "lr": 1e-3}]}


def refused(document) -> str:
    with pytest.raises(InputError) as caught:
        recipes.parse(document)
    return str(caught.value)


def test_one_part_of_the_weights_may_stand_in_a_list():
    for said in ("all", ["all"], "encoder", ["encoder"]):
        later = {"epochs": 1, "lr": 1, "inherit": {"weights": said}}
        found = recipes.parse({**MINIMAL, "stages": [*MINIMAL["stages"], later]})
        assert found.stages[1].inherit.weights == (said if isinstance(said, str) else said[0])


def test_unknown_keys_and_illegal_values_are_all_named_at_once():
    wrong = {
        "modell": 1,
        "data": {"batch": -1, "augment": {"flop": 1}},
        "stages": [{"epochs": 2, "lr": 1, "schedule": "step"}],
    }
    message = refused({**MINIMAL, **wrong})
    assert "modell: unknown key; expected one of: name, seed, task, data, model" in message
    assert "data.batch: found -1. Input should be greater than 0" in message
    assert "data.augment.flop: unknown key; expected one of: flip, rotation" in message
    assert (
        "stages.0.schedule: found 'step'. Input should be 'constant', 'poly' or 'cosine'" in message
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": []}, "stages: found []"),
        ({"stages": [{"epochs": 1, "lr": float("nan")}]}, "stages.0.lr"),
        (
            {
                "stages": [
                    *MINIMAL["stages"],
                    {"epochs": 1, "lr": 1, "inherit": {"weights": ["all", "encoder"]}},
                ]
            },
            "all leaves nothing for the others to add",
        ),
        (
            {"data": {"batch": 3}, "engine": {"accumulate": 2}},
            "data.batch 3 must be a multiple of engine.accumulate 2",
        ),
        ({"engine": {"precision": "int8"}}, "engine.precision: found 'int8'"),
        ({"evaluation": {"overlap": 1.0}}, "evaluation.overlap: found 1.0"),
        ({"model": {}}, "model.name: missing"),
        ({"seed": 2**63}, "seed: found 9223372036854775808"),
        (
            {"evaluation": {"mirror": [5]}},
            "evaluation.mirror.0: found 5. Input should be less than or equal to 2",
        ),
        (
            {"evaluation": {"mirror": [1, 1]}},
            "evaluation.mirror: found [1, 1]. An axis stands twice",
        ),
        ({"data": {"augment": {"flip": [7]}}}, "data.augment.flip.0: found 7"),
        ({"data": {"augment": {"elastic_size": -5}}}, "data.augment.elastic_size: found -5"),
        (
            {"data": {"augment": {"scale_range": [0, 0]}}},
            "data.augment.scale_range.0: found 0. Input should be greater than 0",
        ),
        (
            {"data": {"augment": {"scale_range": [-1, -0.5]}}},
            "data.augment.scale_range.0: found -1",
        ),
        (
            {"data": {"augment": {"scale_range": [2, 1]}}},
            "data.augment.scale_range: found [2, 1]. The first value should not be greater",
        ),
        ({"optimizer": {"betas": [2, 3]}}, "optimizer.betas.0: found 2"),
        (
            {"optimizer": {"betas": [1.0, 1.0]}},
            "optimizer.betas.1: found 1.0. Input should be less than 1",
        ),
        ({"optimizer": {"betas": [0.9, -1]}}, "optimizer.betas.1: found -1"),
        ({"stages": [{"epochs": 1, "lr": 1, "power": -2}]}, "stages.0.power: found -2"),
    ],
)
def test_illegal_values(change, words):
    assert words in refused({**MINIMAL, **change})


def test_overrides():
    document = recipes.override(
        MINIMAL,
        ["stages.0.lr=3e-2", "data.patch=[8, 8, 8]", "data.augment=null", "model.options.width=4"],
    )
    recipe = recipes.parse(document)
    assert (
        recipe.stages[0].lr == 0.03
        and recipe.data.patch == (8, 8, 8)
        and recipe.data.augment is None
    )
    assert recipe.model.options == {"width": 4} and "options" not in MINIMAL["model"]
    index = "no index of a list of 1; expected 0 to 0"
    for bad, words in (
        ("lr", "expected key.path=value"),
        ("stages.7.lr=1", index),
        ("seed=[", "no YAML"),
    ):
        with pytest.raises(InputError, match=words.replace("[", r"\[")):
            recipes.override(MINIMAL, [bad])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["stages.0=5", "stages.0.lr=3"],
            "'stages.0.lr=3': stages.0 is 5, which has no keys below it",
        ),
        (
            ["evaluation.mirror=[1]", "evaluation.mirror.0.x=3"],
            "evaluation.mirror.0 is 1, which has no keys below it",
        ),
        (["stages.\u00b2.lr=1"], "no index of a list of 1"),
        (["model.options={[1]: 2}"], "is no text"),
    ],
)
def test_overrides_that_fit_nowhere(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        recipes.override(MINIMAL, changes)


def test_values_that_yaml_reads_otherwise_than_meant(tmp_path):
    path = tmp_path / "r.yaml"
    text = (
        "name: 2026-01-01\nmodel: {name: 1e5, options: {a: 1e-5, b: [-.5E+2, 1e, x1e3]}}\nstages: "
        "[{epochs: 1e1, lr: 1e-5}]\n"
    )
    path.write_text(text + "data: {split: 1e5}\n")
    recipe = recipes.load_recipe(
        str(path), ["model.options.c=3e-2", "stages.0.name=2026-01-02", "data.store=1e5"]
    )
    assert (recipe.name, recipe.model.name, recipe.data.split, recipe.data.store) == (
        "2026-01-01",
        "1e5",
        "1e5",
        "1e5",
    )
    assert recipe.model.options == {"a": 1e-5, "b": [-50.0, "1e", "x1e3"], "c": 0.03}
    assert (recipe.stages[0].name, recipe.stages[0].epochs, recipe.stages[0].lr) == (
        "2026-01-02",
        10,
        1e-5,
    )
    for wrong, words in (
        ("[1]: 1", "no text"),
        ("name: &a [*a]", "an alias"),
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match=words):
            recipes.load_recipe(str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["stages.1.freeze=[nosuch]"],
            "stages.1.freeze: no parameter name begins with 'nosuch'; roles: all, encoder, "
            "decoder, head, backbone; names begin with: down1",
        ),
        (["stages.0.freeze=['']"], "stages.0.freeze:  leaves nothing to train"),
        (["evaluation.mirror=[0]"], "evaluation.mirror: found [0], but the network is 2D"),
        (
            ["data.batch=1", "data.patch=[16,16]"],
            "unet_lite_standard: found one value of each channel at the layer ",
        ),
        (["engine.accumulate=2", "data.patch=[16,16]"], "data.batch 2 in 2 micro-batch(es)"),
    ],
)
def test_what_would_show_only_after_training_is_found_before(tiny_recipe, changes, words):
    folder = tiny_recipe(
        [
            {"epochs": 1, "lr": 1e-3, "freeze": ["inc"]},
            {"epochs": 1, "lr": 1e-3, "freeze": ["down1", "up4"]},
        ],
        batch=2,
    )
    sound = recipes.load_recipe(
        str(folder / "tiny.yaml"), ["evaluation.mirror=[2,1]", f"seed={2**63 - 1}"]
    )
    manifest = load_manifest(sound.data.store)
    check_recipe(sound, manifest)
    with pytest.raises(InputError, match=re.escape(words)):
        check_recipe(recipes.load_recipe(str(folder / "tiny.yaml"), changes), manifest)


def test_files(tmp_path):
    with pytest.raises(
        InputError,
        match="no file 'nope' and no shipped recipe of that name; shipped: .*hippocampus",
    ):
        recipes.load_recipe("nope")
    path = tmp_path / "r.yaml"
    path.write_text("a: [1")
    with pytest.raises(InputError, match="is no YAML document"):
        recipes.load_recipe(str(path))
    path.write_text("- 1")
    with pytest.raises(InputError, match="holds list, expected a mapping"):
        recipes.load_recipe(str(path))
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="is no YAML document"):
        recipes.load_recipe(str(path))


def manifest_for(recipe: recipes.Recipe, spec) -> Manifest:
    """A data set that fits a shipped recipe, as far as its network and loss can tell."""
    dims = 3 if spec.dims == (3,) else 2
    size = spec.paper_input
    patch = (1,) * (3 - dims) + tuple(size)
    foreground = {f"s{k}": k for k in range(1, max(2, spec.num_classes))}
    regions = {}
    if spec.num_classes == 2 and dims == 2:  # REC-UNet: two overlapping regions
        foreground, regions = {"a": 1, "b": 2}, {"any": (1, 2), "b": (2,)}
    dataset = Dataset(
        name="fit",
        reader="nnunet",
        dims=dims,
        channels=tuple("abcd"[: spec.in_channels]),
        labels={"background": 0, **foreground},
        regions=regions,
        region_order=(1, 2) if regions else (),
    )
    plan = Plan(
        target_spacing=(1.0, 1.0, 1.0), patch=patch, normalisation=("zscore",) * spec.in_channels
    )
    return Manifest(format="zarr", id="0", dataset=dataset, plan=plan, cases=())


def header_of(name: str) -> dict[str, list[str]]:
    """The comment above a shipped recipe: its first line as "", then the lines of every entry."""
    lines = (recipes.RECIPES / f"{name}.yaml").read_text().splitlines()
    found: dict[str, list[str]] = {"": [lines[0].removeprefix("# ")]}
    key = ""
    for line in (line for line in lines[1:] if line.startswith("#")):
        word, text = line[1:11].strip(), line[11:].strip()
        key = word or key
        found.setdefault(key, []).append(text)
    return found


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_shipped_recipe_validates_and_builds(name):
    from segfleet.models import registry

    header = header_of(name)
    assert len(header[""][0]) > 20 and {"data", "cost"} <= header.keys(), (
        "a header says what it is, on which data, at what cost"
    )
    recipe = recipes.load_recipe(name)
    spec = registry.spec(recipe.model.name)
    assert recipe.name == name and recipe.data.store
    manifest = manifest_for(recipe, spec)
    task = make_task(manifest.dataset, recipe.model.head)
    with torch.device("meta"):
        network = build_network(recipe, manifest, task)
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters > 1000
    objective = Objective(recipe, task)
    # it claims a published set-up: the published network, and everything a reader needs to judge
    # the claim
    if "paper" in header:
        assert {"expected", "differs"} <= header.keys()
        assert parameters == spec.parameters
        weights = recipe.loss.deep_supervision
        assert (
            weights == "nnunet" or objective.loss.level_weights(outputs(network, recipe)) == weights
        )


def outputs(network: torch.nn.Module, recipe: recipes.Recipe) -> int:
    """How many logits a network on the meta device gives in training."""
    with torch.device("meta"), torch.no_grad():
        channels = next(p for p in network.parameters() if p.ndim > 3).shape[1]
        found = network.train()(torch.empty(2, channels, *recipe.data.patch))
    return len(found) if isinstance(found, list | tuple) else 1


@pytest.mark.parametrize(
    "name", [name for name in recipes.recipe_names() if "paper" in header_of(name)]
)
def test_header_of_a_published_set_up_agrees_with_its_recipe(name):
    recipe, header = recipes.load_recipe(name), header_of(name)
    cost, commands = (
        " ".join(header["cost"]),
        [line for line in header["data"] if line.startswith("segfleet ")],
    )
    assert cost.startswith(
        " and ".join(str(stage.epochs) for stage in recipe.stages) + " epochs x "
    )
    steps = re.search(r"epochs x (about )?([\d,]+) steps x (\d+) ", cost)
    assert int(steps[3]) == recipe.data.batch
    for stage in recipe.stages:
        assert bool(steps[1]) == (stage.steps is None), (
            "steps that depend on the data are said to be an estimate"
        )
        assert stage.steps in (None, int(steps[2].replace(",", "")))
    made = [words for words in map(str.split, commands) if words[1] == "preprocess"]
    assert [words[words.index("--out") + 1] for words in made] == [recipe.data.store]
    assert made[0][2] in readers()
    if "--size" in made[0]:
        at = made[0].index("--size") + 1
        assert tuple(map(int, made[0][at : at + 2])) == recipe.data.patch
    for words in map(str.split, commands):
        assert words[1] not in ("train", "evaluate") or words[2] == name


@pytest.mark.parametrize(
    "name", [name for name in recipes.recipe_names() if "paper" in header_of(name)]
)
def test_header_commands_make_the_data_of_the_recipe(name, tmp_path):
    """Every command is legal; the layout it names brings the split, the channels and the structures
    that the recipe asks for."""
    from segfleet.cli.main import app
    from segfleet.models import registry
    from segfleet.preprocess.phantoms.phantom import PHANTOMS

    recipe, group = recipes.load_recipe(name), typer.main.get_command(app)
    splits = {recipe.data.split}
    for words in [line.split() for line in header_of(name)["data"] if line.startswith("segfleet ")]:
        command = group.get_command(None, words[1])
        given = command.make_context(words[1], words[2:]).params
        splits |= {
            change.partition("=")[2]
            for change in given.get("changes") or ()
            if change.startswith("data.split=")
        }
        if words[1] == "preprocess":
            layout, options = (
                given["name"],
                dict(option.split("=") for option in given["option"] or ()),
            )
            PHANTOMS[layout](tmp_path / "raw")
            reader = open_reader(layout, tmp_path / "raw", **options)
    assert splits <= {"kfold", "all", *reader.splits()}
    if layout not in ("msd", "nnunet"):  # these take any data set, and the phantom is another one
        spec, task = (
            registry.spec(recipe.model.name),
            make_task(reader.dataset(), recipe.model.head),
        )
        assert (len(reader.dataset().channels), task.channels) == (
            spec.in_channels,
            spec.num_classes,
        )
        made_for = recipe.data.made_for.dataset
        assert made_for in (reader.dataset().name, layout) or layout == "npy"


def test_every_key_has_a_description():
    schema = recipes.Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    missing = [
        key
        for section in sections
        for key, facts in section["properties"].items()
        if not facts.get("description")
    ]
    assert missing == []


def test_defaults_survive_a_round_trip():
    recipe = recipes.parse(MINIMAL)
    assert recipes.parse(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_learning_rates():
    def rates(total=10, **options):
        stage = recipes.Stage(epochs=1, lr=1.0, **options)
        return [learning_rate(stage, step, total) for step in range(total)]

    assert rates() == [1.0] * 10
    assert rates(warmup=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(schedule="poly") == [(1 - k / 10) ** 0.9 for k in range(10)]
    cosine = rates(schedule="cosine", floor=0.1)
    assert (
        cosine[0] == 1.0
        and abs(cosine[5] - 0.55) < 1e-12
        and cosine == sorted(cosine, reverse=True)
        and min(cosine) > 0.1
    )


def test_a_cosine_with_a_period_falls_and_rises_by_epochs():
    stage = recipes.Stage(epochs=300, lr=1e-3, schedule="cosine", period=50, floor=1e-5)
    by_epoch = [learning_rate(stage, 7 * epoch, 7 * 300) for epoch in range(300)]
    assert (
        by_epoch[0] == 1e-3
        and by_epoch[50] == pytest.approx(1e-5)
        and by_epoch[25] == pytest.approx((1e-3 + 1e-5) / 2)
    )
    assert by_epoch[:50] == sorted(by_epoch[:50], reverse=True) and by_epoch[50:101] == sorted(
        by_epoch[50:101]
    )
    assert by_epoch[100:200] == pytest.approx(by_epoch[:100]) and by_epoch[200:] == pytest.approx(
        by_epoch[:100]
    )
    whole = recipes.Stage(epochs=300, lr=1e-3, schedule="cosine", period=300, warmup=20)
    without = recipes.Stage(epochs=300, lr=1e-3, schedule="cosine", warmup=20)
    assert learning_rate(whole, 20, 600) == learning_rate(without, 20, 600) == 1e-3
    assert [learning_rate(whole, step, 600) for step in range(20)] == [
        learning_rate(without, step, 600) for step in range(20)
    ]


def test_tasks():
    def dataset(**changes):
        base = {
            "name": "d",
            "reader": "msd",
            "dims": 3,
            "channels": ("a",),
            "labels": {"background": 0, "x": 1, "y": 2},
        }
        return Dataset(**{**base, **changes})

    label = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    plain = make_task(dataset(ignore_label=3))
    assert plain.head == "softmax" and plain.channels == 3
    assert plain.target(label).tolist() == [[0, 1, 2, 0]] and plain.valid(label).tolist() == [
        [True, True, True, False]
    ]
    assert plain.labels(torch.eye(3)[:, :, None]).flatten().tolist() == [0, 1, 2]
    regions = make_task(dataset(regions={"whole": (1, 2), "core": (2,)}, region_order=(1, 2)))
    assert regions.head == "sigmoid" and regions.target(label)[0].tolist() == [
        [0, 1, 1, 0],
        [0, 0, 1, 0],
    ]
    assert regions.labels(
        torch.tensor([[0.2, 0.9, 0.9], [0.1, 0.2, 0.8]])[:, :, None]
    ).flatten().tolist() == [0, 1, 2]
    single = make_task(dataset(labels={"background": 0, "x": 5}))
    assert single.head == "sigmoid" and single.channels == 1
    assert make_task(dataset(labels={"background": 0, "x": 5}), "softmax").channels == 2
    assert make_task(dataset(labels={"background": 0, "x": 5}), "softmax").target(
        torch.tensor([[0, 5]])
    ).tolist() == [[0, 1]]
    with pytest.raises(InputError, match="overlapping regions, which need 'sigmoid'"):
        make_task(dataset(regions={"whole": (1, 2)}, region_order=(1,)), "softmax")


@pytest.mark.parametrize("load", [recipes.load_recipe, load_search])
def test_what_is_there_but_no_regular_file_is_called_so(load, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe or a device")):
        with pytest.raises(InputError, match=f"{path} is {kind}, expected a regular file"):
            load(str(path))
