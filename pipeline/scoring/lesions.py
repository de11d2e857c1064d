"""Detection of single lesions: connected components that are found, missed or invented."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from segfleet.pipeline.scoring.surfaces import bounding_box

# the rule of the ISLES challenge; stated in METRICS
NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)  # 26 in a volume, 8 in an image


def lesion_counts(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """(found, missed, invented) lesions of two bool masks (Z, Y, X): components of the truth that
    share a voxel with the prediction or do not, and components of the prediction that share none
    with the truth."""
    either = prediction | truth
    if not either.any():
        return 0, 0, 0
    box = bounding_box(either)
    found, missed = _touched(truth[box], prediction[box])
    _, invented = _touched(prediction[box], truth[box])
    return found, missed, invented


def _touched(mask: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """How many components of `mask` share a voxel with `other`, and how many do not."""
    labels, count = ndimage.label(mask, NEIGHBOURS)
    touched = np.zeros(count + 1, dtype=bool)
    touched[labels[other]] = True
    hit = int(touched[1:].sum())
    return hit, count - hit
