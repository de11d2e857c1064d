"""Binary cross-entropy plus soft Dice: the loss of binary and of region-wise networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from segfleet.core.errors import InputError
from segfleet.pipeline.losses.soft_dice import check_dice_options, soft_dice_loss, weighted_mean


class Loss(nn.Module):
    """bce_weight · mean BCE over all channels + dice_weight · (1 - soft Dice), in float32 whatever
    the logits' type.

    `pool`: Dice per "sample" (then averaged) or over the "batch" in one sum; the channels are
    averaged in both, or with `pool_channels` counted in one sum as well (UNeXt with several
    classes).
    `channels` are those that enter the Dice (default: all). Published settings: U-Lite pool=batch
    smooth=1; ASC-Seg 0.5/0.5 smooth=1; REC-UNet smooth=1e-5 (LiTS), and bce_weight=0.5 channels=[1]
    (MSD Task08). Voxels that are not valid count nowhere.
    """

    head = "sigmoid"

    def __init__(
        self,
        bce_weight: float = 1.0,
        dice_weight: float = 1.0,
        smooth: float = 1e-5,
        pool: str = "sample",
        channels: Sequence[int] | None = None,
        pool_channels: bool = False,
    ):
        super().__init__()
        check_dice_options(pool=pool, smooth=smooth)
        if channels is not None and (not channels or len(set(channels)) != len(channels)):
            raise InputError(
                f"loss.options.channels: found {list(channels)}, expected distinct channels, or "
                "nothing for all"
            )
        self.bce_weight, self.dice_weight, self.smooth, self.pool = (
            bce_weight,
            dice_weight,
            smooth,
            pool,
        )
        self.pool_channels = pool_channels
        self.channels = None if channels is None else list(channels)

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """logits (B, K, *S), target (B, K, *S) of zeros and ones, valid (B, *S) bool or None ->
        scalar float32."""
        logits, target = logits.float(), target.float()
        surprise = binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        bce = surprise.mean() if valid is None else weighted_mean(surprise, valid)
        probabilities = self._chosen(logits).sigmoid()
        chosen = self._chosen(target)
        if self.pool_channels:
            if valid is not None:
                valid = valid.unsqueeze(1).expand(chosen.shape).flatten(1)
            probabilities, chosen = probabilities.flatten(1)[:, None], chosen.flatten(1)[:, None]
        dice = soft_dice_loss(probabilities, chosen, valid, pool=self.pool, smooth=self.smooth)
        return self.bce_weight * bce + self.dice_weight * dice

    def _chosen(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return x
        for channel in self.channels:
            if not 0 <= channel < x.shape[1]:
                raise InputError(
                    f"loss.options.channels: found channel {channel}, expected channels of "
                    f"0..{x.shape[1] - 1}"
                )
        return torch.stack([x[:, channel] for channel in self.channels], 1)
