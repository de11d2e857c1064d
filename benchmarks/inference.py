"""Memory of an ensemble of five against one network, and predicting and exporting 40 classes
against nnU-Net; each in a process of its own with one thread.

    python benchmarks/inference.py [--nnunet ENV/bin/python] [--only ensemble | export] [--case C]

Peak resident memory above that of the imports:

maps     a small network, large maps: 8 classes of 64 x 192 x 192 voxels on the raw grid
weights  a large network, small maps: 16 million parameters, which do not stay loaded five times
stay     small maps, and networks as large as may all stay loaded, the worst case for memory

A volume of 40 classes, 64 x 192 x 192 voxels on the raw grid, 48 x 128 x 128 on the network's,
which is two convolutions, so that little but the tools is measured:

predict  NIfTI in, NIfTI out: reading, resampling, tiles of half an overlap, resampling back
export   only the way back, from logits on the network's grid to a NIfTI file

nnU-Net's side is `inference_nnunet.py`, in an environment of its own. How many voxels both label
alike is told, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

RESULT = Path(__file__).with_name("results") / "inference.json"
CASES = {
    "maps": {"labels": 8, "grid": (64, 192, 192), "features": [4, 8], "patch": (32, 64, 64)},
    "weights": {"labels": 3, "grid": (32, 64, 64), "features": None, "patch": (32, 64, 64)},
    "stay": {
        "labels": 3,
        "grid": (32, 64, 64),
        "features": [16, 32, 56, 56],
        "patch": (32, 64, 64),
    },
}
TARGET = 1.2


def parts(name: str, features: tuple[int, ...] | None = None):
    """The recipe of a case, or with other features, and the data set and plan of its images."""
    from segfleet.pipeline.recipe import parse
    from segfleet.preprocess.stores.manifest import Dataset, Manifest, Plan

    case = CASES[name]
    labels = {f"l{value}": value for value in range(case["labels"])}
    dataset = Dataset(name="d", reader="msd", dims=3, channels=("mr",), labels=labels)
    plan = Plan(target_spacing=(1.5, 1.0, 1.0), patch=case["patch"], normalisation=("zscore",))
    manifest = Manifest(format="zarr", layout=1, dataset=dataset, plan=plan, cases=())
    features = features or case["features"]
    options = {"deep_supervision": False} | ({"features": list(features)} if features else {})
    recipe = parse(
        {
            "name": "r",
            "data": {"patch": list(case["patch"])},
            "model": {"name": "plain_unet_3d", "options": options},
            "stages": [{"epochs": 1, "lr": 1.0}],
        }
    )
    return recipe, manifest


def write_weights(name: str, networks: int, folder: Path) -> None:
    """Files as runs have them."""
    from safetensors.torch import save_file

    from segfleet.pipeline.parts import build_network, task_of

    recipe, manifest = parts(name)
    for seed in range(networks):
        seeded = recipe.model_copy(update={"seed": seed})
        found = build_network(seeded, manifest, task_of(recipe, manifest)).state_dict()
        save_file(found, folder / f"{seed}.safetensors")


def child(name: str, networks: int, folder: Path) -> None:
    """Predict one random volume; print the peak of memory in MB."""
    import resource

    import numpy as np
    import torch
    from safetensors.torch import load_file

    from segfleet.pipeline.parts import build_network, task_of
    from segfleet.pipeline.trained.loading import load_run  # noqa: F401  all imports come first
    from segfleet.pipeline.trained.model import Model, Trained

    recipe, manifest = parts(name)
    files = [folder / f"{seed}.safetensors" for seed in range(networks)]
    trained = [
        Trained(
            uid=f"n{seed}",
            checkpoint="c",
            recipe=recipe,
            manifest=manifest,
            size=file.stat().st_size,
            check=lambda: None,
            read=lambda file=file: load_file(file),
        )
        for seed, file in enumerate(files)
    ]
    size = files[0].stat().st_size
    image = np.random.default_rng(0).normal(size=(1, *CASES[name]["grid"])).astype(np.float32)
    torch.set_num_threads(1)
    tiny, plan = parts(name, (2, 2))
    first = build_network(tiny, plan, task_of(tiny, plan)).state_dict()
    warm = Trained(uid="w", checkpoint="c", recipe=tiny, manifest=plan, size=0,
                   check=lambda: None, read=lambda: first)  # fmt: skip
    # what is imported where it is first used comes before, too
    Model([warm]).predict(np.zeros((1, 8, 8, 8), np.float32), (1.5, 1.0, 1.0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Model(trained).predict(image, (1.0, 1.0, 1.0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({"above_mb": (peak - before) / 1024, "peak_mb": peak / 1024, "mb": size / 2**20})
    )


VOLUME = {
    "labels": 40,
    "raw": (64, 192, 192),
    "spacing": (1.5, 1.0, 1.0),
    "target": (2.0, 1.5, 1.5),
    "stored": (48, 128, 128),
    "patch": (32, 96, 96),
}


def write_volume(work: Path) -> None:
    """The image, the network's weights and logits on its grid, for both sides."""
    import nibabel as nib
    import numpy as np
    from scipy import ndimage

    rng = np.random.default_rng(0)
    smooth = ndimage.zoom(rng.normal(size=(16, 24, 24)), (4, 8, 8), order=3)
    image = (smooth + rng.normal(0, 0.2, VOLUME["raw"])).astype(np.float32)
    (work / "image").mkdir()
    affine = np.diag([*VOLUME["spacing"][::-1], 1.0])
    nib.Nifti1Image(image.T, affine).to_filename(work / "image" / "case_0000.nii.gz")
    weights = {
        "0.weight": rng.normal(0, 0.3, (8, 1, 3, 3, 3)),
        "0.bias": rng.normal(0, 0.5, 8),
        "2.weight": rng.normal(0, 1, (VOLUME["labels"], 8, 1, 1, 1)),
        "2.bias": rng.normal(0, 1, VOLUME["labels"]),
    }
    np.savez(work / "weights.npz", **{k: v.astype(np.float32) for k, v in weights.items()})
    logits = rng.normal(size=(VOLUME["labels"], 12, 16, 16))
    logits = np.stack([ndimage.zoom(one, (4, 8, 8), order=1) for one in logits])
    np.save(work / "logits.npy", logits.astype(np.float32))
    (work / "case.json").write_text(json.dumps(VOLUME))


