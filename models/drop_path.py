"""Stochastic depth (Huang et al. 2016), drawn for every sample."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, leaves out a residual branch for a sample with probability `rate` and scales the
    kept ones by 1/(1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep_prob = 1 - self.rate
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob) / keep_prob
