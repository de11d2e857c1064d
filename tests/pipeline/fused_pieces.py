"""PyTorch's fused pieces of batch normalisation over ranks, which only its CUDA build has, by their
formulas (aten/src/ATen/native/cuda/Normalization.cuh): for CPUs, and for the shapes of
FakeTensors."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def besides(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def shaped(value: Tensor | None, x: Tensor) -> Tensor | float:
    return 1.0 if value is None else value.view(1, -1, *[1] * (x.ndim - 2))


def batch_norm_stats(x, eps):
    variance, mean = torch.var_mean(wide(x), besides(x), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps,
                                        counts):  # fmt: skip
    count = counts.to(mean.dtype)[:, None]
    total = count.sum()
    whole = (mean * count).sum(0) / total
    variance = ((invstd**-2 - eps + (mean - whole) ** 2) * count).sum(0) / total
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(momentum * whole)
        running_var.mul_(1 - momentum).add_(momentum * variance * total / (total - 1))
    return whole, (variance + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    normed = (wide(x) - shaped(mean, x)) * shaped(invstd, x) * shaped(weight, x)
    return torch.empty_like(x).copy_(normed if bias is None else normed + shaped(bias, x))


def batch_norm_backward_reduce(gradient, x, mean, invstd, weight, by_x, by_weight, by_bias):
    gradient = wide(gradient)
    plain = gradient.sum(besides(x))
    against = (gradient * (wide(x) - shaped(mean, x))).sum(besides(x))
    none = x.new_empty(0)
    return (
        plain,
        against,
        (against * invstd).to(weight.dtype) if by_weight else none,
        plain.to(weight.dtype).clone() if by_bias else none,
    )


def batch_norm_backward_elemt(gradient, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    total = count.sum()
    along = shaped(sum_dy_xmu / total * invstd**2, x) * (wide(x) - shaped(mean, x))
    inner = wide(gradient) - shaped(sum_dy / total, x) - along
    return torch.empty_like(x).copy_(inner * shaped(invstd, x) * shaped(weight, x))


def batch_norm_update_stats(x, running_mean, running_var, momentum):
    """Of this one a CPU has a kernel, and FakeTensors lack the shapes."""
    mean = running_mean.new_empty(x.shape[1])
    return mean, mean.clone()


PIECES = (
    *(batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt),
    *(batch_norm_backward_reduce, batch_norm_backward_elemt),
)


def register(*keys: str) -> list[torch.library.Library]:
    """For these dispatch keys, as long as what is returned is kept."""
    made = []
    for key in keys:
        library = torch.library.Library("aten", "IMPL", key)
        for piece in (*PIECES, *([batch_norm_update_stats] if key == "Meta" else [])):
            library.impl(piece.__name__, piece)
        made.append(library)
    return made
