"""What a network costs: exact multiply-accumulates and peak tensor memory, found on the meta device
without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from segfleet.models.registry import ModelSpec, build_model, count_parameters, stage_table


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of one network at one input size."""

    parameters: int
    stages: Mapping[str, int]  # parameters of each stage
    size: tuple[int, ...]  # spatial, voxels
    macs: int  # of one forward in evaluation, batch 1; see `count_macs`
    # of one training step; see `peak_training_bytes`; None when not asked for
    peak_bytes: int | None


def profile(
    chosen: ModelSpec,
    *,
    in_channels: int | None = None,
    num_classes: int | None = None,
    size: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    batch: int = 0,
) -> Profile:
    """Costs of a registered network, by default as published. With `batch` > 0 also the peak memory
    of a training step at that batch.

    Raises ModelError when the network refuses the options or the size.
    """
    channels = in_channels or chosen.in_channels
    size = tuple(size or chosen.paper_input)
    with torch.device("meta"):
        model = build_model(
            chosen.name,
            in_channels=channels,
            num_classes=num_classes or chosen.num_classes,
            options=options,
        )
    return Profile(
        parameters=count_parameters(model),
        stages=stage_table(model, chosen),
        size=size,
        macs=count_macs(model, (1, channels, *size)),
        peak_bytes=peak_training_bytes(model, (batch, channels, *size)) if batch else None,
    )


def count_macs(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of one forward in evaluation: convolutions (transposed ones too), linear
    layers, matrix products, attention.

    Exact for these; normalisations, activations, interpolation and other elementwise work are not
    counted. `model` must lie on the meta device; shape: (B, C, [Z,] Y, X).
    """
    counter = _Flops()
    was_training = model.training
    with torch.no_grad(), counter:
        model.eval()(torch.empty(tuple(shape), device="meta"))
    model.train(was_training)
    return counter.flops // 2


def peak_training_bytes(model: nn.Module, shape: Sequence[int]) -> int:
    """Largest sum of live tensors during forward and backward in fp32: weights, buffers, input,
    activations, gradients.

    Optimizer state and the scratch space of kernels come on top. `model` must lie on the meta
    device; shape: (B, C, [Z,] Y, X).
    """
    was_training = model.training
    meter = _LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        meter.watch(tensor)
    with meter:
        outputs = model.train()(torch.empty(tuple(shape), device="meta"))
        outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        sum(output.sum() for output in outputs).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return meter.peak


class _Flops(TorchDispatchMode):
    """Adds up torch's own formulas, two flops per multiply-accumulate; FlopCounterMode without its
    table of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations create, until each is released."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.watch, result)
        return result

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._released, key, size).atexit = False

    def _released(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
