"""Rates, freezing, thawing and anchors of a stage."""

from __future__ import annotations

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline import run
from segfleet.pipeline.engines.base import Setup
from segfleet.pipeline.engines.common import rate_factors, trainable
from segfleet.pipeline.engines.ddp import Engine
from segfleet.pipeline.jobs import Stores
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Stage, override, parse, with_absolute_store

LITE = registry.spec("unet_lite_standard")


@pytest.fixture
def document(two_stages):
    return two_stages({}, {"epochs": 3, "lr": 1e-2}, save_minutes=1000)


def weights(folder, group="weights"):
    return folder.final().tensors(group)


def moved(folders) -> set[str]:
    before, after = map(weights, folders)
    return {name for name in after if not torch.equal(before[name], after[name])}


def network():
    return registry.build_model(LITE.name, in_channels=1, num_classes=1, options={"width": 4})


def stage(**facts):
    return Stage(epochs=1, lr=0.1, **facts)


@pytest.mark.parametrize("name", list(registry.specs()))
@pytest.mark.parametrize("role", ["encoder", "decoder", "head", "backbone"])
def test_roles_fit_every_architecture(name, role):
    spec = registry.spec(name)
    with torch.device("meta"):
        model = registry.build_model(
            name, in_channels=spec.in_channels, num_classes=spec.num_classes, options=spec.reduced
        )
    chosen = trainable(model, stage(freeze=[role]), spec)
    rest = dict(model.named_parameters()).keys() - chosen.keys()
    assert chosen and rest
    assert all(registry.belongs(parameter, role, spec) for parameter in rest)


def test_layer_decay_is_a_power_of_the_layers_behind():
    factors = rate_factors(network(), stage(layer_decay=0.5), LITE)
    order = ["inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4"]
    found = {name.split(".")[0]: factor for name, factor in factors.items()}
    assert found == {"outc": 1.0} | {part: 0.5 ** (9 - i) for i, part in enumerate(order)}


def test_of_several_rates_that_fit_the_last_counts():
    factors = rate_factors(network(), stage(rates={"encoder": 0.1, "down1": 0.0, "head": 2}), LITE)
    found = {name.split(".")[0]: factor for name, factor in factors.items()}
    assert found["inc"] == 0.1 and found["down1"] == 0 and found["outc"] == 2 and found["up1"] == 1


