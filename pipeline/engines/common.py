"""What engines share: the optimizer of a recipe and its named state, averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline import sections
from segfleet.pipeline.checkpoint import Checkpoint, CheckpointError, Tensors
from segfleet.pipeline.engines import lora
from segfleet.pipeline.engines.base import Setup
from segfleet.pipeline.stage import Stage


def trainable(model: nn.Module, stage: Stage, spec: registry.ModelSpec) -> dict[str, nn.Parameter]:
    """Named parameters of this stage; the frozen ones stop asking for gradients. Raises InputError
    for a role or prefix that no parameter has."""
    named = dict(model.named_parameters())
    for key, parts in (("freeze", stage.freeze), ("rates", tuple(stage.rates))):
        for part in parts:
            if not any(registry.belongs(name, part, spec) for name in named):
                beginnings = sorted({name.split(".", 1)[0] for name in named})
                raise InputError(
                    f"{key}: no parameter name begins with '{part}'; roles: "
                    f"{', '.join(registry.ROLES)}; names begin with: {', '.join(beginnings)}"
                )
    chosen = {}
    for name, parameter in named.items():
        parameter.requires_grad_(not frozen(name, stage, spec))
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise InputError(f"freeze: {', '.join(stage.freeze)} leaves nothing to train")
    return chosen


def frozen(name: str, stage: Stage, spec: registry.ModelSpec) -> bool:
    if stage.lora and not lora.is_adapter(name) and not registry.belongs(name, "head", spec):
        return True
    return any(registry.belongs(name, part, spec) for part in stage.freeze)


def hold_statistics(model: nn.Module, stage: Stage, spec: registry.ModelSpec) -> list[nn.Module]:
    """Frozen batch normalisations, which evaluate from now on: their running statistics are those
    they came with. Whoever puts the model into train mode does it again."""
    held = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and frozen(f"{name}.", stage, spec)
    ]
    for module in held if stage.freeze_statistics else ():
        module.eval()
    return held if stage.freeze_statistics else []


def rate_factors(model: nn.Module, stage: Stage, spec: registry.ModelSpec) -> dict[str, float]:
    """Name -> factor of the stage's rate, by `layer_decay` (Bao et al. 2022, BEiT) and `rates`."""
    names = [name for name, _ in model.named_parameters()]
    factors = {n: stage.layer_decay**depth for n, depth in registry.layers(names, spec).items()}
    for name in factors:
        rates = [f for part, f in stage.rates.items() if registry.belongs(name, part, spec)]
        factors[name] *= rates[-1] if rates else 1.0
    return factors


class Anchor:
    """`stage.anchor` / 2 times the squared distance of parameters from what they began with (Li et
    al. 2018, L2-SP): a term of the loss, so that every engine reduces its gradient as any other."""

    def __init__(self, setup: Setup, named: dict[str, nn.Parameter]):
        self.strength = setup.stage.anchor
        self.names = {name for name in named if self.strength and name in setup.anchors}
        self.pairs = [
            (named[name], setup.anchors[name].to(named[name].device)) for name in sorted(self.names)
        ]

    def added(self, loss: Tensor, parts: int = 1) -> Tensor:
        """A loss with its share of the term, where `parts` losses make a step."""
        for parameter, start in self.pairs:
            loss = loss + self.strength / 2 / parts * (parameter - start).square().sum()
        return loss


def build_optimizer(
    named: dict[str, nn.Parameter],
    options: sections.Optimizer,
    lr: float,
    ages: dict[str, Hashable] | None = None,
    factors: Mapping[str, float] | None = None,
    anchored: Collection[str] = (),
) -> Optimizer:
    """Groups of weights with decay, then of biases, norms and parameters marked `_no_weight_decay`
    without; with `options.decay` "all" every parameter decays.

    A group's rate is the step's times its "factor". What is `anchored` does not decay. With `ages`,
    parameters of one group also share their age: for engines that keep one step counter per group.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        plain = options.decay == "weights" and (
            parameter.ndim <= 1 or getattr(parameter, "_no_weight_decay", False)
        )
        plain = plain or name in anchored
        key = (bool(plain), (ages or {}).get(name), (factors or {}).get(name, 1.0))
        groups.setdefault(key, []).append(parameter)
    parts = [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else options.weight_decay,
            "factor": factor,
        }
        for (plain, _, factor), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    if options.name == "sgd":
        return SGD(
            parts,
            lr=lr,
            momentum=options.momentum,
            nesterov=options.nesterov and options.momentum > 0,
            fused=True,
        )
    kind = AdamW if options.name == "adamw" else Adam
    return kind(parts, lr=lr, betas=options.betas, fused=True)


def zero_momentum(optimizer: Optimizer) -> None:
    """Give SGD's momentum its value before the first step. PyTorch makes the buffers uninitialised
    and lets the first step fill them; a first step that is skipped on the device (`found_inf`)
    leaves them as they are, and the next one reads them."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                # 0.99 * 0 + gradient: the first step is what it was
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The norm of all gradients together, before they are scaled down to `largest`; 0 scales
    nothing."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


