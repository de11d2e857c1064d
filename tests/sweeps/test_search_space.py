"""Search spaces: axes, draws, and one clear message for every mistake."""

from __future__ import annotations

import math

import pytest

from segfleet.core.errors import InputError
from segfleet.core.settings import loads
from segfleet.pipeline.recipe import load_recipe
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.space.load import load_search, parse_search, space_names
from segfleet.sweeps.space.plan import (
    SPACE,
    foreign,
    make_plan,
    prepare_folder,
    unplanned,
    with_stores,
)
from segfleet.sweeps.space.tree import StageTree


def test_a_grid_is_the_product_of_its_axes_and_replicates(search):
    made = search(seeds=[0, 1])
    points = made.points()
    assert len(points) == 12 and len({str(point) for point in points}) == 12
    trials = made.trials(points[-1])
    assert [trial.recipe.seed for trial in trials] == [0, 1]
    assert trials[0].point == {
        "model.name": "unet_lite_depthwise",
        "stages.0.lr": 1e-3,
        "stages.1.lr": 1e-4,
    }
    recipe = trials[0].recipe
    assert recipe.model.name == "unet_lite_depthwise" and [stage.lr for stage in recipe.stages] == [
        1e-3,
        1e-4,
    ]
    assert recipe.model.options == {"width": 4}


def test_keys_that_change_together_and_whole_sections(search):
    axes = {
        "model.name, data.patch": [["unet_lite_standard", [16, 16]], ["unext", [32, 32]]],
        "loss": [{"name": "dice_ce"}, {"name": "auto"}],
        "model.options.width": [4, 8],
    }
    made = search(axes=axes, stages=None)
    recipes = [made.trials(point)[0].recipe for point in made.points()]
    assert len(recipes) == 8
    pairs = {(recipe.model.name, recipe.data.patch) for recipe in recipes}
    assert pairs == {("unet_lite_standard", (16, 16)), ("unext", (32, 32))}
    assert {recipe.loss.name for recipe in recipes} == {"dice_ce", "auto"}
    assert {recipe.model.options["width"] for recipe in recipes} == {4, 8}


def test_random_draws_repeat_stay_inside_and_fork(search):
    made = search(
        axes={"optimizer.weight_decay": {"loguniform": [1e-5, 1e-1]},
              "data.foreground": {"uniform": [0.2, 0.6]}},
        search="random", forks=3, budget={"trials": 60},
    )  # fmt: skip
    points = made.points()
    assert points == made.points() and len(points) == 60
    decays = {point["optimizer.weight_decay"] for point in points}
    assert len(decays) >= 20 and all(1e-5 <= value <= 1e-1 for value in decays)
    # even on a log scale
    assert 0.2 < sum(math.log10(value) < -3 for value in decays) / len(decays) < 0.8
    assert all(0.2 <= point["data.foreground"] <= 0.6 for point in points)
    early = [(point["optimizer.weight_decay"], point["stages.0.lr"]) for point in points]
    assert len(set(early)) < len(early)  # forks share the rest


def test_freeze_is_an_axis_only_as_a_list_of_lists(search):
    stages = [{"epochs": 1, "lr": 1e-3}, {"epochs": 1, "lr": [1e-3, 1e-4], "freeze": ["down"]}]
    assert [axis.label for axis in search(axes={}, stages=stages).axes] == ["stages.1.lr"]
    stages[1]["freeze"] = [[], ["down"]]
    made = search(axes={}, stages=stages)
    assert {made.trials(point)[0].recipe.stages[1].freeze for point in made.points()} == {
        (),
        ("down",),
    }


def test_numbers_that_yaml_reads_as_text_are_numbers(space, tmp_path):
    text = (
        "{axes: {optimizer.weight_decay: {loguniform: [1e-5, 1E-2]}}, stages: [{epochs: 1, lr: "
        "[1e-3, 3e-4]}], search: random}"
    )
    points = parse_search({**space, **loads(text), "budget": {"trials": 3}}).points()
    assert all(
        1e-5 < point["optimizer.weight_decay"] < 1e-2 and point["stages.0.lr"] in (1e-3, 3e-4)
        for point in points
    )
    joint = parse_search(
        {**space, "axes": {"loss, optimizer.clip": [[{"name": "dice_ce"}, 1e1]]}}
    ).points()[0]
    assert joint["loss, optimizer.clip"] == [{"name": "dice_ce"}, 10.0]
    with pytest.raises(InputError, match="a value stands twice"):
        parse_search({**space, "axes": {"optimizer.clip": [1e-3, 0.001]}})