def test_a_rate_of_a_part_moves_that_part_as_such_a_rate_moves_all(document, tmp_path, go):
    """Adam's first step is as long as its rate, whatever the gradient."""
    document["optimizer"] = {"weight_decay": 0, "clip": 0, "name": "adam"}
    document["stages"][1] |= {"epochs": 1, "steps": 1, "rates": {"encoder": 0.01, "down2": 0}}
    before, after = map(weights, go(document, tmp_path))
    step = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert step["outc.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert step["inc.0.weight"] == pytest.approx(1e-4, rel=1e-3)
    assert all(step[name] == 0 for name in step if name.startswith("down2") and "weight" in name)


@pytest.mark.parametrize("statistics", [True, False])
def test_frozen_batch_norms_keep_their_statistics_unless_asked_otherwise(
    document, tmp_path, statistics, go
):
    document["stages"][1] |= {"freeze": ["encoder"], "freeze_statistics": statistics}
    found = {name for name in moved(go(document, tmp_path)) if name.startswith(("inc", "down"))}
    assert bool(found) != statistics
    assert all("running" in name or "num_batches" in name for name in found)


def test_validation_does_not_wake_frozen_statistics(document, tmp_path):
    recipe = with_absolute_store(parse(document))
    model = network()
    setup = Setup(model=model, loss=torch.nn.Identity(), recipe=recipe,
                  stage=stage(freeze=["encoder"]), ranks=Ranks(torch.device("cpu")))  # fmt: skip
    engine = Engine(setup)
    with engine.evaluation():
        pass
    modes = {name: m.training for name, m in model.named_modules() if hasattr(m, "running_mean")}
    assert not any(modes[name] for name in modes if name.startswith(("inc", "down")))
    assert all(modes[name] for name in modes if name.startswith("up"))


def test_what_is_frozen_thaws_and_a_stopped_run_ends_in_the_same_bits(document, tmp_path, go):
    document["stages"][1] |= {"freeze": ["backbone"], "unfreeze_at": 2}
    folders = go(document, tmp_path / "whole")
    steps = weights(folders[1], "optimizer")
    assert steps["outc.weight.step"] == 6 and steps["inc.0.weight.step"] == 2
    for stop in (3, 6, 7):  # while frozen, at the thaw, after it
        root = tmp_path / str(stop)
        go(document, root, stop_after=stop)
        again = go(document, root)
        for group in ("weights", "optimizer"):
            one, two = weights(folders[1], group), weights(again[1], group)
            assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_frozen_for_the_whole_stage_is_another_result(document, tmp_path, go):
    document["stages"][1] |= {"freeze": ["backbone"]}
    assert moved(go(document, tmp_path)) == {"outc.weight", "outc.bias"}


def test_anchored_weights_stay_near_and_resume_to_the_same_bits(document, tmp_path, go):
    document["optimizer"] = {"name": "sgd", "momentum": 0, "weight_decay": 0.5, "clip": 0}
    document["stages"][1]["inherit"] = {"head": "new"}

    def distance(folders):
        before, after = map(weights, folders)
        return sum(float((after[n] - before[n]).square().sum()) for n in before
                   if "weight" in n and "outc" not in n)  # fmt: skip

    far, near = distance(go(document, tmp_path / "0")), None
    changes = ["stages.1.anchor=20"]
    folders = go(document, tmp_path / "1", *changes)
    near = distance(folders)
    assert near < far / 4
    go(document, tmp_path / "2", *changes, stop_after=5)
    again = go(document, tmp_path / "2", *changes)
    one, two = weights(folders[1]), weights(again[1])
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_the_anchor_is_the_gradient_of_half_the_squared_distance(document):
    """One step of plain SGD by hand: p - lr * (g + a (p - p0))."""
    document["optimizer"] = {"name": "sgd", "momentum": 0, "weight_decay": 0, "clip": 0}
    recipe, model = with_absolute_store(parse(document)), torch.nn.Linear(1, 1, bias=False)
    start = {"weight": torch.tensor([[1.0]])}
    model.weight.data.fill_(3.0)
    setup = Setup(model=model, loss=lambda out, label: out.sum(), recipe=recipe,
                  stage=stage(anchor=0.5), ranks=Ranks(torch.device("cpu")), anchors=start)  # fmt: skip
    Engine(setup).step(iter([(torch.tensor([[2.0]]), None)]), 0.1)
    assert model.weight.item() == pytest.approx(3.0 - 0.1 * (2.0 + 0.5 * 2.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["stages.1.freeze=[nobody]"], "stages.1.freeze: no parameter .* roles: all, encoder"),
        (["stages.1.rates.nobody=1"], "stages.1.rates: no parameter name begins with 'nobody'"),
        (["stages.1.unfreeze_at=1"], "stages.1.unfreeze_at: nothing is frozen"),
        (["stages.0.anchor=1"], "stages.0.anchor: there is nothing to be near to"),
        (["stages.1.layer_decay=0"], "stages.1.layer_decay: found 0"),
        (["stages.1.freeze=[all]"], "leaves nothing to train"),
    ],
)
def test_bad_values_are_one_message(document, tmp_path, changes, words, go):
    with pytest.raises(InputError, match=f"(?s){words}"):
        go(document, tmp_path, *changes)


def test_defaults_change_no_uid_and_values_do(document):
    def uid(*changes):
        recipe = with_absolute_store(parse(override(document, list(changes))))
        return run.stage_uids(recipe, Stores().manifest)[1]

    plain, frozen = uid(), uid("stages.1.freeze=[encoder]")
    assert plain == uid("stages.1.layer_decay=1", "stages.1.freeze_statistics=false")
    others = [
        frozen, uid("stages.1.freeze=[encoder]", "stages.1.freeze_statistics=false"),
        uid("stages.1.freeze=[encoder]", "stages.1.unfreeze_at=1"), uid("stages.1.layer_decay=0.9"),
        uid("stages.1.rates.head=2"), uid("stages.1.anchor=1"),
    ]  # fmt: skip
    assert len({plain, *others}) == 7
