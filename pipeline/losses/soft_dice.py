"""The soft Dice coefficient, as every Dice loss here uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from segfleet.core.errors import InputError
from segfleet.pipeline.ranks import sum_over_ranks

POOLS = ("sample", "batch")


def soft_dice(
    probabilities: Tensor, target: Tensor, valid: Tensor | None, *, pool: str, smooth: float
) -> Tensor:
    """Mean over channels of (2 Σpt + smooth) / (Σp + Σt + smooth), per sample: (B,), or over the
    whole batch in one sum: (1,).

    probabilities (B, K, *S) float32 and target (B, K, *S) of zeros and ones; voxels where valid (B,
    *S) is False are left out of the sums. A structure that is absent and not predicted scores 1.
    `pool="batch"` means the samples of all ranks.
    """
    assert probabilities.shape == target.shape, (
        f"probabilities {tuple(probabilities.shape)}, target {tuple(target.shape)}"
    )
    target = target.to(probabilities.dtype)
    if valid is not None:
        mask = valid.unsqueeze(1).to(probabilities.dtype)
        probabilities, target = probabilities * mask, target * mask
    axes = tuple(range(2, probabilities.ndim))
    overlap, predicted, present = (
        (quantity.sum(axes)) for quantity in (probabilities * target, probabilities, target)
    )
    if pool == "batch":
        overlap, predicted, present = sum_over_ranks(
            torch.stack([overlap, predicted, present]).sum(1, keepdim=True)
        )
    return ((2 * overlap + smooth) / (predicted + present + smooth)).mean(1)


def soft_dice_loss(
    probabilities: Tensor, target: Tensor, valid: Tensor | None, *, pool: str, smooth: float
) -> Tensor:
    """1 - `soft_dice`, averaged over the samples (of all ranks) that have a valid voxel; 0, with a
    gradient graph, when none has."""
    lost = 1 - soft_dice(probabilities, target, valid, pool=pool, smooth=smooth)
    if valid is None or pool == "batch":
        return lost.mean()
    counts = valid.flatten(1).any(1).to(lost.dtype)
    return weighted_mean(lost, counts)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Of all values of all ranks, in one mean: ranks may have unlike sums of weights. 0 where all
    weights are 0."""
    total, weight = sum_over_ranks(
        torch.stack([(values * weights).sum(), weights.sum().to(values.dtype)])
    )
    return total / torch.where(weight > 0, weight, 1.0)


def check_dice_options(*, pool: str, smooth: float) -> None:
    """Raises InputError for an unknown way of pooling or a smoothing term that leaves 0/0 for an
    absent structure."""
    if pool not in POOLS:
        raise InputError(f"loss.options.pool: found '{pool}', expected one of: {', '.join(POOLS)}")
    if smooth <= 0:
        raise InputError(
            f"loss.options.smooth: found {smooth}, expected a positive number; without it an "
            "absent structure is 0/0"
        )
