"""Which voxel stands for a coarse one in the targets of deep supervision: its corner or its centre?

    python benchmarks/coarse_targets.py [--steps 150] [--seeds 3]

Two data sets (slices of hippocampi, and of the left ventricle in cine MRI) and two ways of
supervising coarse heads in a small plain U-Net: nnU-Net's (at 1/2 of the size, weights 2/3 and 1/3,
the coarsest dropped) and E2MISeg's (at 1/4 and 1/8, weights 4/7, 2/7, 1/7). For every seed both
rules start from the same weights and see the same batches, so that differences are paired. Scored
on held-out cases: Dice of the finest head, and of each supervised coarse head enlarged to full
size. Kept in benchmarks/results/coarse_targets.json after every training; the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
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
UNET = {"features": [8, 16, 32, 64], "conv_per_stage": 1, "conv_per_decoder": 1}
HEADS = {  # options that put the heads at the sizes, weights of the heads
    "nnU-Net": ({"strides": [1, 2, 2, 2], "kernels": [3, 3, 3, 3]}, (2 / 3, 1 / 3, 0.0)),
    "E2MISeg": ({"strides": [1, 4, 2, 2], "kernels": [3, 5, 3, 3]}, (4 / 7, 2 / 7, 1 / 7)),
}
BATCH = 8
Set = list[tuple[Tensor, Tensor]]  # image (1, Y, X) standardised, label (Y, X)


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


def slices(image: np.ndarray, label: np.ndarray, size: tuple[int, ...], every: int) -> Set:
    """Each `every`-th slice of those that hold a structure."""
    held = [i for i in range(len(label)) if label[i].any()][::every]
    return [fitted(image[i], label[i], size) for i in held]


def hippocampus() -> tuple[Set, Set]:
    folder = DATA / "Task04_Hippocampus"
    names = sorted(path.name for path in (folder / "labelsTr").glob("[!.]*.nii.gz"))[:80]
    found = [
        slices(volume(folder / "imagesTr" / n), volume(folder / "labelsTr" / n), (48, 32), 3)
        for n in names
    ]
    return sum(found[:60], []), sum(found[60:], [])


def heart() -> tuple[Set, Set]:
    truths = sorted((DATA / "sunnybrook_acdc_layout/training").glob("*/*_gt.nii.gz"))
    patients = sorted({path.parent for path in truths})
    held_out = set(patients[-len(patients) // 4 :])
    train, test = [], []
    for path in truths:
        image, label = volume(Path(str(path).replace("_gt", ""))), volume(path) == 3
        (test if path.parent in held_out else train).extend(slices(image, label, (96, 96), 1))
    return train, test


SETS = {"hippocampus": (hippocampus, 3), "left ventricle": (heart, 2)}  # structures and background


def batches(data: Set, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data), (batch,), generator=draw).tolist()
        images, labels = zip(*(data[i] for i in chosen), strict=True)
        yield torch.stack(images), torch.stack(labels)


def trained(
    data: Set, classes: int, heads: str, steps: int, seed: int, rule: str
) -> torch.nn.Module:
    torch.manual_seed(seed)
    options, weights = HEADS[heads]
    model = build_model(
        "plain_unet_2d", in_channels=1, num_classes=classes, options=UNET | options
    ).train()
    loss = deep_supervision.DeepSupervision(dice_ce.Loss(), weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    with mock.patch.object(deep_supervision, "nearest", RULES[rule]):
        for images, labels in batches(data, BATCH, steps, seed):
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def scores(model: torch.nn.Module, data: Set, classes: int, heads: str) -> list[float]:
    """Mean Dice over slices and their structures of each supervised head, finest first."""
    supervised = sum(weight > 0 for weight in HEADS[heads][1])
    found: list[list[float]] = [[] for _ in range(supervised)]
    # in training mode all heads answer; instance norms do not care
    for image, label in data:
        for head, logits in enumerate(model(image[None])[:supervised]):
            full = F.interpolate(logits, label.shape, mode="bilinear").argmax(1)[0]
            for k in range(1, classes):
                if (label == k).any():
                    both = ((full == k) & (label == k)).sum()
                    found[head].append(float(2 * both / ((full == k).sum() + (label == k).sum())))
    return [round(statistics.fmean(values), 5) for values in found]


def summary(dice: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The paired gain of the centre over the corner, per head, finest first."""
    pairs = zip(dice["corner"], dice["centre"], strict=False)  # the last may lack its other
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
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if known.get("steps") != told.steps:
        known = {"steps": told.steps, "batch": BATCH, "cpu_seconds": 0, "experiments": {}}
    data = {name: load() for name, (load, _) in SETS.items()}
    # seed by seed, so that a run that was cut short has all experiments as often
    for seed, (name, (_, classes)), heads in itertools.product(
        range(told.seeds), SETS.items(), HEADS
    ):
        key, (train, test) = f"{name}, heads as in {heads}", data[name]
        found = known["experiments"].setdefault(key, {"slices": [len(train), len(test)]})
        dice = found.setdefault("dice_of_each_head", {rule: [] for rule in RULES})
        for rule in (rule for rule in RULES if len(dice[rule]) <= seed):
            began = time.process_time()
            model = trained(train, classes, heads, told.steps, seed, rule)
            dice[rule].append(scores(model, test, classes, heads))
            found |= summary(dice)
            known["cpu_seconds"] = round(known["cpu_seconds"] + time.process_time() - began)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            print(key, seed, rule, dice[rule][-1], flush=True)
    for key, found in known["experiments"].items():
        print(key, found["centre_minus_corner"], "+-", found["standard_error"])


if __name__ == "__main__":
    main()
