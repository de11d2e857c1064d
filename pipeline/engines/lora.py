"""Low-rank adaptation (Hu et al. 2022, LoRA): of a linear or convolution layer the inherited weight
stays, and a product of two thin matrices is learnt and added to it.

A convolution's weight (out, in, *kernel) is taken as a matrix of `out` rows. Checkpoints hold the
sum under the layer's own name, so that scoring, prediction, export and later stages read a network
without adapters; the matrices lie beside it, for the stage itself to be resumed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from segfleet.core.errors import InputError
from segfleet.models.registry import ModelSpec, belongs
from segfleet.pipeline.stage import Stage

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
PART, INHERITED = ".parametrizations.weight.", "original"
MOMENTS = (".down", ".up")


class LowRank(nn.Module):
    """weight -> weight + scale * up @ down, in the weight's shape; at first the weight itself."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, seed: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        factory = {"dtype": weight.dtype, "device": weight.device}
        bound = 1 / math.sqrt(columns)  # as PyTorch initialises a linear layer
        if weight.is_meta:
            drawn = torch.empty(rank, columns, **factory)
        else:
            rng = torch.Generator().manual_seed(seed)
            drawn = (torch.rand(rank, columns, generator=rng) * 2 - 1).to(**factory) * bound
        self.down, self.up = nn.Parameter(drawn), nn.Parameter(torch.zeros(rows, rank, **factory))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).view(weight.shape)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return PART in name and name.endswith(MOMENTS)


def adapt(model: nn.Module, stage: Stage, spec: ModelSpec, seed: int) -> None:
    """Give every linear and convolution layer an adapter that is smaller than its weight, but for
    the head, which is trained whole, and what `stage.freeze` names. Raises InputError where no
    layer is left."""
    options = stage.lora
    for name, module in list(model.named_modules()):
        full = f"{name}.weight"
        if not isinstance(module, LAYERS) or any(
            belongs(full, p, spec) for p in ("head", *stage.freeze)
        ):
            continue
        weight = module.weight
        rows, columns = weight.shape[0], weight[0].numel()
        if options.rank * (rows + columns) >= rows * columns:
            continue
        own = hashlib.blake2b(f"{seed} {full}".encode(), digest_size=7).digest()
        part = LowRank(weight, options.rank, options.alpha, int.from_bytes(own))
        parametrize.register_parametrization(module, "weight", part)
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        raise InputError(
            f"lora.rank: found {options.rank}, but no layer of {spec.name} that is not frozen has "
            "a weight that adapters of this rank are smaller than; take a smaller rank"
        )


def merged(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of a network by the names it has without adapters, these added to their weights;
    `values`: of other parameters than the model's own, such as averaged ones."""
    own = model.state_dict() if values is None else values
    if not any(PART in name for name in own):
        return dict(own)
    state = {}
    for name, value in own.items():
        layer, part, rest = name.partition(PART)
        if not part:
            state[name] = value
        elif rest == INHERITED:
            down, up = (own[f"{layer}{PART}0{factor}"] for factor in MOMENTS)
            scale = model.get_submodule(f"{layer}{PART}0").scale
            state[f"{layer}.weight"] = (value + scale * (up @ down).view(value.shape)).detach()
    return state


def adapters(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of named parameters that belong to adapters."""
    return {name: value for name, value in values.items() if is_adapter(name)}


def divided(
    model: nn.Module, weights: Mapping[str, Tensor], parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of a network with adapters from a checkpoint's `weights` and adapters: what was
    inherited is in the network already."""
    own = model.state_dict()
    if not any(PART in name for name in own):
        return dict(weights)
    inherited = {name: own[name] for name in own if name.endswith(PART + INHERITED)}
    gone = {name.replace(PART + INHERITED, ".weight") for name in inherited}
    return {n: v for n, v in weights.items() if n not in gone} | inherited | dict(parts)
