"""The nnU-Net half of `benchmarks/fidelity.py`: trains nnU-Net v2 itself for a few steps and lets
it predict. It runs in an environment that holds nnunetv2, and imports nothing of segfleet.

    ENV/bin/python benchmarks/nnunet_side.py DATA WORK SET

hippocampus_turned drops every second column of the images, so that the last axis is the coarsest
and nnU-Net's plans turn the axes. DATA holds Task04_Hippocampus and sunnybrook_acdc_layout. SET is
one of `SETS`. Leaves in WORK/SET: model (nnU-Net's model folder), images, predictions_FOLD,
single_FOLD (the same with sums of tiles in single precision; nnU-Net's are in half) and nothing
else that anybody reads.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

# set: what is trained, nnU-Net's planner and configuration, folds, steps
SETS = {
    "hippocampus_3d": ("hippocampus", "ExperimentPlanner", "3d_fullres", (0, 1), 100),
    "hippocampus_2d": ("hippocampus", "ExperimentPlanner", "2d", (0,), 300),
    "heart_resenc_3d": ("heart", "nnUNetPlannerResEncM", "3d_fullres", (0,), 40),
    "hippocampus_turned": ("turned", "ExperimentPlanner", "3d_fullres", (0,), 100),
    "hippocampus_regions": ("regions", "ExperimentPlanner", "3d_fullres", (0,), 100),
}
TRAINING, HELD_OUT = 14, 4  # cases
BATCH = 2
NARROWER = 4  # a quarter of the planned features, so that a few minutes teach it something


def raw_hippocampus(
    data: Path, raw: Path, images: Path, *, regions: bool, copy: Callable[[Path, Path], object]
) -> None:
    source = data / "Task04_Hippocampus"
    names = sorted(p.name for p in (source / "labelsTr").glob("*.nii.gz"))
    for count, name in enumerate(names[: TRAINING + HELD_OUT]):
        if count < TRAINING:
            copy(source / "imagesTr" / name, raw / "imagesTr" / channel(name))
            copy(source / "labelsTr" / name, raw / "labelsTr" / name)
        else:
            copy(source / "imagesTr" / name, images / channel(name))
    labels: dict = {"background": 0, "anterior": 1, "posterior": 2}
    more: dict = {}
    if regions:
        labels = {"background": 0, "whole": [1, 2], "posterior": [2]}
        more = {"regions_class_order": [1, 2]}
    description(raw, {"0": "MRI"}, labels, TRAINING, more)


def every_second_column(source: Path, target: Path) -> None:
    import SimpleITK as sitk

    sitk.WriteImage(sitk.ReadImage(str(source))[::2, :, :], str(target))


def raw_heart(data: Path, raw: Path, images: Path) -> None:
    import SimpleITK as sitk

    truths = sorted((data / "sunnybrook_acdc_layout/training").glob("*/*_gt.nii.gz"))
    for count, truth in enumerate(truths):
        name, image = truth.name.replace("_gt", ""), Path(str(truth).replace("_gt", ""))
        if count < TRAINING:
            shutil.copy(image, raw / "imagesTr" / channel(name))
            label = sitk.ReadImage(str(truth))
            sitk.WriteImage(sitk.Cast(label == 3, sitk.sitkUInt8), str(raw / "labelsTr" / name))
        elif count < TRAINING + HELD_OUT:
            shutil.copy(image, images / channel(name))
    description(raw, {"0": "MRI"}, {"background": 0, "left_ventricle": 1}, TRAINING, {})


def channel(name: str) -> str:
    return name.replace(".nii.gz", "_0000.nii.gz")


def description(raw: Path, channels: dict, labels: dict, count: int, more: dict) -> None:
    facts = {"channel_names": channels, "labels": labels, "numTraining": count}
    facts |= {"file_ending": ".nii.gz"} | more
    (raw / "dataset.json").write_text(json.dumps(facts, indent=1))


def main(data: Path, work: Path, chosen: str) -> None:
    kind, planner, configuration, folds, steps = SETS[chosen]
    home = work / chosen
    shutil.rmtree(home, ignore_errors=True)
    name = "Dataset101_Fidelity"
    raw, images = home / "raw" / name, home / "images"
    for folder in (raw / "imagesTr", raw / "labelsTr", images):
        folder.mkdir(parents=True)
    for variable, place in (("raw", "raw"), ("preprocessed", "pre"), ("results", "results")):
        os.environ[f"nnUNet_{variable}"] = str(home / place)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    if kind == "heart":
        raw_heart(data, raw, images)
    else:
        copy = every_second_column if kind == "turned" else shutil.copy
        raw_hippocampus(data, raw, images, regions=kind == "regions", copy=copy)

    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )
    from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import (
        nnUNetTrainerVanillaAdam1en3,
    )

    torch.set_num_threads(1)
    extract_fingerprints([101], num_processes=1)
    plan_experiments([101], experiment_planner_class_name=planner)
    plans_file = next((home / "pre" / name).glob("*lans.json"))
    plans = json.loads(plans_file.read_text())
    assert (plans["transpose_forward"] == [0, 1, 2]) == (kind != "turned")
    settings = plans["configurations"][configuration]
    settings["batch_size"] = BATCH
    widths = settings["architecture"]["arch_kwargs"]
    widths["features_per_stage"] = [n // NARROWER for n in widths["features_per_stage"]]
    plans_file.write_text(json.dumps(plans, indent=1))
    preprocess([101], plans["plans_name"], [configuration], num_processes=[1])
    description_ = json.loads((raw / "dataset.json").read_text())
    for fold in folds:
        torch.manual_seed(fold)
        plans = json.loads(plans_file.read_text()) | {"continue_training": False}
        # one of nnU-Net's own; its usual SGD predicts nothing but background for its first epoch
        trainer = nnUNetTrainerVanillaAdam1en3(
            plans, configuration, fold, description_, torch.device("cpu")
        )
        trainer.num_epochs, trainer.num_iterations_per_epoch = 1, steps
        trainer.num_val_iterations_per_epoch = 1
        trainer.run_training()
    model = Path(trainer.output_folder_base)
    predict(model, home, folds)
    shutil.move(model, home / "model")


def predict(model: Path, home: Path, folds: tuple[int, ...]) -> None:
    """Each fold for itself, with nnU-Net's defaults, then with sums in single precision."""
    import torch
    from nnunetv2.inference import predict_from_raw_data as module
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    gaussian = module.compute_gaussian

    def single(*words: object, **more: object) -> torch.Tensor:
        return gaussian(*words, **{**more, "dtype": torch.float32})

    single.cache_clear = gaussian.cache_clear
    half = torch.half
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=True, device=torch.device("cpu"),
        perform_everything_on_device=False, verbose=False, allow_tqdm=False,
    )  # fmt: skip
    images = sorted((home / "images").glob("*.nii.gz"))
    for fold, name in itertools.product(folds, ("predictions", "single")):
        # nnU-Net makes its sums of whatever torch.half is
        torch.half = torch.float32 if name == "single" else half
        module.compute_gaussian = single if name == "single" else gaussian
        out = home / f"{name}_{fold}"
        out.mkdir(exist_ok=True)
        predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
        predictor.predict_from_files_sequential(
            [[str(path)] for path in images],
            [str(out / re.sub(r"_0000", "", path.name)) for path in images],
            save_probabilities=False, overwrite=True,
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3])