PBT = {"scheduler": "pbt", "axes": {}, "stages": [{"epochs": 4, "lr": [1e-3, 1e-4]}]}
MISTAKES = [
    ({"axis": {}}, "axis: unknown key; expected one of: name, base, axes"),
    (
        {"budget": {"trails": 3}},
        "budget.trails: unknown key; expected one of: trials, epochs, hours",
    ),
    (
        {"axes": {"model.nme": ["a"]}},
        "axis model.nme: 'nme' is an unknown key; expected one of: name, options, ",
    ),
    (
        {"axes": {"modell": ["a"]}},
        "'modell' is an unknown key; expected one of: name, seed, task, data",
    ),
    ({"axes": {"stages.first.lr": [1]}}, "found 'first', expected the number of a stage"),
    (
        {"axes": {"stages.5.lr": [1]}},
        "stages.5.lr: '5' is no index of a list of 2; expected 0 to 1",
    ),
    (
        {"axes": {"model.name": []}},
        "axis model.name: found [], expected a list of at least one value",
    ),
    (
        {"axes": {"seed": {"log": [1, 2]}}},
        "found 'log', expected one of: grid, choice, uniform, loguniform",
    ),
    ({"axes": {"stages.0.lr": [1, 1]}}, "a value stands twice"),
    (
        {"axes": {"data.fold": [0, 1]}},
        "data.fold would rank folds against each other, not recipes; list them under `folds:`",
    ),
    ({"axes": {"data.fold, stages.0.lr": [[0, 1], [1, 2]]}}, "list them under `folds:`"),
    ({"axes": {"data": [{"batch": 2, "fold": 1}, {"batch": 4}]}}, "list them under `folds:`"),
    ({"axes": {"data.split": ["kfold", "all"]}}, "would rank splits against each other"),
    ({"axes": {"stages.0.lr": [1, 2]}}, "'stages.0.lr' is an axis twice"),
    ({"axes": {"optimizer.clip": {"uniform": [3, 1]}}}, "expected [low, high]"),
    ({"axes": {"optimizer.clip": {"uniform": [1, 3]}}}, "'uniform' has no grid"),
    ({"axes": {"optimizer.name": ["adamw", "lion"]}}, "optimizer.name: found 'lion'"),
    ({"search": "random"}, "needs budget.trials"),
    (
        {"budget": {"epochs": 119}},
        "budget.epochs is 119, less than one trial: the shortest takes 120 epochs",
    ),
    ({"scheduler": "asha"}, "evaluation.every of the base recipe: found 0"),
    ({"scheduler": "pbt"}, "pbt needs a recipe of one stage"),
    ({"seeds": [1], "axes": {"seed": [1, 2]}}, "list them under `seeds:`"),
    ({"seeds": [2, 1, 2]}, "seeds: found 2 twice in [2, 1, 2]"),
    ({"seeds": [0, 0]}, "seeds: found 0 twice"),
    ({"folds": [1, 1]}, "folds: found 1 twice"),
    ({"seeds": [0, -1]}, "seeds.1: found -1"),
    ({"forks": 3}, "forks: found 3 with search 'grid'"),
    ({**PBT, "seeds": [0, 1]}, "seeds: found [0, 1]; pbt trains one population"),
    ({**PBT, "folds": [0, 1]}, "folds: found [0, 1]; pbt trains one population"),
    (
        {**PBT, "axes": {"stages.0.epochs": [2, 4]}},
        "stages.0.epochs: pbt sets it for every generation",
    ),
    (
        {**PBT, "axes": {"stages.0.steps, stages.0.warmup": [[2, 0], [4, 1]]}},
        "keys that change together cannot be mutated by pbt",
    ),
    ({"axes": {"engine.name": ["ddp", "deepspeed"]}}, "axis engine.name: no stage reads it"),
    ({"axes": {"optimizer.momentum": {"grid": [0.9, 0.8]}}}, "optimizer.momentum: no stage reads"),
    ({"axes": {"evaluation.overlap": [0.25, 0.5]}}, "axis evaluation.overlap: no stage reads it"),
    ({"name": "a b"}, "name: found 'a b'"),
    ({"name": ".."}, "name: found '..'"),  # its folder would be that of all runs
    ({"name": "."}, "name: found '.'"),
    ({"name": "-x"}, "name: found '-x'"),
    ({"name": "a\n"}, "name: found 'a\\n'"),
    ({"name": "x" * 101}, "name: found 'xxx"),
    ({"base": "nope"}, "no shipped recipe of that name"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_gets_one_message(space, change, words, tmp_path):
    with pytest.raises(InputError) as caught:
        make_plan(parse_search({**space, **change}), tmp_path)
    assert words in str(caught.value)


def test_a_network_that_does_not_fit_is_found_before_anything_runs(search, tmp_path):
    with pytest.raises(InputError, match="at model.name=unet_lite_se, .*divides the width by 16"):
        make_plan(search(axes={"model.name": ["unet_lite_standard", "unet_lite_se"]}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_odd_is_said(search, tmp_path):
    def warnings(**changes):
        return " / ".join(make_plan(search(**changes), tmp_path).warnings)

    assert warnings() == ""
    idle = {"optimizer.name, optimizer.momentum": [["sgd", 0.9], ["adamw", 0.9], ["adamw", 0.8]]}
    assert "does not change what is trained" in warnings(axes=idle)
    falling = [{"epochs": [2, 4], "steps": 1, "lr": 1e-3, "schedule": "cosine"}]
    assert "lengths of a cosine schedule have no common beginning" in warnings(
        axes={}, stages=falling
    )
    drawn = {
        "axes": {"optimizer.clip": {"uniform": [1, 3]}},
        "search": "random",
        "budget": {"trials": 3},
    }
    assert "optimizer.clip is drawn anew for every trial; set forks" in warnings(**drawn)
    assert "there is one stage" in warnings(
        axes={}, stages=[{"epochs": 2, "lr": [1e-3, 1e-4], "schedule": "poly"}]
    )
    assert "keeps the first 5 of 12 trials" in warnings(budget={"epochs": 300})
    assert "keeps the first 4 points" in warnings(budget={"trials": 4})


def test_an_axis_that_only_another_one_makes_count_is_read(search, tmp_path):
    axes = {"optimizer.momentum": [0.9, 0.8], "optimizer.name": ["adamw", "sgd"]}
    assert len(make_plan(search(axes=axes), tmp_path).trials) == 24


def test_a_folder_belongs_to_one_space(search, tmp_path):
    prepare_folder(make_plan(search(), tmp_path), [])
    assert foreign(make_plan(search(), tmp_path)) is None
    with pytest.raises(InputError, match=r"belongs to another space .*differ in: seeds\)"):
        prepare_folder(make_plan(search(seeds=[3]), tmp_path), [])


@pytest.mark.parametrize("left", [b"", b"\0\0\0", b'{"space": [], "code": 3, "base', b"[1]"])
def test_a_damaged_note_of_a_space_is_written_anew(search, tmp_path, capsys, left):
    plan = make_plan(search(), tmp_path)
    prepare_folder(plan, [])
    whole = (plan.folder / SPACE).read_bytes()
    (plan.folder / SPACE).write_bytes(left)
    prepare_folder(make_plan(search(), tmp_path), [])
    assert (plan.folder / SPACE).read_bytes() == whole
    assert f"{plan.folder / SPACE} is damaged" in capsys.readouterr().err


def test_a_space_may_grow_and_must_not_change(search, space, tmp_path):
    def stages(first=(1e-2, 1e-3), second=(1e-3, 1e-4), **more):
        rates = {"lr": list(first)}, {"lr": list(second), "inherit": "weights+optimizer"}
        return [{"epochs": 5, **rates[0], **more}, {"epochs": 1, **rates[1]}]

    def fault(**changes):
        return foreign(make_plan(search(**{"axes": {}, "stages": stages(), **changes}), tmp_path))

    small = make_plan(search(axes={}, stages=stages(), seeds=[0], budget={"trials": 3}), tmp_path)
    prepare_folder(small, [])
    assert fault(seeds=[0, 1], budget={"trials": 4}) is None
    assert fault(seeds=[0], budget={}) is None
    assert fault(seeds=[0], stages=stages(first=(1e-2, 5e-3, 1e-3))) is None
    assert fault(seeds=[0], stages=stages(second=(1e-4, 1e-3, 1e-5))) is None
    assert "differ in: seeds)" in fault(seeds=[1])
    assert "differ in: stages.0.lr: was [0.01, 0.001], is [0.01])" in fault(
        seeds=[0], stages=stages(first=(1e-2,))
    )
    assert "stages.0.warmup: was not there, is 1)" in fault(seeds=[0], stages=stages(warmup=1))
    other = fault(seeds=[0], axes={"data.batch": [2, 4]})
    assert "axes.data.batch: was not there, is [2, 4])" in other and "warm_start: [tiny]" in other
    assert fault(seeds=[0], objective=["nsd", "gpu_hours"], constraints=["hd95 <= 9"]) is None
    seeded = fault(seeds=[0], base={**space["base"], "seed": 7})
    assert "differ in: base.seed: was not there, is 7)" in seeded
    random = fault(seeds=[0], search="random", budget={"trials": 3})
    assert "search" in random
    # the same below a section of a stage, where a list may also be one value
    deep = {"data": {"cases": [1, 2], "patch": [32, 32]}, "rates": {"encoder": [0.1, 1.0]}}
    name = {"name": "deep", "axes": {}, "seeds": [0]}
    prepare_folder(make_plan(search(**name, stages=stages(**deep)), tmp_path), [])
    for more, grown in (
        ({"data": {"cases": [1, 2, 3], "patch": [32, 32]}}, True),
        ({"rates": {"encoder": [0.1, 1.0, 0.5]}}, True),
        ({"data": {"cases": [2], "patch": [32, 32]}}, False),
        ({"data": {"cases": [1, 2], "patch": [32, 32, 32]}}, False),
        ({"rates": {"encoder": [0.1]}}, False),
        ({"rates": {"decoder": [0.1, 1.0]}}, False),
    ):
        plan = unplanned(search(**name, stages=stages(**{**deep, **more})), tmp_path)
        assert (foreign(plan) is None) == grown, more
    # what was trained counts: the same stages, and more
    larger = make_plan(
        search(axes={}, stages=stages(first=(1e-2, 5e-3, 1e-3)), seeds=[0]), tmp_path
    )
    assert small.tree.nodes.keys() < larger.tree.nodes.keys()


def test_shipped_spaces_plan(tiny_store, tmp_path):
    """Every shipped space, with its header's epochs, on a store of its kind: every network builds
    and takes the patch."""
    expected = {
        "rec_unet_two_stage": (12, 640, 1440),
        "all_architectures_2d": (114, 3420, 4560),
        "e2mi_seg_3d": (16, 2400, 5600),
    }
    assert set(space_names()) == set(expected)
    for name, (trials, shared, naive) in expected.items():
        store = tiny_store(dims=3 if "3d" in name else 2)
        search, manifest = load_search(name, [f"data.store={store}"]), load_manifest(store)
        made = [trial for point in search.points() for trial in search.trials(point)]
        made = [
            type(trial)(number=i, point=trial.point, recipe=trial.recipe)
            for i, trial in enumerate(with_stores(made))
        ]
        tree = StageTree(made, lambda _, manifest=manifest: manifest)
        assert (len(tree.trials), tree.shared_epochs, tree.naive_epochs) == (trials, shared, naive)
    plan = make_plan(
        load_search(
            "rec_unet_two_stage",
            [f"data.store={tiny_store(dims=2)}", "data.patch=[32,32]", "data.made_for=null"],
        ),
        tmp_path,
    )
    assert plan.tree.naive_epochs / plan.tree.shared_epochs == 2.25 and not plan.warnings


def test_all_2d_networks_are_in_the_shipped_space():
    from segfleet.models.registry import specs

    listed = load_search("all_architectures_2d").space.axes["model.name"]
    assert sorted(listed) == sorted(name for name, spec in specs().items() if spec.dims == (2,))
    assert load_recipe("rec_unet_lits_tumour").stages[0].epochs == 100
