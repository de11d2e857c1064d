"""One loss over the several outputs of a deeply supervised network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError


class DeepSupervision(nn.Module):
    """Weighted sum of `loss` over a list of logits, finest first. A single tensor of logits goes to
    `loss` as it is.

    weights "nnunet": halving per level, the lowest level dropped, normalised to sum 1. A list is
    used as it is, one weight per output: E2MISeg [4/7, 2/7, 1/7], ASC-Seg [1, 1, 1, 1].
    """

    def __init__(self, loss: nn.Module, weights: str | Sequence[float] = "nnunet"):
        super().__init__()
        numbers = isinstance(weights, Sequence) and not isinstance(weights, str)
        if weights != "nnunet" and not (
            numbers and all(weight >= 0 for weight in weights) and sum(weights) > 0
        ):
            raise InputError(
                f"loss.deep_supervision: found {weights!r}, expected 'nnunet' or a list of "
                "weights >= 0, not all zero"
            )
        self.loss, self.weights = loss, weights

    def forward(
        self, logits: Tensor | Sequence[Tensor], target: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """logits: (B, K, *S) or a list of such, *S differing; target and valid as `loss` takes
        them, at full size -> scalar float32."""
        if isinstance(logits, Tensor):
            return self.loss(logits, target, valid)
        total = target.new_zeros((), dtype=torch.float32)
        for output, weight in zip(logits, self.level_weights(len(logits)), strict=True):
            if weight == 0:
                total = total + _nothing(output)
            else:
                size = output.shape[2:]
                total = total + weight * self.loss(
                    output, nearest(target, size), None if valid is None else nearest(valid, size)
                )
        return total

    def level_weights(self, levels: int) -> tuple[float, ...]:
        """The weight of each of `levels` outputs. Raises InputError when a given list has another
        length."""
        if self.weights == "nnunet":
            weighted = max(levels - 1, 1)
            raw = [0.5**level if level < weighted else 0.0 for level in range(levels)]
            return tuple(weight / sum(raw) for weight in raw)
        if len(self.weights) != levels:
            raise InputError(
                f"loss.deep_supervision: found {len(self.weights)} weights, expected {levels}, "
                "one per output of the network"
            )
        return tuple(self.weights)


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resample the last len(size) axes to `size`: coarse voxel i takes the voxel its centre lies
    in, ⌊(i + 1/2) · old / new⌋, as PyTorch's "nearest-exact", which nnU-Net uses."""
    for axis, new in zip(range(x.ndim - len(size), x.ndim), size, strict=True):
        old = x.shape[axis]
        if old != new:
            x = x.index_select(
                axis, (2 * torch.arange(new, device=x.device) + 1) * old // (2 * new)
            )
    return x


def _nothing(output: Tensor) -> Tensor:
    """Zero, with a gradient of zeros even if `output` overflowed: data-parallel training wants
    every parameter in every step."""
    return (
        output.float()
        .masked_fill(torch.ones((), dtype=torch.bool, device=output.device), 0.0)
        .sum()
    )
