"""A trained nnU-Net v2 model folder becomes runs that compute what its network computes.
Predictions of real ones are compared voxel by voxel in benchmarks/fidelity.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from segfleet.core.errors import InputError
from segfleet.models.registry import ModelError
from segfleet.pipeline.jobs import Stores, predict, run_job
from segfleet.pipeline.launch.job import Predict, Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse, resolve, with_absolute_store
from segfleet.pipeline.run import open_run, stage_folders
from segfleet.pipeline.stop import StopRequest
from segfleet.pipeline.trained.imports import import_nnunet
from segfleet.preprocess.stores.manifest import load_manifest

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
WIDTHS = {
    "n_stages": 3, "features_per_stage": [4, 8, 8], "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2], "conv_bias": True,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
    "nonlin_kwargs": {"inplace": True},
}  # fmt: skip


def plans(**changes):
    settings = {
        "batch_size": 2, "patch_size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0],
        "median_image_size_in_voxels": [20.0, 20.0, 20.0],
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": WIDTHS | {
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "nonlin": "torch.nn.LeakyReLU",
            },
        },
    }  # fmt: skip
    properties = {"mean": 1.0, "std": 1.0, "percentile_00_5": 0.0, "percentile_99_5": 2.0}
    return {
        "dataset_name": "Dataset009_Spheres",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": properties},
        "configurations": {"3d_fullres": settings | changes},
    }


LABELS = {"background": 0, "core": 1, "rim": 2}
REGIONS = {"background": 0, "whole": [1, 2], "rim": [2]}


def network_of(kind, classes):
    common = {"norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU, "deep_supervision": True}
    common |= {"conv_op": nn.Conv3d, "num_classes": classes}
    if kind == "plain":
        return unet.PlainConvUNet(1, **common, **WIDTHS)
    widths = {k: v for k, v in WIDTHS.items() if k != "n_conv_per_stage"}
    return unet.ResidualEncoderUNet(1, n_blocks_per_stage=[1, 2, 2], **common, **widths)


def write_model(folder, kind="plain", labels=LABELS):
    """A model folder as nnU-Net leaves it -> its networks by fold."""
    folder.mkdir()
    made, networks = plans(), {}
    architecture = made["configurations"]["3d_fullres"]["architecture"]
    if kind == "resenc":
        architecture["network_class_name"] = "somewhere.unet.ResidualEncoderUNet"
        architecture["arch_kwargs"]["n_blocks_per_stage"] = [1, 2, 2]
    (folder / "plans.json").write_text(json.dumps(made))
    facts = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    facts |= {"regions_class_order": [1, 2]} if labels is REGIONS else {}
    (folder / "dataset.json").write_text(json.dumps(facts | {"numTraining": 3}))
    for fold in (0, 2):
        torch.manual_seed(fold)
        networks[fold] = network = network_of(kind, 2 if labels is REGIONS else 3).eval()
        with torch.no_grad():  # so that every class occurs
            mean = network(torch.randn(1, 1, 16, 16, 16))[0].mean((0, 2, 3, 4))
            network.decoder.seg_layers[-1].bias -= mean
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": []},
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.6)]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {"plans": {}, "configuration": "3d_fullres", "fold": fold,
                          "dataset_json": {}, "device": torch.device("cpu")},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }  # fmt: skip
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return networks


@pytest.fixture
def model(tmp_path):
    """(folder, its networks by fold)."""
    return tmp_path / "model", write_model(tmp_path / "model")


def test_one_run_per_fold_with_nnunet_s_settings(model, tmp_path):
    runs = import_nnunet(model[0], tmp_path / "runs")
    assert len(runs) == 2 and import_nnunet(model[0], tmp_path / "runs") == runs
    recipe, folders = open_run(runs[1])
    assert recipe.data.fold == 2 and recipe.evaluation.average == "logits"
    assert recipe.evaluation.mirror == (0, 1, 2) and recipe.model.head == "softmax"
    assert folders[0].done()["steps"] == 0
    manifest = load_manifest(recipe.data.store)
    assert manifest.dataset.name == "Dataset009_Spheres" and not manifest.cases
    assert manifest.plan.normalisation == ("zscore",) and manifest.plan.dtype == "float32"


def test_an_imported_model_is_the_root_of_a_fine_tuning(model, tiny_store, tmp_path):
    """A stage that somebody else trained: found by its uid, taken over and told of as any other."""
    root = tmp_path / "runs"
    leaf = import_nnunet(model[0], root)[0]
    done = (leaf / "done.json").stat().st_mtime_ns
    document = open_run(leaf)[0].model_dump(mode="json")
    data = {"store": str(tiny_store(dims=3, classes=1)), "patch": [16, 16, 16], "batch": 2}
    stage = {"name": "finetune", "epochs": 1, "steps": 1, "lr": 1e-3, "inherit": {"head": "new"}}
    document["stages"].append({**stage, "data": data})
    recipe = with_absolute_store(parse(document))
    job = Train(recipe=recipe.model_dump(mode="json"), root=root)
    run_job(job, Ranks(torch.device("cpu")), StopRequest())
    first, second = stage_folders(root, recipe, Stores().manifest)
    assert first.path == leaf and (leaf / "done.json").stat().st_mtime_ns == done
    note = json.loads((second.path / "transfer.json").read_text())
    heads = [name for name in first.final().tensors("weights") if ".seg_layers." in name]
    assert set(note["new"]) <= {*heads, *note["left"]} and note["taken"] and not note["changed"]
    assert (second.path / "evaluation.json").exists()
    html = (second.path / "report.html").read_text(encoding="utf-8")
    assert "Weights from" in html and resolve(recipe, 0).model.weights_sha256 in html


@pytest.mark.parametrize(
    ("kind", "labels", "axes"),
    [
        ("plain", LABELS, (0, 1, 2)),
        ("plain", LABELS, (2, 0, 1)),
        ("resenc", LABELS, (0, 1, 2)),
        ("plain", REGIONS, (0, 1, 2)),
    ],
)
def test_a_prediction_is_that_of_the_network_there(tmp_path, kind, labels, axes):
    """One tile, so that all there is to do is turn the axes as planned, z-score, mirror, average
    logits, take the highest (of regions: those above 0, later ones over earlier), turn back."""
    folder = tmp_path / "model"
    networks = write_model(folder, kind, labels)
    made = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(json.dumps(made | {"transpose_forward": list(axes)}))
    runs = import_nnunet(folder, tmp_path / "runs")
    image = np.random.default_rng(0).normal(100, 20, (16, 16, 16)).astype(np.float32)
    images = tmp_path / "images"
    images.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(image), str(images / "a_0000.nii.gz"))
    x = torch.from_numpy(((image - image.mean()) / image.std()).transpose(axes))[None, None]
    for run, fold in zip(runs, (0, 2), strict=True):
        total = 0
        for flips in ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)):
            with torch.no_grad():
                total = total + networks[fold](x.flip(flips))[0].flip(flips)
        if labels is REGIONS:
            whole, rim = total[0] > 0
            expected = torch.where(rim, 2, whole.long())
        else:
            expected = total[0].argmax(0)
        expected = expected.numpy().transpose(np.argsort(axes))
        job = Predict(models=[run], images=[images], out=tmp_path / f"out{fold}")
        predict(job, Ranks(torch.device("cpu")), lambda done, total: None)
        made = next((tmp_path / f"out{fold}").glob("*.nii.gz"))
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(made)))
        assert len(np.unique(expected)) > 1
        assert (found == expected).mean() >= 0.999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_schemes": ["Rank"]}, "normalization_schemes: found Rank, expected one of"),
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({"architecture": {"network_class_name": "a.b.Other"}}, "architecture: found 'Other'"),
    ],
)
def test_what_cannot_be_imported_is_said(model, tmp_path, changes, message):
    (model[0] / "plans.json").write_text(json.dumps(plans(**changes)))
    with pytest.raises(InputError, match=message):
        import_nnunet(model[0], tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("recipe.json"))


def test_folders_and_files_that_are_none(model, tmp_path):
    folder = model[0]
    with pytest.raises(InputError, match=r"found no .*plans.json; give nnU-Net's model folder"):
        import_nnunet(tmp_path, tmp_path / "runs")
    with pytest.raises(InputError, match="holds no fold_N/checkpoint_best.pth"):
        import_nnunet(folder, tmp_path / "runs", "checkpoint_best.pth")
    twice = plans() | {"transpose_forward": [1, 1, 2]}
    (folder / "plans.json").write_text(json.dumps(twice))
    with pytest.raises(
        InputError, match=r"transpose_forward: found \[1, 1, 2\], expected an order"
    ):
        import_nnunet(folder, tmp_path / "runs")
    wider = plans()
    wider["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [
        4, 8, 16,
    ]  # fmt: skip
    (folder / "plans.json").write_text(json.dumps(wider))
    with pytest.raises(ModelError, match="does not fit plain_unet_3d: other shape: encoder.2.0"):
        import_nnunet(folder, tmp_path / "runs")
    torch.save({"network_weights": {}}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError, match="is no checkpoint of nnU-Net v2: no init_args"):
        import_nnunet(folder, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("recipe.json"))
