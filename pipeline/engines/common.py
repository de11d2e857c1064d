"""What engines share: the optimizer of a recipe and its named state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.checkpoint import CheckpointError
from segfleet.preprocess.problems import InputError


def trainable(model: nn.Module, stage: recipes.Stage) -> dict[str, nn.Parameter]:
    """Named parameters of this stage; the frozen ones stop asking for gradients. Raises InputError for a prefix nobody has."""
    named = dict(model.named_parameters())
    for prefix in stage.freeze:
        if not any(name.startswith(prefix) for name in named):
            parts = sorted({name.split(".", 1)[0] for name in named})
            raise InputError(f"freeze: no parameter name begins with '{prefix}'; names begin with: {', '.join(parts)}")
    chosen = {}
    for name, parameter in named.items():
        parameter.requires_grad_(not any(name.startswith(prefix) for prefix in stage.freeze))
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise InputError(f"freeze: {', '.join(stage.freeze)} leaves nothing to train")
    return chosen


def build_optimizer(named: dict[str, nn.Parameter], options: recipes.Optimizer, lr: float, fused: bool = True) -> Optimizer:
    """Two groups: weights with decay; biases, norms and parameters marked `_no_weight_decay` without."""
    plain = [p for p in named.values() if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)]
    marked = {id(p) for p in plain}
    groups = [
        {"params": [p for p in named.values() if id(p) not in marked], "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "sgd":
        return SGD(groups, lr=lr, momentum=options.momentum, nesterov=options.nesterov and options.momentum > 0, fused=fused)
    kind = AdamW if options.name == "adamw" else Adam
    return kind(groups, lr=lr, betas=options.betas, fused=fused)


def optimizer_tensors(optimizer: Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """<parameter>.<moment> -> tensor."""
    return {
        f"{name}.{key}": value for name, parameter in named.items() for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def load_optimizer(optimizer: Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Put moments back by name. Parameters the checkpoint has no moments of start afresh."""
    for name, parameter in named.items():
        moments = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        if moments:
            optimizer.state[parameter] = {
                key: value.to(parameter.device, torch.float32)
                if value.ndim == 0
                else torch.empty_like(parameter).copy_(value)  # in the parameter's memory format
                for key, value in moments.items()
            }


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy weights and buffers by name, in place. Raises CheckpointError that names what does not fit."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if missing or extra or shapes:
        found = [f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []
        found += [f"unknown {extra[0]} and {len(extra) - 1} more"] if extra else []
        raise CheckpointError(f"checkpoint: {where} does not fit this network: {'; '.join(found + sorted(shapes)[:3])}")
    for name, value in own.items():
        value.copy_(tensors[name])
