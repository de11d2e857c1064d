"""Which voxel stands for a coarse one in the targets of deep supervision: its corner or its centre?

    python benchmarks/coarse_targets.py [--steps 120] [--seeds 3]

Two data sets (hippocampus, the left ventricle in cine MRI) and two ways of supervising coarse heads:
nnU-Net's (at 1/2 and 1/4 of the size, weights halving, the coarsest dropped) in a small plain U-Net,
and E2MISeg's (at 1/4 and 1/8, 4/7, 2/7, 1/7) in a small E2MISeg. For every seed both rules start
from the same weights and see the same batches, so that differences are paired. Scored on held-out
cases: Dice of the finest head, and of each coarse head enlarged to full size. Kept in
benchmarks/results/coarse_targets.json after every training; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segfleet.models.registry import build_model
from segfleet.pipeline.losses import deep_supervision, dice_ce

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data"))
RESULTS = HERE / "results" / "coarse_targets.json"
UNET = {"features": [8, 16, 32, 64], "strides": [1, 2, 2, 2], "kernels": [3] * 4}
UNET |= {"conv_per_stage": 1, "conv_per_decoder": 1}
E2MI = {"widths": (8, 16, 16, 32), "depths": (1,) * 4, "decoder_depth": 1, "base": 8, "heads": 2}
E2MI |= {"projected": (8, 8, 8, 4)}
Set = list[tuple[Tensor, Tensor]]  # image (1, *S) standardised, label (*S)


def corner(x: Tensor, size: torch.Size) -> Tensor:
    """Coarse voxel i takes the first of its voxels: 0 4 8 12 at a quarter."""
    for axis, new in zip(range(x.ndim - len(size), x.ndim), size, strict=True):
        x = x.index_select(axis, torch.arange(new) * x.shape[axis] // new)
    return x


RULES: dict[str, Callable[..., Tensor]] = {"corner": corner, "centre": deep_supervision.nearest}


def fitted(image: np.ndarray, label: np.ndarray, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Centre crop or zero pad to `size`; zero mean and unit deviation."""
    image = (image - image.mean()) / (image.std() + 1e-6)
    for axis, wanted in enumerate(size):
        more = max(0, wanted - image.shape[axis])
        pad = [(0, 0)] * image.ndim
        pad[axis] = (more // 2, more - more // 2)
        image, label = np.pad(image, pad), np.pad(label, pad)
        start = (image.shape[axis] - wanted) // 2
        keep = [slice(None)] * image.ndim
        keep[axis] = slice(start, start + wanted)
        image, label = image[tuple(keep)], label[tuple(keep)]
    return torch.from_numpy(image.astype(np.float32))[None], torch.from_numpy(label.astype(int))


def volume(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj).T.astype(np.float32)


def hippocampus(size: tuple[int, ...]) -> tuple[Set, Set]:
    folder = DATA / "Task04_Hippocampus"
    names = sorted(path.name for path in (folder / "labelsTr").glob("[!.]*.nii.gz"))[:80]
    found = [
        fitted(volume(folder / "imagesTr" / n), volume(folder / "labelsTr" / n), size)
        for n in names
    ]
    return found[:60], found[60:]


def heart(size: tuple[int, ...]) -> tuple[Set, Set]:
    """Stacks of slices, or with a size of two numbers the slices that show the ventricle."""
    truths = sorted((DATA / "sunnybrook_acdc_layout/training").glob("*/*_gt.nii.gz"))
    patients = sorted({path.parent for path in truths})
    held_out = set(patients[-len(patients) // 4 :])
    train, test = [], []
    for path in truths:
        image, label = volume(Path(str(path).replace("_gt", ""))), volume(path) == 3
        if len(size) == 2:
            pairs = [fitted(i, m, size) for i, m in zip(image, label, strict=True) if m.any()]
        else:
            pairs = [fitted(image, label, size)]
        (test if path.parent in held_out else train).extend(pairs)
    return train, test[::2] if len(size) == 2 else test


# data, size, network, its options, weights of its heads, classes, batch
EXPERIMENTS: dict[str, tuple] = {
    "hippocampus, nnU-Net's heads": (
        hippocampus, (32, 48, 32), "plain_unet_3d", UNET, "nnunet", 3, 2),
    "hippocampus, E2MISeg's heads": (
        hippocampus, (32, 64, 32), "e2mi_seg_mcl", E2MI, (4 / 7, 2 / 7, 1 / 7), 3, 2),
    "left ventricle, nnU-Net's heads": (
        heart, (128, 128), "plain_unet_2d", UNET, "nnunet", 2, 8),
    "left ventricle, E2MISeg's heads": (
        heart, (8, 128, 128), "e2mi_seg_acdc", E2MI, (4 / 7, 2 / 7, 1 / 7), 2, 2),
}  # fmt: skip


def batches(data: Set, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data), (batch,), generator=draw).tolist()
        images, labels = zip(*(data[i] for i in chosen), strict=True)
        yield torch.stack(images), torch.stack(labels)


def trained(data: Set, experiment: str, steps: int, seed: int, rule: str) -> torch.nn.Module:
    _, size, network, options, weights, classes, batch = EXPERIMENTS[experiment]
    torch.manual_seed(seed)
    patch = {} if options is UNET else {"patch": size}
    model = build_model(network, in_channels=1, num_classes=classes, options=options | patch)
    loss = deep_supervision.DeepSupervision(dice_ce.Loss(), weights)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    with mock.patch.object(deep_supervision, "nearest", RULES[rule]):
        for images, labels in batches(data, batch, steps, seed):
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def scores(model: torch.nn.Module, data: Set, classes: int) -> list[float]:
    """Mean Dice over cases and structures of each head, finest first."""
    enlarge = "trilinear" if data[0][1].ndim == 3 else "bilinear"
    # training mode is what returns all heads; its parts are as in evaluation
    for part in model.eval().children():
        assert not part.training
    model.training = True
    found: list[list[float]] = []
    for image, label in data:
        for head, logits in enumerate(model(image[None])):
            if head == len(found):
                found.append([])
            full = F.interpolate(logits, label.shape, mode=enlarge).argmax(1)[0]
            for k in range(1, classes):
                both = ((full == k) & (label == k)).sum()
                size = (full == k).sum() + (label == k).sum()
                found[head].append(float(2 * both / size) if size else 1.0)
    return [round(statistics.fmean(values), 5) for values in found]


def summary(dice: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The paired gain of the centre over the corner, per head, finest first."""
    pairs = list(zip(dice["corner"], dice["centre"], strict=False))
    gains = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]
    heads = list(zip(*gains, strict=True))
    return {
        "centre_minus_corner": [round(statistics.fmean(g), 5) for g in heads],
        "standard_error": [
            round(statistics.stdev(g) / len(g) ** 0.5, 5) if len(g) > 1 else None for g in heads
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if known.get("steps") != told.steps:
        known = {"steps": told.steps, "cpu_seconds": 0, "experiments": {}}
    for name, (load, size, *_, classes, _) in EXPERIMENTS.items():
        train, test = load(size)
        found = known["experiments"].setdefault(name, {"cases": [len(train), len(test)]})
        dice = found.setdefault("dice_of_each_head", {rule: [] for rule in RULES})
        for seed in range(told.seeds):
            for rule in (rule for rule in RULES if len(dice[rule]) <= seed):
                began = time.process_time()
                dice[rule].append(
                    scores(trained(train, name, told.steps, seed, rule), test, classes)
                )
                found |= summary(dice)
                known["cpu_seconds"] = round(known["cpu_seconds"] + time.process_time() - began)
                RESULTS.write_text(json.dumps(known, indent=1) + "\n")
                print(name, seed, rule, dice[rule][-1], flush=True)
    for name, found in known["experiments"].items():
        print(name, found["centre_minus_corner"], "+-", found["standard_error"])


if __name__ == "__main__":
    main()
