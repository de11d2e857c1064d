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


def restore(
    probabilities_KZYX: Tensor,
    task: Task,
    *,
    crop: Crop,
    raw_shape: Sequence[int],
    anisotropic_axis: int | None = None,
) -> np.ndarray:
    """Probabilities (K, Z, Y, X) on the stored grid -> (Z, Y, X) uint8 label values on the raw
    grid, background outside `crop`.

    `crop` is the box (start, stop) per axis of the raw grid that was kept, as in CaseEntry.
    Probabilities are resampled, not labels, so an outline may pass between stored voxels (linear;
    nearest along `anisotropic_axis`).
    """
    assert probabilities_KZYX.ndim == 4, tuple(probabilities_KZYX.shape)
    shape = tuple(int(stop) - int(start) for start, stop in crop)
    found = probabilities_KZYX.detach().float().cpu()
    return paste(
        task.labels(resampled(found, shape, anisotropic_axis)).numpy(), crop, tuple(raw_shape)
    )


def resampled(
    probabilities_KZYX: Tensor, shape: Sequence[int], nearest_axis: int | None = None
) -> Tensor:
    """(K, *shape): what `preprocess.resample.resample_probabilities` gives, by torch's routine,
    which is some twenty times as fast."""
    old = probabilities_KZYX.shape[1:]
    linear = [
        o if axis == nearest_axis else n for axis, (o, n) in enumerate(zip(old, shape, strict=True))
    ]
    found = probabilities_KZYX
    if linear != list(old):
        found = F.interpolate(found[None], size=linear, mode="trilinear", align_corners=False)[0]
    if nearest_axis is not None and old[nearest_axis] != shape[nearest_axis]:
        found = found.index_select(
            1 + nearest_axis, torch.from_numpy(nearest(old[nearest_axis], shape[nearest_axis]))
        )
    return found
