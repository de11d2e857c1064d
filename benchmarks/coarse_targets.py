"""Which voxel stands for a coarse one in the targets of deep supervision: its corner or its centre?

    python benchmarks/coarse_targets.py [--steps 250] [--seeds 3]

Two data sets (hippocampus in 3D, the left ventricle in 2D slices of cine MRI), a small nnU-Net with
three supervised heads, E2MISeg's weights. For every seed both rules start from the same weights and
see the same batches, so that differences are paired. Scored on held-out cases: Dice of the finest
head, and of each coarse head enlarged to full size. Kept in benchmarks/results/coarse_targets.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
WEIGHTS = (4 / 7, 2 / 7, 1 / 7)
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


def hippocampus() -> tuple[Set, Set]:
    folder = DATA / "Task04_Hippocampus"
    names = sorted(path.name for path in (folder / "labelsTr").glob("[!.]*.nii.gz"))[:80]
    found = [
        fitted(volume(folder / "imagesTr" / n), volume(folder / "labelsTr" / n), (32, 48, 32))
        for n in names
    ]
    return found[:60], found[60:]


def heart() -> tuple[Set, Set]:
    truths = sorted((DATA / "sunnybrook_acdc_layout/training").glob("*/*_gt.nii.gz"))
    patients = sorted({path.parent for path in truths})
    held_out = set(patients[-len(patients) // 4 :])
    train, test = [], []
    for path in truths:
        image, label = volume(Path(str(path).replace("_gt", ""))), volume(path) == 3
        pairs = [fitted(i, m, (128, 128)) for i, m in zip(image, label, strict=True) if m.any()]
        (test if path.parent in held_out else train).extend(pairs)
    return train, test[::2]


SETS = {"hippocampus_3d": (hippocampus, 3, 3, 2), "left_ventricle_2d": (heart, 2, 2, 8)}


def batches(data: Set, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data), (batch,), generator=draw).tolist()
        images, labels = zip(*(data[i] for i in chosen), strict=True)
        yield torch.stack(images), torch.stack(labels)


def trained(data: Set, dims: int, classes: int, batch: int, steps: int, seed: int, rule: str):
    torch.manual_seed(seed)
    options = {"features": [8, 16, 32, 64], "strides": [1, 2, 2, 2], "kernels": [3] * 4}
    options |= {"conv_per_stage": 1, "conv_per_decoder": 1}
    model = build_model(
        f"plain_unet_{dims}d", in_channels=1, num_classes=classes, options=options
    ).train()
    loss = deep_supervision.DeepSupervision(dice_ce.Loss(), WEIGHTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
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
    # train mode is what returns all heads; instance norms do not care
    found: list[list[float]] = [[] for _ in WEIGHTS]
    for image, label in data:
        for head, logits in enumerate(model(image[None])):
            full = F.interpolate(logits, label.shape, mode=enlarge).argmax(1)[0]
            for k in range(1, classes):
                both = ((full == k) & (label == k)).sum()
                size = (full == k).sum() + (label == k).sum()
                found[head].append(float(2 * both / size) if size else 1.0)
    return [statistics.fmean(values) for values in found]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(1)
    began, found = time.process_time(), {}
    for name, (load, dims, classes, batch) in SETS.items():
        train, test = load()
        rules: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
        for seed in range(told.seeds):
            for rule in RULES:
                model = trained(train, dims, classes, batch, told.steps, seed, rule)
                rules[rule].append([round(s, 5) for s in scores(model, test, classes)])
                print(name, seed, rule, rules[rule][-1], flush=True)
        gains = [
            [round(b - a, 5) for a, b in zip(*pair, strict=True)]
            for pair in zip(rules["corner"], rules["centre"], strict=True)
        ]
        found[name] = {
            "cases": [len(train), len(test)],
            "dice_of_each_head": rules,
            "centre_minus_corner": gains,
            "mean_gain_of_each_head": [
                round(statistics.fmean(g), 5) for g in zip(*gains, strict=True)
            ],
        }
    result = {"steps": told.steps, "seeds": told.seeds, "sets": found}
    result["cpu_seconds"] = round(time.process_time() - began)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: one["mean_gain_of_each_head"] for name, one in found.items()}))


if __name__ == "__main__":
    main()
