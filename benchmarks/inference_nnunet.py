"""nnU-Net's half of `benchmarks/inference.py`: the same image, the same small network, its own
preprocessing, tiling, resampling of logits and export. It runs in an environment that holds
nnunetv2, and imports nothing of segfleet.

    ENV/bin/python benchmarks/inference_nnunet.py WORK predict|export

WORK holds case.json, image/case_0000.nii.gz and weights.npz. Leaves WORK/nnunet/case.nii.gz; prints
CPU seconds and megabytes above those of the imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
from pathlib import Path

import numpy as np
import torch


def plans(case: dict) -> dict:
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": case["patch"],
        "median_image_size_in_voxels": case["stored"],
        "spacing": case["target"],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "batch_dice": False,
        "architecture": {
            "network_class_name": "torch.nn.Identity",
            "arch_kwargs": {},
            "_kw_requires_import": [],
        },
    }
    return {
        "dataset_name": "d",
        "plans_name": "p",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"3d_fullres": configuration},
    }


def network(work: Path) -> torch.nn.Module:
    weights = {k: torch.from_numpy(v) for k, v in np.load(work / "weights.npz").items()}
    classes = len(weights["2.bias"])
    made = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, classes, 1)
    )
    made.load_state_dict(weights)
    return made.eval()


def used() -> tuple[float, float]:
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime + now.ru_stime, now.ru_maxrss / 1024


def main(work: Path, part: str) -> None:
    torch.set_num_threads(1)
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    case = json.loads((work / "case.json").read_text())
    manager = PlansManager(plans(case))
    configuration = manager.get_configuration("3d_fullres")
    labels = {f"l{value}" if value else "background": value for value in range(case["labels"])}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    out = work / "nnunet"
    out.mkdir(exist_ok=True)
    model = network(work)
    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        model, manager, configuration, [model.state_dict()], dataset, "nnUNetTrainer", None
    )
    source = str(work / "image" / "case_0000.nii.gz")
    if part == "predict":
        before = used()
        with contextlib.redirect_stdout(io.StringIO()):
            predictor.predict_from_files_sequential([[source]], [str(out / "case")])
    else:
        preprocessor = configuration.preprocessor_class(verbose=False)
        _, _, facts = preprocessor.run_case([source], None, manager, configuration, dataset)
        logits = np.load(work / "logits.npy")
        before = used()
        export_prediction_from_logits(
            torch.from_numpy(logits), facts, configuration, manager, dataset,
            str(out / "case"), num_threads_torch=1,
        )  # fmt: skip
    after = used()
    print(json.dumps({"cpu_seconds": after[0] - before[0], "above_mb": after[1] - before[1]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
