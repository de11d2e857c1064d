"""Soft Dice over the foreground plus cross-entropy: the loss of multi-class networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.pipeline.losses.soft_dice import check_dice_options, soft_dice_loss, weighted_mean


class Loss(nn.Module):
    """dice_weight · (1 - soft Dice) + ce_weight · cross-entropy, in float32 whatever the logits'
    type.

    `batch` sums the Dice of a class over the whole batch instead of per sample. `background` lets
    class 0 into the Dice.
    `class_weights` (one per class) make the cross-entropy a weighted mean over voxels. Voxels that
    are not valid count nowhere.
    """

    head = "softmax"

    def __init__(
        self,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        smooth: float = 1e-5,
        batch: bool = False,
        background: bool = False,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.pool = "batch" if batch else "sample"
        check_dice_options(pool=self.pool, smooth=smooth)
        self.dice_weight, self.ce_weight, self.smooth, self.background = (
            dice_weight,
            ce_weight,
            smooth,
            background,
        )
        weights = (
            None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        )
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """logits (B, K, *S), target (B, *S) int64, valid (B, *S) bool or None -> scalar float32."""
        assert not target.is_floating_point(), "the target holds class indices, never soft labels"
        log_p = logits.float().log_softmax(1)
        one_hot = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, target.unsqueeze(1), True)
        first = 0 if self.background else 1
        dice = soft_dice_loss(
            log_p[:, first:].exp(), one_hot[:, first:], valid, pool=self.pool, smooth=self.smooth
        )
        return self.dice_weight * dice + self.ce_weight * self._cross_entropy(
            log_p, one_hot, target, valid
        )

    def _cross_entropy(
        self, log_p: Tensor, one_hot: Tensor, target: Tensor, valid: Tensor | None
    ) -> Tensor:
        # Not F.cross_entropy: its CUDA kernel for images has no deterministic form.
        surprise = -torch.where(one_hot, log_p, 0.0).sum(1)
        if valid is None and self.class_weights is None:
            return surprise.mean()
        weight = torch.ones_like(surprise) if valid is None else valid.float()
        if self.class_weights is not None:
            if len(self.class_weights) != log_p.shape[1]:
                given, classes = len(self.class_weights), log_p.shape[1]
                raise InputError(
                    f"loss.options.class_weights: found {given} weights, expected {classes}, one "
                    "per class"
                )
            weight = weight * self.class_weights[target]
        return weighted_mean(surprise, weight)