def optimizer_tensors(optimizer: Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """<parameter>.<moment> -> tensor."""
    return {
        f"{name}.{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def load_optimizer(
    optimizer: Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put moments back by name. Parameters the checkpoint has no moments of start afresh."""
    for name, parameter in named.items():
        moments = {
            key[len(name) + 1 :]: value
            for key, value in tensors.items()
            if key.rpartition(".")[0] == name
        }
        if moments:
            optimizer.state[parameter] = {
                key: value.to(parameter.device, torch.float32)
                if value.ndim == 0
                else torch.empty_like(parameter).copy_(value)  # in the parameter's memory format
                for key, value in moments.items()
            }


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy weights and buffers by name, in place. Raises CheckpointError that names what does not
    fit."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if missing or extra or shapes:
        faults = [f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []
        faults += [f"unknown {extra[0]} and {len(extra) - 1} more"] if extra else []
        raise CheckpointError(
            f"checkpoint: {where} does not fit this network: "
            f"{'; '.join(faults + sorted(shapes)[:3])}"
        )
    for name, value in own.items():
        value.copy_(tensors[name])


class Running:
    """What the forward pass itself changes (running statistics and their counters): put back when a
    step was not finite."""

    def __init__(self, model: nn.Module):
        buffers = list(model.buffers())
        self.groups = [
            [buffer for buffer in buffers if buffer.dtype == dtype]
            for dtype in dict.fromkeys(b.dtype for b in buffers)
        ]
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are before a step."""
        self.kept = [torch.cat([buffer.flatten() for buffer in group]) for group in self.groups]

    @torch.no_grad()
    def settle(self, norm: Tensor) -> None:
        """Put them back unless the gradient's norm is finite; decided on the device."""
        for group, before in zip(self.groups, self.kept, strict=True):
            moved = torch.cat([buffer.flatten() for buffer in group])
            values = torch.where(torch.isfinite(norm), moved, before).split(
                [buffer.numel() for buffer in group]
            )
            torch._foreach_copy_(
                group, [value.view_as(buffer) for value, buffer in zip(values, group, strict=True)]
            )


class Average:
    """Exponential moving average of all parameters by name; with decay 0 there is none and `values`
    is empty.

    The decay warms up, min(decay, (1 + t) / (10 + t)) at update t, so that the random weights of
    the beginning are soon forgotten (TensorFlow's `ExponentialMovingAverage` with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float, weights: Mapping[str, Tensor] | None = None):
        """`weights`: what is averaged, by the parameters' names; where a rank has a piece of each,
        those pieces. By default the parameters themselves."""
        self.model, self.decay = model, decay
        self.weights = dict(model.named_parameters() if weights is None else weights)
        self.values = {n: w.detach().clone() for n, w in self.weights.items()} if decay else {}
        # counted on the device: the host does not know which steps were skipped
        device = next(iter(self.weights.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Move towards the weights, unless the step was skipped because the gradient's norm is not
        finite."""
        if self.values:
            finite = torch.isfinite(norm)
            rate = (9 / (10 + self.updates)).clamp(min=1 - self.decay)  # 1 minus the warm decay
            move([*self.values.values()], [*self.weights.values()], finite * rate)
            self.updates += finite

    def tensors(self) -> Tensors:
        """The groups of a checkpoint that `load` takes; none without a decay."""
        if not self.values:
            return {}
        groups = {"ema": lora.merged(self.model, self.values), "average": {"updates": self.updates}}
        parts = lora.adapters(self.values)
        return groups | ({"lora_ema": parts} if parts else {})

    @torch.no_grad()
    def load(
        self, checkpoint: Checkpoint, piece: Callable[[Tensor], Tensor] = lambda whole: whole
    ) -> None:
        """Continue exactly. Parameters that the checkpoint has no average of start from their
        weights. `piece` of a parameter is what is averaged here."""
        averaged = lora.divided(
            self.model, checkpoint.tensors("ema"), checkpoint.tensors("lora_ema")
        )
        updates = checkpoint.tensors("average").get("updates")
        self.updates.fill_(0 if updates is None else updates)
        for name, value in self.values.items():
            value.copy_(piece(averaged[name]) if name in averaged else self.weights[name])


# Elements of a tensor that is moved by a kernel of its own on a GPU: reading and writing it in one
# pass instead of three, without a second copy, is worth more than a launch.
LARGE = 2**20


def move(values: list[Tensor], weights: list[Tensor], rate: Tensor) -> None:
    """values += rate * (weights - values), in place. On a CPU by one formula for every tensor, so
    that its bits stay."""
    small, towards = [], []
    for value, weight in zip(values, weights, strict=True):
        if in_one_pass(value):
            value.lerp_(weight.detach(), rate)
        else:
            small.append(value)
            towards.append(weight)
    if small:
        away = torch._foreach_sub(towards, small)
        torch._foreach_mul_(away, rate)
        torch._foreach_add_(small, away)


def in_one_pass(value: Tensor) -> bool:
    return value.is_cuda and value.numel() >= LARGE
