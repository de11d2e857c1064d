"""Activation checkpointing for any network of this room: less memory, one more forward, the same
gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def activation_checkpointing(model: nn.Module) -> nn.Module:
    """Recompute each top-level stage of `model` in the backward pass instead of keeping its
    activations. Returns `model`, changed.

    Parameter names, buffers, random numbers, autocast and gradients stay as they were; running
    statistics are updated once. Evaluation and
    `torch.no_grad` run as before. Under `torch.compile` it does nothing: the compiler chooses for
    itself what to recompute.
    """
    for stage in checkpointed_stages(model):
        if not isinstance(stage.forward, partial):  # asked for twice
            stage.forward = partial(_recomputed, stage, stage.forward)
    return model


def checkpointed_stages(model: nn.Module) -> list[nn.Module]:
    """The children that hold parameters, with lists of modules opened; an only child is opened
    too."""
    stages = list(_open(model))
    while len(stages) == 1 and any(True for _ in stages[0].children()):
        stages = list(_open(stages[0]))
    return stages


def _open(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _open(child)
        elif any(True for _ in child.parameters()):
            yield child


def _recomputed(stage: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_at_rest(stage)),
        **kwargs,
    )


@contextmanager
def _statistics_at_rest(stage: nn.Module) -> Iterator[None]:
    """The same normalisation without a second update of the running statistics: momentum 0, and the
    counter out of reach."""
    norms = [
        m
        for m in stage.modules()
        if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
    saved = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in saved:
            norm.momentum, norm.num_batches_tracked = momentum, count
