"""From the network's grid back to the patient's: probabilities of the stored, cropped grid become labels on the raw grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from segfleet.pipeline.task import Task
from segfleet.preprocess.transforms import paste, resample_probabilities

Crop = Sequence[tuple[int, int]]


def restore(
    probabilities_KZYX: Tensor, task: Task, *, crop: Crop, raw_shape: Sequence[int], anisotropic_axis: int | None = None
) -> np.ndarray:
    """Probabilities (K, Z, Y, X) on the stored grid -> (Z, Y, X) uint8 label values on the raw grid, background outside `crop`.

    `crop` is the box (start, stop) per axis of the raw grid that was kept, as in CaseEntry. Probabilities are resampled, not labels,
    so an outline may pass between stored voxels (linear; nearest along `anisotropic_axis`). One channel is resampled at a time.
    """
    assert probabilities_KZYX.ndim == 4, tuple(probabilities_KZYX.shape)
    shape = tuple(int(stop) - int(start) for start, stop in crop)
    found = probabilities_KZYX.detach().float().cpu()
    if tuple(found.shape[1:]) != shape:
        resampled = np.empty((len(found), *shape), dtype=np.float32)
        for channel in range(len(found)):
            resampled[channel] = resample_probabilities(found[channel : channel + 1].numpy(), shape, anisotropic_axis)[0]
        found = torch.from_numpy(resampled)
    return paste(task.labels(found).numpy(), crop, tuple(raw_shape))
