"""Cross-entropy plus scale-sensitive Dice: E2MISeg's loss, a soft Dice multiplied by the agreement
of the volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from segfleet.core.errors import InputError
from segfleet.pipeline.losses.soft_dice import check_dice_options, weighted_mean
from segfleet.pipeline.ranks import sum_over_ranks


def volume_agreement(predicted: Tensor, present: Tensor, smooth: float = 1e-5) -> Tensor:
    """α = (min(P, T) + δ²/4 + smooth) / (max(P, T) + δ²/4 + smooth), δ = P - T, for volumes P and T
    in voxels.

    It is lowest, 1 - 1/(1 + √m) with m = min(P, T), at δ = 2√m: small objects with a moderate
    volume error are punished most.
    """
    spread = ((predicted - present) / 2).square()
    return (torch.minimum(predicted, present) + spread + smooth) / (
        torch.maximum(predicted, present) + spread + smooth
    )


class Loss(nn.Module):
    """ce_weight · cross-entropy - ss_weight · mean of α · Dice, in float32 whatever the logits'
    type; not below -ss_weight.

    Dice = (2 tp + smooth) / (2 tp + fp + fn + smooth) of soft counts per sample and structure, or
    (`batch`) over the whole batch. The mean runs over samples and structures, of a softmax head
    without the background unless `background`. Gradients flow through α too.
    `normalised` gives α the volumes as fractions of the patch, which makes it close to min/max,
    independent of resolution. A sigmoid head takes binary cross-entropy, averaged over its
    channels. Published ss_weight: 1.45 (ACDC, BraTS), 2 (MCL). Voxels that are not valid count
    nowhere; samples without a valid voxel are left out.
    """

    head = "any"

    def __init__(
        self,
        head: str = "softmax",
        ss_weight: float = 2.0,
        ce_weight: float = 1.0,
        smooth: float = 1e-5,
        batch: bool = False,
        background: bool = False,
        normalised: bool = False,
    ):
        super().__init__()
        check_dice_options(pool="batch" if batch else "sample", smooth=smooth)
        if head == "sigmoid" and background:
            raise InputError(
                "loss.options.background: a sigmoid head has no background channel; leave this "
                "option out"
            )
        self.softmax, self.ss_weight, self.ce_weight, self.smooth = (
            head == "softmax",
            ss_weight,
            ce_weight,
            smooth,
        )
        self.batch, self.normalised = batch, normalised
        self.first = 1 if self.softmax and not background else 0

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """logits (B, K, *S), target (B, *S) int64 (softmax) or (B, K, *S) (sigmoid), valid (B, *S)
        bool or None -> scalar float32."""
        logits = logits.float()
        if self.softmax:
            log_p = logits.log_softmax(1)
            truth = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, target.unsqueeze(1), True)
            surprise, p, truth = -torch.where(truth, log_p, 0.0).sum(1), log_p.exp(), truth.float()
        else:
            truth = target.float()
            surprise, p = (
                binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1),
                logits.sigmoid(),
            )
        cross_entropy = surprise.mean() if valid is None else weighted_mean(surprise, valid)
        valid = torch.ones_like(surprise) if valid is None else valid.float()
        return self.ce_weight * cross_entropy - self.ss_weight * self._score(
            p[:, self.first :], truth[:, self.first :], valid
        )

    def _score(self, p: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Mean of α · Dice."""
        axes = tuple(range(2, p.ndim))
        p, truth = p * valid.unsqueeze(1), truth * valid.unsqueeze(1)
        overlap, predicted, present = ((quantity.sum(axes)) for quantity in (p * truth, p, truth))
        voxels = valid.flatten(1).sum(1, keepdim=True)
        if self.batch:
            sums = torch.cat([overlap, predicted, present, voxels], 1).sum(0, keepdim=True)
            overlap, predicted, present, voxels = sum_over_ranks(sums).split(
                [*[p.shape[1]] * 3, 1], 1
            )
        dice = (2 * overlap + self.smooth) / (predicted + present + self.smooth)
        volumes = (predicted, present)
        if self.normalised:
            volumes = tuple(volume / voxels.clamp(min=1) for volume in volumes)
        scores = (volume_agreement(*volumes, self.smooth) * dice).mean(1)
        counts = (voxels > 0).flatten().to(scores.dtype)
        return weighted_mean(scores, counts)
