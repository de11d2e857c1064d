"""Batch normalisation over the whole batch, however many ranks share it. The result must not depend
on the number of ranks.

`torch.nn.SyncBatchNorm` does it on GPUs only. This one is made of PyTorch's own kernels and runs
wherever the ranks do; on GPUs `fused_norm` takes its place.
"""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

from segfleet.pipeline.ranks import Ranks


def synchronise(model: nn.Module, ranks: Ranks, compiled: bool = False) -> None:
    """Batch normalisations of `model` take their statistics over all ranks while training. Names
    and evaluation stay as they are. `compiled`: the model is going to be."""
    if ranks.size > 1 and ranks.device.type == "cuda":
        from segfleet.pipeline.training import fused_norm

        fused_norm.fuse(model, ranks)
    elif ranks.size > 1:
        if compiled:  # Collectives in the middle of a graph. The import takes as long as PyTorch's.
            plain = inspect.unwrap(_Synchronised._normalise)
            _Synchronised._normalise = torch.compiler.disable(plain)
        for module in model.modules():
            if type(module) in SYNCHRONISED:
                module.__class__ = SYNCHRONISED[type(module)]


class _Synchronised(_BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        mean, variance = statistics(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        if count < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{tuple(x.shape)} on every rank"
            )
        if self.running_mean is not None:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            momentum = (
                1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            )
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_(
                (variance * (count / (count - 1))).to(self.running_var), momentum
            )
        return _Normalise.apply(
            x, self.weight, self.bias, mean.to(wide(x)), variance.to(wide(x)), self.eps, count
        )


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every channel, float64, over the samples and voxels of all
    ranks.

    Ranks have equal shares of a batch (`loader.check_shares`), so nothing is counted, and nothing
    waits for the device.
    """
    with torch.no_grad():
        # in and out: at least float32, whatever x is
        none = torch.zeros(x.shape[1], dtype=wide(x), device=x.device)
        # as a single rank does it
        mean, variance = torch.batch_norm_update_stats(x, none, none.clone(), 0.0)
        own = torch.stack([mean, variance]).double()
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances = torch.stack(every).unbind(1)
        mean = means.mean(0)
        return mean, (variances + (means - mean) ** 2).mean(0)


class _Normalise(Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance come from the x of
    all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps, count):
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps, ctx.count = eps, count
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, scale = ctx.saved_tensors
        wanted = [False, True, True]
        # of this rank's samples: sum of gradient * (x - mean) * scale, and sum of gradient, per
        # channel
        _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient,
            x,
            torch.ones_like(mean) if weight is None else weight,
            None,
            None,
            mean,
            scale,
            True,
            ctx.eps,
            wanted,
        )
        sums = torch.stack([by_weight, by_bias]).to(mean.dtype)
        dist.all_reduce(sums)
        normalised, plain = sums / ctx.count
        # gradient of x: weight * scale * (gradient - mean of gradient - (x - mean) * scale * mean
        # of gradient * (x - mean) * scale)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        factor = scale if weight is None else scale * weight
        slope = -factor * scale * normalised
        shift = -factor * plain - slope * mean
        factor, slope, shift = (value.view(shape) for value in (factor, slope, shift))
        by_x = (
            torch.mul(gradient.to(mean.dtype), factor)
            .addcmul_(x.to(mean.dtype), slope)
            .add_(shift)
            .to(x.dtype)
        )
        wants = ctx.needs_input_grad
        return (
            by_x,
            by_weight if wants[1] else None,
            by_bias if wants[2] else None,
            None,
            None,
            None,
            None,
        )


SYNCHRONISED = {
    kind: type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
