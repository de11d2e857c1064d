"""Rates, freezing, thawing and anchors of a stage."""

from __future__ import annotations

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline import identity
from segfleet.pipeline.engines.base import Setup
from segfleet.pipeline.engines.common import rate_factors, trainable
from segfleet.pipeline.engines.ddp import Engine
from segfleet.pipeline.jobs import Stores
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import override, parse, with_absolute_store
from segfleet.pipeline.stage import Stage

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
    if role == "decoder" and name.startswith("primus"):  # a head of a few layers is all it has
        with pytest.raises(InputError, match="no parameter name begins with 'decoder'"):
            trainable(model, stage(freeze=[role]), spec)
        return
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
                  stage=stage(anchor=0.5), ranks=Ranks(torch.device("cpu")),
                  anchors=start)  # fmt: skip
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
        (["stages.0.lora.rank=2"], "stages.0.lora: there is nothing to adapt"),
        (["stages.1.lora.rank=2", "stages.1.anchor=1"], "stages.1.anchor: does not go with lora"),
        (["stages.1.lora.rank=999"], "stages.1.lora.rank: found 999, but no layer"),
        (["stages.1.lora.rank=2", "engine.name=deepspeed"], "stages.1.lora: found engine.name"),
    ],
)
def test_bad_values_are_one_message(document, tmp_path, changes, words, go):
    with pytest.raises(InputError, match=f"(?s){words}"):
        go(document, tmp_path, *changes)


def test_defaults_change_no_uid_and_values_do(document):
    def uid(*changes):
        recipe = with_absolute_store(parse(override(document, list(changes))))
        return identity.stage_uids(recipe, Stores().manifest)[1]

    plain, frozen = uid(), uid("stages.1.freeze=[encoder]")
    assert plain == uid("stages.1.layer_decay=1", "stages.1.freeze_statistics=false")
    others = [
        frozen, uid("stages.1.freeze=[encoder]", "stages.1.freeze_statistics=false"),
        uid("stages.1.freeze=[encoder]", "stages.1.unfreeze_at=1"), uid("stages.1.layer_decay=0.9"),
        uid("stages.1.rates.head=2"), uid("stages.1.anchor=1"), uid("stages.1.lora.rank=2"),
        uid("stages.1.lora.rank=3"),
    ]  # fmt: skip
    assert len({plain, *others}) == 9


def test_rates_of_another_order_are_another_stage_where_the_order_counts(document):
    """Of several that fit the last counts; apart from that, equal stages are shared. One part is
    the same in a list or not."""

    def uid(stage):
        said = {**document, "stages": [document["stages"][0], {**document["stages"][1], **stage}]}
        return identity.stage_uids(with_absolute_store(parse(said)), Stores().manifest)[1]

    def turned(rates):
        return [uid({"rates": dict(pairs)}) for pairs in (rates, rates[::-1])]

    for rates in ([("down1", 0.1), ("encoder", 1.0)], [("down1", 1.0), ("down1.maxpool", 0.1)]):
        assert len(set(turned(rates))) == 2, rates
    for rates in ([("encoder", 0.1), ("head", 2.0)], [("down1", 0.1), ("down2", 2.0)]):
        assert len(set(turned(rates))) == 1, rates
    alone = [uid({"inherit": {"weights": weights}}) for weights in ("encoder", ["encoder"])]
    assert alone[0] == alone[1] != uid({})
    assert uid({"inherit": {"weights": ["all"]}}) == uid({})


def ranks_of(before, after) -> dict[str, int]:
    """Of every weight that moved the rank of what was added."""
    found = {}
    for name, value in after.items():
        off = (value - before[name]).double()
        if value.ndim > 1 and off.abs().max() > 0:
            sizes = torch.linalg.svdvals(off.flatten(1))
            found[name] = int((sizes > 1e-4 * sizes[0]).sum())
    return found


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_adapters_add_a_low_rank_and_leave_all_else(document, tmp_path, go, ema):
    document["stages"][1] |= {"lora": {"rank": 2, "alpha": 4}}
    document["engine"] = {"ema": ema}
    folders = go(document, tmp_path)
    before, after = map(weights, folders)
    assert before.keys() == after.keys(), "checkpoints hold sums by the layers' own names"
    found = ranks_of(before, after)
    assert len(found) > 8 and all(r <= 2 for name, r in found.items() if "outc" not in name)
    assert all("outc" in n or n in found for n in moved(folders)), "norms and biases stay"
    if ema:
        averaged = weights(folders[1], "ema")
        assert averaged.keys() <= after.keys()
        assert any(not torch.equal(averaged[n], after[n]) for n in found)
    trained = weights(folders[1], "optimizer")
    assert all("parametrizations" in n or n.startswith("outc") for n in trained)


def test_an_adapted_stage_that_was_stopped_ends_in_the_same_bits(document, tmp_path, go):
    document["stages"][1] |= {"lora": {"rank": 2}}
    document["engine"] = {"ema": 0.5}
    folders = go(document, tmp_path / "whole")
    go(document, tmp_path / "2", stop_after=5)
    again = go(document, tmp_path / "2")
    for group in ("weights", "optimizer", "ema", "lora", "lora_ema"):
        one, two = weights(folders[1], group), weights(again[1], group)
        assert one and one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_the_sum_answers_as_the_adapted_network_does(document):
    from segfleet.pipeline.engines.lora import adapt, merged

    torch.manual_seed(0)
    model, plain = network(), network()
    image = torch.randn(1, 1, 32, 32)
    expected = model.eval()(image)
    adapt(model, stage(lora={"rank": 2}), LITE, 0)
    assert torch.equal(model(image), expected), "an adapter begins with nothing"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    plain.load_state_dict(merged(model))
    assert torch.equal(plain.eval()(image), model(image)) and not torch.equal(
        model(image), expected
    )


def test_a_stage_after_an_adapted_one_inherits_the_sum(document, tmp_path, go):
    document["stages"][1] |= {"lora": {"rank": 2}}
    document["stages"].append({"name": "third", "epochs": 0, "lr": 1e-3})
    folders = go(document, tmp_path)
    one, two = weights(folders[1]), weights(folders[2])
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", list(registry.specs()))
def test_every_architecture_can_be_adapted(name):
    from segfleet.pipeline.engines.lora import adapt, is_adapter, merged

    spec = registry.spec(name)
    with torch.device("meta"):
        model = registry.build_model(
            name, in_channels=spec.in_channels, num_classes=spec.num_classes, options=spec.reduced
        )
        names = set(model.state_dict())
        adapt(model, stage(lora={"rank": 1}), spec, 0)
    chosen = trainable(model, stage(lora={"rank": 1}), spec)
    assert {n for n in chosen if not is_adapter(n)} == {
        n
        for n, _ in model.named_parameters()
        if registry.belongs(n, "head", spec) and not is_adapter(n)
    }
    assert set(merged(model)) == names
