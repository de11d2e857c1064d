"""Files of weights: what is read, what is refused, what a run's identity makes of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from segfleet.core.errors import InputError
from segfleet.models.registry import ModelError
from segfleet.pipeline import checkpoint, identity, run
from segfleet.pipeline.identity import stage_uids
from segfleet.pipeline.parts import build_network, task_of
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse, with_digest
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.run import stage_folders
from segfleet.pipeline.trained.imports import write_run
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.train import train
from segfleet.pipeline.training.weights import read_tensors
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import load_manifest

TINY = {"features": [4, 8], "strides": [1, 2], "deep_supervision": False}


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def recipe(tiny_store):
    store = tiny_store(dims=3, classes=1)

    def make(weights, epochs=0, seed=7, **model):
        document = {
            "name": "x",
            "seed": seed,
            "data": {"store": str(store), "split": "all", "patch": [8, 8, 8], "batch": 2},
            "model": {"name": "plain_unet_3d", "options": TINY, "weights": str(weights), **model},
            "stages": [{"epochs": epochs, "steps": 2, "lr": 1e-3}],
        }
        return with_digest(parse(document))

    return make


@pytest.fixture
def weights(recipe, tmp_path):
    """A file of a network with another seed."""
    plain = recipe(__file__, seed=1)
    manifest = load_manifest(plain.data.store)
    state = build_network(plain, manifest, task_of(plain, manifest)).state_dict()
    path = tmp_path / "given.pth"
    torch.save({"epoch": np.float64(3.5), "state_dict": state}, path)
    return path, state


def trained(recipe, root):
    store = open_store(recipe.data.store)
    folders = stage_folders(root, recipe, store.manifest)
    job = Context(
        recipe=recipe, stores=lambda own: store, folders=folders, ranks=Ranks(torch.device("cpu")),
        asked_to_stop=lambda: False, warn=print, validate=lambda engine, own: {"dice": 0.5},
    )  # fmt: skip
    train(job)
    return folders


def test_a_stage_of_no_epochs_keeps_the_given_weights(recipe, weights, tmp_path):
    path, state = weights
    by_training = trained(recipe(path), tmp_path / "runs")[0]
    kept = by_training.final().tensors("weights")
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)
    # importing writes the very run that training would
    chosen = recipe(path)
    manifest = load_manifest(chosen.data.store)
    leaf = write_run(tmp_path / "imported", chosen, manifest)
    assert leaf.name == by_training.path.name
    found = checkpoint.load(leaf / "checkpoints" / "step-00000000").tensors("weights")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert write_run(tmp_path / "imported", chosen, manifest) == leaf
    assert run.open_run(leaf)[0] == chosen


def test_training_starts_from_them(recipe, weights, tmp_path):
    path, state = weights
    start = recipe(path, epochs=1)
    fresh = start.model_copy(
        update={"model": start.model.model_copy(update={"weights": None, "weights_sha256": None})}
    )
    moved, scratch = (
        trained(r, tmp_path / str(i))[0].final().tensors("weights")
        for i, r in enumerate((start, fresh))
    )
    near = sum((moved[n] - state[n]).norm() for n in state)
    far = sum((scratch[n] - state[n]).norm() for n in state)
    assert 0 < near < far / 10


def test_identity_is_what_the_file_holds(recipe, weights, tmp_path):
    path, _ = weights
    manifest = load_manifest(recipe(path).data.store)
    copy, other = tmp_path / "elsewhere.pth", tmp_path / "other.pth"
    copy.write_bytes(path.read_bytes())
    torch.save({"state_dict": {"a": torch.zeros(1)}}, other)
    uids = [stage_uids(recipe(p), manifest) for p in (path, copy, other)]
    assert uids[0] == uids[1] != uids[2]
    assert stage_uids(recipe(path, strict="encoder"), manifest) != uids[0]
    with pytest.raises(InputError, match="has sha256 .*, but the recipe says 00"):
        recipe(path, weights_sha256="00")
    with pytest.raises(InputError, match="model.weights: found no file"):
        recipe(tmp_path / "gone.pth")


def test_a_file_that_changed_meanwhile_is_refused(recipe, weights, tmp_path):
    path, _ = weights
    chosen = recipe(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="has sha256 .*, but the recipe says"):
        write_run(tmp_path / "runs", chosen, load_manifest(chosen.data.store))
    with pytest.raises(InputError, match="has gone or changed since the run was set up"):
        trained(chosen, tmp_path / "train")
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_code_in_a_file_is_named_and_never_run(recipe, tmp_path):
    gone = tmp_path / "made-by-payload"
    modern, old = tmp_path / "modern.pth", tmp_path / "plain.pkl"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Payload(gone)}, modern)
    old.write_bytes(pickle.dumps(Payload(gone)))
    with pytest.raises(InputError, match=r"holds objects that are no tensors \(posix.mkdir\)"):
        read_tensors(modern)
    with pytest.raises(InputError, match=r"plain.pkl .*(no tensors|cannot be read|damaged)"):
        read_tensors(old)
    assert not gone.exists()
    with pytest.raises(InputError, match="segfleet runs no code from files"):
        write_run(tmp_path / "runs", recipe(modern), load_manifest(recipe(modern).data.store))
    assert not list((tmp_path / "runs").rglob("recipe.json"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: s.pop("encoder.0.0.0.weight"), "missing: encoder.0.0.0.weight"),
        (lambda s: s.update({"more.weight": torch.zeros(2)}), "left over: more.weight"),
        (
            lambda s: s.update({"heads.0.bias": torch.zeros(9)}),
            r"other shape: heads.0.bias \(9,\) instead of \(1,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    recipe, weights, tmp_path, harm, message
):
    path, state = weights
    harmed = dict(state)
    harm(harmed)
    torch.save(harmed, path)
    chosen = recipe(path)
    with pytest.raises(ModelError, match=message):
        write_run(tmp_path / "runs", chosen, load_manifest(chosen.data.store))
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_files_of_all_kinds(weights, tmp_path):
    path, state = weights
    plain, safe = tmp_path / "plain.pth", tmp_path / "a.safetensors"
    torch.save(state, plain)
    save_file({name: value.contiguous() for name, value in state.items()}, safe)
    for file in (path, plain, safe):
        found = read_tensors(file)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    for name, content, message in (
        ("a.pth", b"no file of PyTorch", "damaged or no PyTorch file|cannot be read"),
        ("b.pth", path.read_bytes()[:200], "damaged or no PyTorch file|cannot be read"),
        ("c.safetensors", b"\x08\x00", "no safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_tensors(tmp_path / name)
    torch.save({"epoch": 3, "best": 0.5}, tmp_path / "d.pth")
    with pytest.raises(InputError, match="found the keys epoch, best, expected names with tensors"):
        read_tensors(tmp_path / "d.pth")


def test_the_command_line(weights, recipe, tmp_path, capsys):
    from segfleet.cli.import_ import command

    path, state = weights
    out = tmp_path / "ours.safetensors"
    options = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    store = Path(recipe(path).data.store)
    torch.save({f"module.{name}": value for name, value in state.items()}, path)
    command("torch", path, tmp_path / "runs", "plain_unet_3d", options, store, as_json=True)
    leaf = json.loads(capsys.readouterr().out)["runs"][0]
    assert run.open_run(leaf)[1][0].done()["steps"] == 0
    with pytest.raises(InputError, match="needs --store"):
        command("torch", path, tmp_path / "runs", "plain_unet_3d", options, None)
    with pytest.raises(InputError, match="needs --network"):
        command("torch", path, out)
    with pytest.raises(InputError, match="found 'keras', expected one of: torch, nnunet"):
        command("keras", path, out)
    with pytest.raises(ModelError, match="other shape: heads"):  # two classes as published
        command("torch", path, out, "plain_unet_3d", options)
    state |= {"heads.0.weight": torch.zeros(2, 4, 1, 1, 1), "heads.0.bias": torch.zeros(2)}
    torch.save(state, path)
    command("torch", path, out, "plain_unet_3d", options)
    assert load_file(out).keys() == state.keys()


def test_foreign_weights_are_a_root_that_runs_share_by_what_is_in_the_file(
    recipe, weights, tmp_path
):
    path, state = weights
    manifest = load_manifest(recipe(path).data.store)
    stages = [{"epochs": 0, "steps": 2, "lr": 1e-3}, {"epochs": 1, "steps": 1, "lr": 1e-3}]

    def uids(document):
        return identity.stage_uids(with_digest(parse(document)), manifest)

    plain = recipe(path).model_dump(mode="json") | {"stages": stages}
    elsewhere = tmp_path / "elsewhere.pth"
    shutil.copy(path, elsewhere)
    moved = plain | {"model": plain["model"] | {"weights": str(elsewhere)}}
    root = {"weights": str(elsewhere)}
    unsaid = {**plain["model"], "weights": None, "weights_sha256": None}
    in_stage = plain | {"model": unsaid, "stages": [{**stages[0], "model": root}, stages[1]]}
    assert uids(plain) == uids(moved) == uids(in_stage)
    assert uids(plain)[0] == identity.stage_uids(recipe(path), manifest)[0]
    torch.save({"state_dict": {name: value + 1 for name, value in state.items()}}, elsewhere)
    moved["model"]["weights_sha256"] = None
    assert uids(moved)[0] != uids(plain)[0]


def test_a_stage_starts_from_weights_of_its_own(recipe, weights, tmp_path):
    path, state = weights
    document = recipe(path).model_dump(mode="json")
    model = {"weights": document["model"].pop("weights")}
    del document["model"]["weights_sha256"]
    document["stages"][0]["model"] = model
    begun = with_digest(parse(document))
    folder = trained(begun, tmp_path / "runs")[0]
    kept = folder.final().tensors("weights")
    assert all(torch.equal(kept[name], state[name]) for name in state)
    html = write_report(folder.path).read_text(encoding="utf-8")
    assert "Weights from" in html and str(begun.stages[0].model.weights_sha256) in html


def test_a_file_of_a_later_stage_is_refused(recipe, weights, tmp_path):
    """It was passed over: the stage starts from the one before."""
    document = recipe(weights[0]).model_dump(mode="json")
    stage = document["stages"][0]
    document["stages"] = [stage, {**stage, "name": "same"}]
    assert parse(document), "what the recipe says means the first stage"
    document["stages"][1]["model"] = {"weights": "other.pth"}
    with pytest.raises(InputError, match="stages.1.model.weights: found other.pth, but this stage"):
        parse(document)


def test_a_checkpoint_of_nnssl_is_an_encoder_to_start_from(tiny_store, tmp_path):
    """As OpenMind's are: weights beside citations and a plan, the decoder of a masked
    autoencoder."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    common = {"norm_op": torch.nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    theirs = unet.ResidualEncoderUNet(
        1, 2, [4, 8], torch.nn.Conv3d, 3, [1, 2], [1, 2], 1, [1], True,
        nonlin=torch.nn.LeakyReLU, **common,
    )  # fmt: skip
    path = tmp_path / "checkpoint_final.pth"
    plan = {"architecture_plans": {"arch_class_name": "ResEncL"}, "key_to_stem": "encoder.stem"}
    document = {"network_weights": theirs.state_dict(), "citations": ["somebody"]}
    torch.save(document | {"nnssl_adaptation_plan": plan | {"key_to_lpe": None}}, path)
    options = {"features": [4, 8], "strides": [1, 2], "kernels": [3, 3], "blocks_per_stage": [1, 2]}
    store = tiny_store(dims=3, classes=1)
    recipe = with_digest(parse({
        "name": "x", "data": {"store": str(store), "split": "all", "patch": [8, 8, 8]},
        "model": {"name": "resenc_unet_3d", "options": options, "weights": str(path),
                  "strict": "encoder"},
        "stages": [{"epochs": 0, "lr": 1e-3}],
    }))  # fmt: skip
    leaf = write_run(tmp_path / "runs", recipe, load_manifest(store))
    kept = checkpoint.load(leaf / "checkpoints" / "step-00000000").tensors("weights")
    given = theirs.state_dict()["encoder.stages.1.blocks.0.conv1.conv.weight"]
    assert torch.equal(kept["encoder.1.0.conv1.0.weight"], given)