def volume_child(work: Path, part: str) -> None:
    """Our half: what `inference_nnunet.py` does, and its report."""
    import resource

    import numpy as np
    import torch

    from segfleet.pipeline.inference.ensemble import Member
    from segfleet.pipeline.inference.predict import predict_files
    from segfleet.pipeline.inference.restore import Map, combine
    from segfleet.pipeline.task import make_task
    from segfleet.preprocess.files.images import read_image
    from segfleet.preprocess.files.writer import write_label
    from segfleet.preprocess.stores.manifest import Dataset, Plan

    torch.set_num_threads(1)
    labels = {f"l{v}" if v else "background": v for v in range(VOLUME["labels"])}
    dataset = Dataset(name="d", reader="msd", dims=3, channels=("mr",), labels=labels)
    plan = Plan(target_spacing=VOLUME["target"], patch=VOLUME["patch"], normalisation=("zscore",))
    task = replace(make_task(dataset), averages="logits")
    made = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, len(labels), 1)
    )
    made.load_state_dict({k: torch.from_numpy(v) for k, v in np.load(work / "weights.npz").items()})

    @torch.no_grad()
    def forward(image: torch.Tensor) -> torch.Tensor:
        return made(image)

    def used() -> tuple[float, float]:
        now = resource.getrusage(resource.RUSAGE_SELF)
        return now.ru_utime + now.ru_stime, now.ru_maxrss / 1024

    source, out = work / "image" / "case_0000.nii.gz", work / "segfleet"
    if part == "predict":
        member = Member(forward=lambda: forward, plan=plan, task=task, patch=VOLUME["patch"])
        before = used()
        predict_files([member], dataset, [source], out)
    else:
        _, geometry = read_image([source])
        logits = torch.from_numpy(np.load(work / "logits.npy"))
        crop = tuple((0, size) for size in VOLUME["raw"])
        before = used()
        label = combine([Map(scores_KZYX=logits, task=task, crop=crop)], geometry.shape)
        write_label(out / "case.nii.gz", label, geometry)
    after = used()
    print(json.dumps({"cpu_seconds": after[0] - before[0], "above_mb": after[1] - before[1]}))


def against_nnunet(python: str) -> dict:
    """Both sides of both parts, and how far their labels agree."""
    import nibabel as nib
    import numpy as np

    found = {"volume": VOLUME}
    with tempfile.TemporaryDirectory(prefix="segfleet-") as folder:
        work = Path(folder)
        write_volume(work)
        for part in ("predict", "export"):
            ours = [sys.executable, __file__, "volume", str(work), part]
            theirs = [python, str(Path(__file__).with_name("inference_nnunet.py")), str(work), part]
            rows = {
                name: json.loads(  # the last line: nnU-Net greets
                    subprocess.run(command, check=True, capture_output=True, text=True)
                    .stdout.strip()
                    .splitlines()[-1]
                )
                for name, command in (("segfleet", ours), ("nnunet", theirs))
            }
            written = [
                np.asarray(nib.load(next((work / name).glob("*.nii.gz"))).dataobj)
                for name in ("segfleet", "nnunet")
            ]
            rows["labels_alike"] = float((written[0] == written[1]).mean())
            found[part] = rows
            cpu, memory = (
                [rows[name][key] for name in ("segfleet", "nnunet")]
                for key in ("cpu_seconds", "above_mb")
            )
            print(
                f"{part}: {cpu[0]:.1f} CPU s here, {cpu[1]:.1f} nnU-Net; {memory[0]:.0f} MB, "
                f"{memory[1]:.0f} MB; {rows['labels_alike']:.2%} of voxels alike"
            )
    return found


def ensembles(cases: Sequence[str]) -> dict:
    found = {}
    for name in cases:
        rows = {}
        with tempfile.TemporaryDirectory(prefix="segfleet-") as folder:
            for networks in (1, 5):
                words = [sys.executable, __file__, name, str(networks), folder]
                subprocess.run([*words, "write"], check=True)
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                rows[networks] = json.loads(done.stdout)
        ratio = rows[5]["above_mb"] / rows[1]["above_mb"]
        whole = rows[5]["peak_mb"] / rows[1]["peak_mb"]
        found[name] = {
            "one": rows[1],
            "five": rows[5],
            "ratio_above_imports": ratio,
            "ratio": whole,
        }
        print(
            f"{name}: {rows[1]['peak_mb']:.0f} MB with one, {rows[5]['peak_mb']:.0f} MB with five: "
            f"{whole:.2f}; above the imports {ratio:.2f} (target {TARGET})"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nnunet", help="the Python of an environment that holds nnunetv2")
    parser.add_argument("--only", choices=("ensemble", "export"))
    parser.add_argument("--case", choices=CASES, action="append", help="of the ensembles; all")
    options = parser.parse_args()
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.only != "export":
        found |= ensembles(options.case or list(CASES))
    if options.nnunet and options.only != "ensemble":
        found["forty_classes"] = against_nnunet(options.nnunet)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["volume"]:
        volume_child(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] and sys.argv[1] in CASES:
        work = write_weights if sys.argv[4:] else child
        work(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
