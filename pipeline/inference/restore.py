"""From the network's grid back to the patient's: probabilities of the stored, cropped grid become
labels on the raw grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segfleet.pipeline.task import Task
from segfleet.preprocess.transforms.case_transforms import paste
from segfleet.preprocess.transforms.resample import nearest

Crop = Sequence[tuple[int, int]]
SLAB = 2**24  # probabilities on the raw grid at a time


def restore(
    probabilities_KZYX: Tensor,
    task: Task,
    *,
    crop: Crop,
    raw_shape: Sequence[int],
    anisotropic_axis: int | None = None,
    transpose: Sequence[int] = (0, 1, 2),
) -> np.ndarray:
    """Probabilities (K, Z, Y, X) on the stored grid -> (Z, Y, X) uint8 label values on the raw
    grid, background outside `crop`.

    `crop` is the box (start, stop) per axis of the raw grid that was kept, as in CaseEntry.
    Probabilities are resampled, not labels, so an outline may pass between stored voxels (linear;
    nearest along `anisotropic_axis`, an axis of the raw grid). `transpose`: the raw axis that each
    stored one is. It goes slab by slab: beside the probabilities there is the label and little else.
    """
    assert probabilities_KZYX.ndim == 4, tuple(probabilities_KZYX.shape)
    shape = tuple(int(stop) - int(start) for start, stop in crop)
    found = probabilities_KZYX.detach().float().cpu()
    found = found.permute(0, *(1 + axis for axis in np.argsort(transpose)))
    label = np.empty(shape, np.uint8)
    thick = max(1, SLAB // (len(found) * shape[1] * shape[2]))
    for start in range(0, shape[0], thick):
        here = slice(start, min(start + thick, shape[0]))
        label[here] = task.labels(resampled(found, shape, anisotropic_axis, here)).numpy()
    return paste(label, crop, tuple(raw_shape))


def resampled(
    probabilities_KZYX: Tensor,
    shape: Sequence[int],
    nearest_axis: int | None = None,
    slab: slice | None = None,
) -> Tensor:
    """(K, *shape), or of it the slices `slab` along z: what
    `preprocess.resample.resample_probabilities` gives, by torch's routines, which are some twenty
    times as fast."""
    slab = slab or slice(0, shape[0])
    found = _slices(probabilities_KZYX, shape[0], slab, nearest_axis == 0)
    old = found.shape[2:]
    linear = [
        o if axis == nearest_axis else n
        for axis, (o, n) in enumerate(zip(old, shape[1:], strict=True), start=1)
    ]
    if linear != list(old):
        found = F.interpolate(found, size=linear, mode="bilinear", align_corners=False)
    if nearest_axis and found.shape[1 + nearest_axis] != shape[nearest_axis]:
        lines = nearest(found.shape[1 + nearest_axis], shape[nearest_axis])
        found = found.index_select(1 + nearest_axis, torch.from_numpy(lines))
    return found


def _slices(found: Tensor, new: int, slab: slice, whole: bool) -> Tensor:
    """(K, slab, Y, X): slices of a grid of `new` slices, each the nearest old one, or linear."""
    old = found.shape[1]
    if old == new:
        return found[:, slab]
    if whole:
        return found[:, torch.from_numpy(nearest(old, new)[slab])]
    at = ((np.arange(new)[slab] + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    low = np.minimum(at.astype(np.int64), max(old - 2, 0))
    part = torch.from_numpy((at - low).astype(np.float32))[:, None, None]
    first = found[:, torch.from_numpy(low)]
    return first.lerp(found[:, torch.from_numpy(np.minimum(low + 1, old - 1))], part)
