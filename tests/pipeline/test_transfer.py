"""What a stage takes over from the one before: every tensor accounted for, or nothing loaded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline import identity
from segfleet.pipeline.jobs import Stores
from segfleet.pipeline.recipe import parse, with_absolute_store
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.stage import Inherit
from segfleet.pipeline.training.transfer import (
    TRANSFER,
    Side,
    _inflated,
    _other_channels,
    plan_transfer,
)

SPEC = registry.spec("unet_lite_standard")


@pytest.fixture
def document(two_stages):
    return two_stages({}, {"steps": 4}, save_every=1)


def note(folder):
    return json.loads((folder.path / TRANSFER).read_text())


def side(rows=1, channels=1, name="unet_lite_standard"):
    names = tuple(f"blob{k}" for k in range(1, rows + 1))
    return Side(rows=names if rows == 1 else ("background", *names[:-1]),
                channels=tuple("abcd"[:channels]), name=name)  # fmt: skip


def network(channels=1, classes=1, seed=0, name="unet_lite_standard", **options):
    torch.manual_seed(seed)
    return registry.build_model(
        name, in_channels=channels, num_classes=classes, options=options or {"width": 4}
    )


@pytest.mark.parametrize("how", ["repeat", "mean"])
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (3, 4), (4, 3), (2, 4)])
def test_an_image_of_equal_channels_is_answered_as_before(how, sizes):
    before, after = nn.Conv2d(sizes[0], 5, 3), nn.Conv2d(sizes[1], 5, 3)
    with torch.no_grad():
        after.weight.copy_(_other_channels(before.weight, 1, sizes, how))
        after.bias.copy_(before.bias)
    image = torch.randn(2, 1, 9, 9)
    expected = before(image.expand(-1, sizes[0], -1, -1))
    torch.testing.assert_close(after(image.expand(-1, sizes[1], -1, -1)), expected)


def test_repeat_takes_channels_in_turn():
    weight = torch.arange(2.0).view(1, 2, 1, 1)
    assert _other_channels(weight, 1, (2, 4), "repeat").flatten().tolist() == [0, 0.5, 0, 0.5]
    assert _other_channels(weight, 0, (1, 3), "repeat").shape == (3, 2, 1, 1)


@pytest.mark.parametrize(
    ("flat", "deep"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), nn.Conv3d(2, 3, 3, padding=1)),
        (nn.Conv2d(2, 3, 3, padding=1), nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1))),
        (nn.ConvTranspose2d(2, 3, 2, 2), nn.ConvTranspose3d(2, 3, 2, 2)),
        (nn.ConvTranspose2d(2, 3, 2, 2), nn.ConvTranspose3d(2, 3, (1, 2, 2), (1, 2, 2))),
    ],
)
def test_a_constant_volume_is_answered_as_a_slice_was(flat, deep):
    with torch.no_grad():
        deep.weight.copy_(_inflated(flat.weight, deep.weight, deep))
        deep.bias.copy_(flat.bias)
    image = torch.randn(1, 2, 6, 6)
    volume = deep(image.unsqueeze(2).expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(volume[:, :, volume.shape[2] // 2], flat(image))


def test_a_3d_network_starts_from_a_2d_one():
    options = {"features": [4, 8, 8], "deep_supervision": False}
    flat = network(name="plain_unet_2d", classes=2, **options)
    deep = network(name="plain_unet_3d", classes=2, seed=1, **options)
    spec = registry.spec("plain_unet_3d")
    found = plan_transfer(
        deep, spec, flat.state_dict(), Inherit(),
        side(2, name="plain_unet_3d"), side(2, name="plain_unet_2d"),
    )  # fmt: skip
    assert found.tensors.keys() == deep.state_dict().keys() and not found.left and not found.new
    assert found.how["encoder.0.0.0.weight"] == "inflated from (4, 1, 3, 3)"
    assert found.how["encoder.0.0.1.weight"] == "taken"


@pytest.mark.parametrize("how", ["repeat", "mean", "new"])
def test_a_3d_network_of_other_channels_starts_from_a_2d_one(how):
    """Colours of a slice, one channel of a volume: alike in all channels, it is answered alike."""
    options = {"features": [4, 8, 8], "deep_supervision": False}
    flat = network(name="plain_unet_2d", channels=3, classes=2, **options)
    deep = network(name="plain_unet_3d", classes=2, seed=1, **options)
    first, old = "encoder.0.0.0.weight", flat.state_dict()
    found = plan_transfer(
        deep, registry.spec("plain_unet_3d"), old, Inherit(channels=how),
        side(2, name="plain_unet_3d"), side(2, 3, name="plain_unet_2d"), inputs={first},
    )  # fmt: skip
    if how == "new":
        assert found.new == [first] and found.left == [first]
        return
    assert found.how[first] == f"3 channels to 1 ({how}), inflated from (4, 1, 3, 3)"
    torch.testing.assert_close(found.tensors[first].sum((1, 2)), old[first].sum(1))
    assert not found.new and not found.left


def test_channels_that_cannot_be_mapped_are_one_message_unless_new_is_said():
    """A first layer that depends on the number of channels in another way than one for each."""

    class Pairs(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.inc = nn.ModuleList([nn.Conv2d(2 * channels, 4, 1)])
            self.outc = nn.Conv2d(4, 1, 1)

    model, old = Pairs(3), Pairs(1).state_dict()
    facts = (SPEC, old)
    with pytest.raises(InputError) as refused:
        plan_transfer(model, *facts, Inherit(), side(), side(), {"inc.0.weight"})
    assert "do not fit the stage before: inc.0.weight (4, 6, 1, 1), (4, 2, 1, 1) there. " in str(
        refused.value
    )
    with pytest.raises(InputError, match="from channels a for a, b, c: set inherit.channels=new"):
        plan_transfer(model, *facts, Inherit(), side(1, 3), side(), {"inc.0.weight"})
    found = plan_transfer(
        model, *facts, Inherit(channels="new"), side(1, 3), side(), {"inc.0.weight"}
    )
    assert found.new == ["inc.0.weight"] and "outc.weight" in found.taken


@pytest.mark.parametrize("name", list(registry.specs()))
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
def test_every_architecture_starts_from_one_of_other_channels(name, sizes):
    spec = registry.spec(name)
    with torch.device("meta"):
        old, new, more = (
            registry.build_model(
                name, in_channels=count, num_classes=spec.num_classes, options=spec.reduced
            ).state_dict()
            for count in (*sizes, sizes[1] + 2)
        )
        model = registry.build_model(
            name, in_channels=sizes[1], num_classes=spec.num_classes, options=spec.reduced
        )
    inputs = {key for key, value in new.items() if more[key].shape != value.shape}
    sides = [side(spec.num_classes, count, name) for count in sizes[::-1]]
    found = plan_transfer(model, spec, old, Inherit(), *sides, inputs=inputs)
    assert not found.new and not found.left and found.tensors.keys() == new.keys()
    assert {key for key, how in found.how.items() if how != "taken"} == inputs
    # a recurrent network of slices reads the middle one of however many there are
    assert bool(inputs) != name.startswith("rec_unet")


def test_rows_of_equal_labels_are_mapped_and_the_others_are_new():
    parent, model = network(classes=3), network(classes=3, seed=1)
    ours = Side(rows=("background", "tumour", "liver"), channels=("a",), name="n")
    theirs = Side(rows=("background", "liver", "lesion"), channels=("a",), name="n")
    inherit = Inherit(head="map", classes={"tumour": "lesion"})
    found = plan_transfer(model, SPEC, parent.state_dict(), inherit, ours, theirs)
    old = parent.state_dict()["outc.weight"]
    assert torch.equal(found.tensors["outc.weight"], old[[0, 2, 1]])
    found = plan_transfer(model, SPEC, parent.state_dict(), Inherit(head="map"), ours, theirs)
    assert torch.equal(found.tensors["outc.weight"][2], old[1])
    assert torch.equal(found.tensors["outc.weight"][1], model.state_dict()["outc.weight"][1])
    assert found.how["outc.bias"] == "rows of background, liver"


@pytest.mark.parametrize(
    ("inherit", "rows", "words"),
    [
        (
            Inherit(),
            4,
            r"inherit: 2 tensor\(s\) .* do not fit .*outc.weight \(4, .*head=new or map",
        ),
        (Inherit(weights=("nobody",)), 3, "begins with 'nobody'; expected one of: all, encoder"),
        (Inherit(head="map", classes={"blob1": "x"}), 3, "'x' is none of the classes background"),
        (Inherit(head="map", classes={"x": "blob1"}), 3, "'x' is none of the classes background"),
    ],
)
def test_what_does_not_fit_is_one_message_and_changes_nothing(inherit, rows, words):
    model = network(classes=rows, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"(?s){words}"):
        plan_transfer(model, SPEC, network(classes=3).state_dict(), inherit, side(rows), side(3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_head_of_other_classes_is_taken_and_said():
    """The shapes agree, the classes do not: nobody takes that over unawares."""
    parent, model = network(classes=2), network(classes=2, seed=1)
    ours = Side(rows=("background", "tumour"), channels=("a",), name="n")
    theirs = Side(rows=("background", "liver"), channels=("a",), name="n")
    found = plan_transfer(model, SPEC, parent.state_dict(), Inherit(), ours, theirs)
    assert torch.equal(found.tensors["outc.weight"], parent.state_dict()["outc.weight"])
    assert found.how["outc.weight"] == "as it was for background, liver"
    assert "outc.weight: as it was for background, liver" in found.sentence(1)
    same = plan_transfer(model, SPEC, parent.state_dict(), Inherit(), theirs, theirs)
    assert same.how["outc.weight"] == "taken" and not same.document()["changed"]


@pytest.mark.parametrize(
    ("inherit", "words"),
    [
        ({"classes": {"a": "b"}}, "classes: nothing reads them .* set head: map"),
        ({"weights": []}, "takes over nothing is no stage of this run"),
        ({"weights": "encodr"}, "Input should be 'all', 'encoder' or 'backbone', or be a list"),
    ],
)
def test_what_nothing_would_read_is_refused(document, inherit, words):
    """A misread wish is no transfer: classes beside a head that is kept, no part at all."""
    document["stages"][1]["inherit"] = inherit
    with pytest.raises(InputError, match=words):
        parse(document)
    document["stages"][1]["inherit"] = {"head": "new", "classes": {"a": "b"}}  # of a sweep's values
    parse(document)


def test_a_part_that_nobody_has_is_named_once_with_what_is_near():
    with pytest.raises(InputError, match="Did you mean 'encoder'") as found:
        plan_transfer(network(), SPEC, network().state_dict(), Inherit(weights=["encodr"]), side(),
                      side())  # fmt: skip
    names = str(found.value).partition("one of: ")[2].partition(".")[0].split(", ")
    assert len(names) == len(set(names))


def test_no_common_class_is_refused():
    ours = Side(rows=("background", "a"), channels=("c",), name="n")
    theirs = Side(rows=("background", "b"), channels=("c",), name="n")
    with pytest.raises(InputError, match="no class of background, a is among .*background, b"):
        plan_transfer(network(classes=2), SPEC, network(classes=2).state_dict(),
                      Inherit(head="map"), ours, theirs)  # fmt: skip


def test_a_network_bound_to_its_patch_takes_no_other():
    spec = registry.spec("e2mi_seg_mcl")
    small, large = (
        registry.build_model(spec.name, in_channels=1, num_classes=2,
                             options={**spec.reduced, "patch": patch})
        for patch in ((16, 32, 32), (32, 64, 64))
    )  # fmt: skip
    with pytest.raises(InputError, match="is bound to its patch"):
        plan_transfer(large, spec, small.state_dict(), Inherit(), side(2, name=spec.name),
                      side(2, name=spec.name))  # fmt: skip


@pytest.mark.parametrize("weights", ["encoder", "backbone", ["inc", "down1"]])
def test_parts_are_taken_and_the_rest_is_as_initialised(weights):
    model, parent = network(seed=1), network().state_dict()
    found = plan_transfer(model, SPEC, parent, Inherit(weights=weights), side(), side())
    begins = {"encoder": ("inc", "down"), "backbone": ("inc", "down", "up")}.get(
        weights if isinstance(weights, str) else "", ("inc", "down1")
    )
    assert found.taken == {name for name in parent if name.startswith(begins)}
    assert set(found.new) == set(found.left) == parent.keys() - found.taken


def test_other_classes_and_channels_end_to_end(document, tiny_store, tmp_path, go):
    other = tiny_store(dims=2, classes=3, channels=3)
    said = []
    changes = [f"stages.0.data.store={other}", "stages.1.inherit.head=map",
               "stages.1.inherit.channels=mean", "stages.1.inherit.optimizer=true"]  # fmt: skip
    folders = go(document, tmp_path / "a", *changes, warn=said.append)
    found = note(folders[1])
    assert found["changed"] == {
        "inc.0.weight": "3 channels to 1 (mean)",
        "outc.weight": "rows of background, blob1, blob2",
        "outc.bias": "rows of background, blob1, blob2",
    }
    assert not found["new"] and found["left"] == [] and len(found["taken"]) > 50
    line = next(line for line in said if "starts from stage 1" in line)
    assert "3 changed (inc.0.weight: 3 channels to 1 (mean)" in line
    html = write_report(folders[1].path).read_text(encoding="utf-8")
    assert "Taken over" in html and "outc.weight" in html
    # stopped in the middle of the second stage and gone on with: the same bits
    stopped = go(document, tmp_path / "b", *changes, stop_after=4)
    assert stopped[0].done() and not stopped[1].done()
    again = go(document, tmp_path / "b", *changes)
    for group in ("weights", "optimizer"):
        one, two = (f[1].final().tensors(group) for f in (folders, again))
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_moments_come_along_for_what_is_as_it_was(document, tiny_store, tmp_path, go):
    document["stages"][1] |= {"steps": 1, "inherit": {"optimizer": True, "head": "new"}}
    folders = go(document, tmp_path)
    moments = folders[1].final().tensors("optimizer")
    assert moments["inc.0.weight.step"] == 3 and moments["outc.weight.step"] == 1
    assert note(folders[1])["new"] == ["outc.bias", "outc.weight"]


def test_how_it_was_said_before_means_the_same(document):
    store = Stores()

    def uids(inherit):
        document["stages"][1]["inherit"] = inherit
        recipe = with_absolute_store(parse(document))
        return identity.stage_uids(recipe, store.manifest)

    assert uids("weights") == uids({}) != uids("weights+optimizer") == uids({"optimizer": True})
    assert uids({"head": "new"}) != uids({})
    with pytest.raises(
        InputError, match="stages.1.inherit: found 'x'.*weights or weights.optimizer"
    ):
        uids("x")


def test_moments_of_another_optimizer_are_refused(document):
    document["stages"][1] |= {"inherit": "weights+optimizer", "optimizer": {"name": "sgd"}}
    with pytest.raises(InputError, match="stages.1.inherit.optimizer: .* trained by adamw"):
        parse(document)


def test_another_network_takes_the_encoder_both_share():
    options = {"widths": (16, 16, 16, 16, 16)}
    models = [network(channels=3, name=name, **options) for name in ("rec_unet", "rec_unet_em")]
    spec = registry.spec("rec_unet_em")
    found = plan_transfer(
        models[1], spec, models[0].state_dict(), Inherit(weights="encoder"),
        side(1, 3, "rec_unet_em"), side(1, 3, "rec_unet"),
    )  # fmt: skip
    encoder = {name for name in models[1].state_dict() if name.startswith(spec.encoder)}
    assert found.taken == encoder and encoder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["stages.1.model.name=unext"], r"stages.1 .*the stage before trained unet_lite_standard"),
        (["stages.1.inherit.weights=[nobody]"], "begins with 'nobody'"),
        (["stages.1.inherit.head=map", "stages.1.inherit.classes.blob1=x"], "'x' is none of"),
    ],
)
def test_a_mismatch_is_found_before_anything_is_trained(document, tmp_path, changes, words, go):
    with pytest.raises(InputError, match=f"(?s){words}"):
        go({**document}, tmp_path, *changes)
    assert not list(tmp_path.rglob("checkpoints"))
