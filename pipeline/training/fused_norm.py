"""Batch normalisation over the ranks of PyTorch's fused CUDA kernels, those of its SyncBatchNorm.

A layer launches five kernels and a collective forward, and three and one backward. The collectives
have a group of their own, so that none waits behind a bucket of gradients. Statistics and the
normalisation are operators of their own: `torch.compile` traces a network with them as one graph.

The statistics of all ranks are merged in float32, in the order of the ranks: every rank has the
same bits, and another number of ranks the same statistics up to rounding. No gradient asks how many
values a rank has: ranks have equal shares of a batch (`loader.check_shares`).
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segfleet.pipeline.ranks import Ranks


class _Group:
    """The group of all ranks that only normalisations use; made anew where the ranks are others."""

    ranks: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None

    @classmethod
    def make(cls, device: torch.device) -> None:
        """Every rank must come here."""
        if cls.world is not dist.group.WORLD:
            # of one backend: a second mesh of gloo's would double every rank's connections
            backend = "nccl" if device.type == "cuda" else "gloo"
            cls.ranks, cls.world = dist.new_group(backend=backend), dist.group.WORLD


def fuse(model: nn.Module, ranks: Ranks) -> None:
    """Batch normalisations of `model` take their statistics over all ranks while training."""
    layers = [module for module in model.modules() if type(module) in FUSED]
    if layers:
        _Group.make(ranks.device)
    for layer in layers:
        layer.__class__ = FUSED[type(layer)]
        layer.over = ranks.size


class _Fused(_BatchNorm):
    over = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if x.numel() // x.shape[1] * self.over < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{tuple(x.shape)} on every rank"
            )
        momentum = 0.0
        if self.running_mean is not None:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            momentum = (
                1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            )
        x = x.contiguous(memory_format=layout_of(x))
        mean, scale = statistics(
            x.detach(), self.running_mean, self.running_var, momentum, self.eps, self.over
        )
        return normalise(x, self.weight, self.bias, mean, scale, self.eps, self.over)


FUSED = {
    kind: type(f"Fused{kind.__name__}", (_Fused, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout in which the kernels take a map: its own, if it is one of theirs."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


@functools.lru_cache(maxsize=256)
def counts(per_rank: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values per channel of every rank, on the device; made once per size of a map."""
    return torch.full((ranks,), per_rank, dtype=dtype, device=device)


# PyTorch 2.13 renamed it
ALL_GATHER = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))
# Collectives are left out of CUDA graphs (`engine.compile: reduce-overhead`).
OUTSIDE = (torch.Tag.cudagraph_unsafe,)
STATISTICS = (
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, "
    "int ranks) -> (Tensor, Tensor)"
)


@torch.library.custom_op(
    "segfleet::statistics_over_ranks",
    mutates_args=("running_mean", "running_var"),
    schema=STATISTICS,
    tags=OUTSIDE,
)
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    ranks: int,
) -> tuple[Tensor, Tensor]:
    """Mean of every channel and 1 / sqrt(variance + eps) over all ranks; the running ones move."""
    own = torch.cat(torch.batch_norm_stats(x, eps))
    every = own.new_empty(ranks, own.numel())
    getattr(dist, ALL_GATHER)(every.view(-1), own, group=_Group.ranks)
    means, scales = every.chunk(2, 1)
    kind = own.dtype if running_mean is None else running_mean.dtype
    per_rank = counts(x.numel() // x.shape[1], ranks, kind, x.device)
    return torch.batch_norm_gather_stats_with_counts(
        x, means, scales, running_mean, running_var, momentum, eps, per_rank
    )


@statistics.register_fake
def _(x, running_mean, running_var, momentum, eps, ranks):
    kind = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[1], dtype=kind) for _ in range(2))


@torch.library.custom_op(
    "segfleet::normalise",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor scale, float eps, "
    "int ranks) -> Tensor",
)
def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    eps: float,
    ranks: int,
) -> Tensor:
    """(x - mean) * scale * weight + bias, where mean and scale come from the x of all ranks."""
    return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)


@normalise.register_fake
def _(x, weight, bias, mean, scale, eps, ranks):
    return torch.empty_like(x)


@torch.library.custom_op(
    "segfleet::normalise_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor? weight, Tensor mean, Tensor scale, int ranks) "
    "-> Tensor[]",
    tags=OUTSIDE,
)
def normalise_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, ranks: int
) -> list[Tensor]:
    """Gradients of x and, of this rank's samples, of weight and bias, if there are any."""
    affine = weight is not None
    plain, against, *by = torch.batch_norm_backward_reduce(
        gradient, x, mean, scale, weight, True, affine, affine
    )
    sums = torch.cat([plain, against])
    dist.all_reduce(sums, group=_Group.ranks)
    plain, against = sums.chunk(2)
    per_rank = counts(x.numel() // x.shape[1], ranks, torch.int32, x.device)
    by_x = torch.batch_norm_backward_elemt(
        gradient, x, mean, scale, weight, plain, against, per_rank
    )
    return [by_x, *by] if affine else [by_x]


@normalise_backward.register_fake
def _(gradient, x, weight, mean, scale, ranks):
    affine = [] if weight is None else [torch.empty_like(weight), torch.empty_like(weight)]
    return [torch.empty_like(x), *affine]


def _setup(ctx, inputs, output) -> None:
    x, weight, _, mean, scale, _, ctx.ranks = inputs
    ctx.save_for_backward(x, weight, mean, scale)


def _backward(ctx, gradient):
    x, weight, mean, scale = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=layout_of(x))
    by_x, *by = normalise_backward(gradient, x, weight, mean, scale, ctx.ranks)
    by_weight, by_bias = by or (None, None)
    return by_x, by_weight, by_bias, None, None, None, None


normalise.register_autograd(_backward, setup_context=_setup)
