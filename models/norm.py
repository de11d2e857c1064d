"""LayerNorm for feature maps, and instance normalisation that may be followed by what works in
place."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, *S), one mean and variance per position."""

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(rearrange(x, "b c ... -> b ... c"))
        return rearrange(normed, "b ... c -> b c ...")


class _InPlaceNext:
    """PyTorch's instance normalisation gives out a view of what its kernel wrote. A non-linearity
    that works in place on a view makes autograd copy the whole gradient several times in the
    backward pass; on what is no view it copies nothing. The same kernel, the same bits."""

    def forward(self, x: Tensor) -> Tensor:
        trains = self.training and torch.is_grad_enabled() and not self.track_running_stats
        batched = x.ndim == self._get_no_batch_dim() + 1
        if not trains or not batched or math.prod(x.shape[2:]) < 2:
            return super().forward(x)
        samples, channels, *size = x.shape
        flat = x.contiguous().view(1, samples * channels, *size)
        weight, bias = (None if p is None else p.repeat(samples) for p in (self.weight, self.bias))
        normed = F.batch_norm(flat, None, None, weight, bias, True, 0.0, self.eps)
        return torch.ops.aten._unsafe_view(normed, x.shape)


class InstanceNorm2d(_InPlaceNext, nn.InstanceNorm2d):
    """(B, C, Y, X) -> the same."""


class InstanceNorm3d(_InPlaceNext, nn.InstanceNorm3d):
    """(B, C, Z, Y, X) -> the same."""
