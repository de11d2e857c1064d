"""LayerNorm for feature maps."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, *S), one mean and variance per position."""

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(rearrange(x, "b c ... -> b ... c"))
        return rearrange(normed, "b ... c -> b c ...")
