"""Data parallel training with DeepSpeed's ZeRO, stages 0 to 3, in a process group that stands
already: none of DeepSpeed's launchers is used.

engine.options: `zero` 0 | 1 | 2 | 3 (default 1) says what is spread over the ranks: nothing;
moments; and gradients; and weights.
`offload` none | cpu keeps moments and the optimizer's copy of the weights in host memory, updated
there by PyTorch's own optimizer.

Weights and moments stay float32 and autocast is that of the ddp engine, so both engines take the
same steps and share one checkpoint.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.core.litter import temporary_files
from segfleet.models import registry
from segfleet.pipeline import sections
from segfleet.pipeline.checkpoint import Checkpoint, HostCopies, Tensors
from segfleet.pipeline.devices import compiler
from segfleet.pipeline.engines.base import Setup, autocast
from segfleet.pipeline.engines.common import (
    Anchor,
    Average,
    Running,
    build_optimizer,
    clip_gradients,
    hold_statistics,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    rate_factors,
    trainable,
    zero_momentum,
)
from segfleet.pipeline.engines.pieces import cut, join, to_all, to_first
from segfleet.pipeline.engines.twin import Twin
from segfleet.pipeline.ranks import Ranks

LEGAL = {"zero": (0, 1, 2, 3), "offload": ("none", "cpu")}
BUCKET = 50_000_000  # elements reduced at once
STEP = "step"  # Adam's counter, one for all parameters of a group
# ZeRO 3 leaves parameters of fewer elements whole on every rank: gathering them costs more than it
# saves
PERSISTENT = 10_000


class Engine:
    def __init__(self, setup: Setup):
        self.setup, self.ranks, self.loss, self.model = setup, setup.ranks, setup.loss, setup.model
        self.recipe, self.options = setup.recipe, setup.recipe.engine
        self.zero, self.offload = read_options(self.options)
        self.library = quiet_deepspeed(self.ranks.device)
        if self.zero == 3 and setup.stage.anchor:
            raise InputError(
                f"anchor: found {setup.stage.anchor:g} with zero 3, whose weights come and go; "
                "expected zero 0, 1 or 2, or engine.name=ddp"
            )
        self.spec = registry.spec(self.recipe.model.name)
        self.named = trainable(self.model, setup.stage, self.spec)
        self.anchor = Anchor(setup, self.named)
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        # with ZeRO 3 every rank averages its pieces, which are there from `start` on
        self.average = Average(self.model, self.options.ema if self.zero < 3 else 0.0)
        self.twin = Twin(self.model)
        self.inner = None  # DeepSpeed's engine, from `start` on

    def start(self, moments: dict[str, Tensor]) -> None:
        """Hand model and optimizer over to DeepSpeed and put the moments back. From here on the
        model's weights are DeepSpeed's."""
        join_process_group(self.ranks)
        before = [(p, p.data) for p in self.model.parameters()] if self.zero == 0 else []
        # DeepSpeed takes no other; images and activations keep theirs
        self.model.to(memory_format=torch.contiguous_format)
        ages = {name: age(name, moments) for name in self.named}
        self.optimizer = build_optimizer(
            self.named,
            self.recipe.optimizer,
            self.setup.stage.lr,
            ages,
            rate_factors(self.model, self.setup.stage, self.spec),
            self.anchor.names,
        )
        with quiet():
            self.inner, *_ = self.library.initialize(
                model=Autocast(self.model, self.options),
                optimizer=self.optimizer,
                config=self._config(),
                dist_init_required=False,
            )
        hold_statistics(self.model, self.setup.stage, self.spec)
        self.running = Running(self.model)
        if self.zero == 0:
            for parameter, value in before:
                parameter.data = value
            zero_momentum(self.optimizer)  # with ZeRO DeepSpeed skips the whole step, on the host
            load_optimizer(self.optimizer, self.named, moments)
            return
        for names, flat in self._flats():
            keys = [key.rpartition(".")[2] for key in moments if key.rpartition(".")[0] == names[0]]
            for key in keys:
                values = [moments[f"{name}.{key}"].float() for name in names]
                self.optimizer.state[flat][key] = (
                    values[0].to(flat.device)
                    if key == STEP
                    else torch.empty_like(flat).copy_(self._cut(values))
                )
        if self.zero == 3:
            self.average = Average(self.model, self.options.ema, self._pieces())

    def _config(self) -> dict[str, Any]:
        elements = sum(p.numel() for p in self.named.values())
        zero: dict[str, Any] = {
            "stage": self.zero,
            "overlap_comm": False,
            "reduce_bucket_size": min(elements, BUCKET),
        }
        if self.zero == 3:
            zero["stage3_param_persistence_threshold"] = PERSISTENT
        if self.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": max(
                1, self.recipe.data.batch // self.ranks.size // self.options.accumulate
            ),
            "gradient_accumulation_steps": self.options.accumulate,
            "gradient_clipping": self.recipe.optimizer.clip if self.zero else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its CPU optimizer is compiled on first use
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
        }

    def step(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], lr: float
    ) -> tuple[Tensor, Tensor]:
        if self.inner is None:
            self.start({})
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.running.keep()
        total, parts = torch.zeros((), device=self.ranks.device), self.options.accumulate
        for part in range(parts):
            image, label = next(micro_batches)
            loss = self.loss(self.inner(image), label)
            whole = self.anchor.added(loss)
            added = (whole - loss).detach() / parts if self.anchor.pairs else 0.0
            total += self.inner.backward(whole).detach() - added
            if self.zero == 0 and part == parts - 1:
                norm = clip_gradients(self.named.values(), self.recipe.optimizer.clip)
                self.optimizer.found_inf, self.optimizer.grad_scale = (
                    (~torch.isfinite(norm)).float(),
                    None,
                )
            # counts micro-batches: the optimizer steps after the last one, and with ZeRO only if
            # the norm is finite
            self.inner.step()
        if self.zero:
            norm = torch.as_tensor(
                self.inner.get_global_grad_norm(), dtype=torch.float32, device=self.ranks.device
            )
        self.running.settle(norm)
        self.average.update(norm)
        return total, norm

    # Every rank must come to what follows up to `load`: weights and moments may be spread over all
    # of them.

    def _cut(self, values: list[Tensor]) -> Tensor:
        """This rank's piece of whole tensors of one group."""
        return cut(values, self.zero, self.ranks.size, self.ranks.rank)

    def _pieces(self) -> dict[str, Tensor]:
        """This rank's piece of every parameter, as ZeRO 3 trains it."""
        return {name: p.ds_tensor for name, p in self.model.named_parameters()}

    def _spread(self) -> bool:
        """Whether no rank has the whole weights."""
        return self.zero == 3 and self.inner is not None

    def _whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that are spread over the ranks, on rank 0; one after the other."""
        joined = HostCopies()
        for name, piece in pieces.items():
            if (rows := to_first(piece, self.ranks)) is not None:
                joined[name] = join(rows, [self.shapes[name]], self.zero)[0]
        return joined

    def _weights(self) -> dict[str, Tensor]:
        if not self._spread():
            return dict(self.model.state_dict())
        weights = self._whole(self._pieces())
        if self.ranks.rank == 0:
            own = self.model.state_dict()
            weights |= {
                name: own[name].detach().to("cpu", copy=True)
                for name in own.keys() - self.shapes.keys()
            }
        return weights

    def _flats(self) -> list[tuple[list[str], Tensor]]:
        """Per group: names of its parameters and this rank's piece of them, the key of its moments
        in the optimizer's state."""
        zero, names = self.inner.optimizer, {id(p): name for name, p in self.named.items()}
        if self.zero == 3:
            pairs = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
        else:
            pairs = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        return [([names[id(p)] for p in group], flat) for group, flat in pairs]

    def _moments(self) -> dict[str, Tensor]:
        if self.inner is None:
            return {}
        if self.zero == 0:
            return optimizer_tensors(self.optimizer, self.named)
        moments = HostCopies()
        for names, flat in self._flats():
            for key, value in self.optimizer.state.get(flat, {}).items():
                rows = None if key == STEP else to_first(value, self.ranks)
                if self.ranks.rank:
                    continue
                whole = (
                    [value.detach().to("cpu", copy=True) for _ in names]
                    if rows is None
                    else join(rows, [self.shapes[name] for name in names], self.zero)
                )
                moments |= {
                    f"{name}.{key}": tensor for name, tensor in zip(names, whole, strict=True)
                }
        return moments

    def tensors(self) -> Tensors:
        groups = {"weights": self._weights(), "optimizer": self._moments()}
        average = self.average.tensors()
        if average and self._spread():
            average["ema"] = self._whole(self.average.values)
        elif self.zero == 3 and self.options.ema:  # before the first step
            average = Average(self.model, self.options.ema).tensors()
        return groups | average

    def inherit(self, moments: dict[str, Tensor]) -> None:
        assert self.inner is None, "inherit() comes before the first step"
        self.start(moments)

    def load(self, checkpoint: Checkpoint) -> None:
        assert self.inner is None, "load() comes before the first step"
        load_weights(self.model, checkpoint.tensors("weights"), str(checkpoint.path))
        if self.zero < 3:
            self.average.load(checkpoint)
        self.start(checkpoint.tensors("optimizer"))
        if self.zero == 3:
            self.average.load(checkpoint, lambda whole: self._cut([whole]))

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """A whole network in place of the model, whose weights may be spread over the ranks: there
        as long as it is evaluated."""
        weights: Mapping[str, Tensor] = dict(self.model.named_parameters())
        if spread := self._spread():
            weights = self._pieces()
        values = {**weights, **self.average.values}

        def value_of(name: str) -> Tensor:
            return to_all(values[name], self.shapes[name], self.ranks) if spread else values[name]

        with self.twin.whole(value_of) as network:
            yield network


def read_options(options: sections.Engine) -> tuple[int, str]:
    """`zero` and `offload` of engine.options. Raises InputError that names the legal ones."""
    chosen = {"zero": 1, "offload": "none"} | options.options
    for key, value in chosen.items():
        if key not in LEGAL:
            raise InputError(
                f"engine.options: found unknown key '{key}', expected one of: {', '.join(LEGAL)}"
            )
        if isinstance(value, bool) or value not in LEGAL[key]:
            raise InputError(
                f"engine.options.{key}: found {value!r}, expected one of: "
                f"{', '.join(map(str, LEGAL[key]))}"
            )
    if chosen["offload"] == "cpu" and chosen["zero"] == 0:
        raise InputError(
            "engine.options.offload: found 'cpu' with zero 0, which has nothing to offload; "
            "expected zero 1, 2 or 3"
        )
    if options.precision == "fp16":
        raise InputError(
            "engine.precision: found 'fp16', expected fp32 or bf16 with engine.name deepspeed; "
            "engine.name=ddp offers fp16"
        )
    if options.compile == "reduce-overhead":
        raise InputError(
            "engine.compile: found 'reduce-overhead' with engine.name deepspeed, which keeps "
            "gradients that CUDA graphs write again; expected true, false or auto"
        )
    if options.compile is True and chosen["zero"] == 3:
        raise InputError(
            "engine.compile: found true, expected false with zero 3, whose weights come and go "
            "while the network runs"
        )
    return chosen["zero"], chosen["offload"]


class Autocast(nn.Module):
    """The network as DeepSpeed sees it: autocast inside, where DeepSpeed does not switch it off."""

    def __init__(self, model: nn.Module, options: sections.Engine):
        super().__init__()
        self.model, self.precision = model, options.precision
        # in a tuple: registered once
        self.run = (compiler.compiled(model, options, next(model.parameters()).device),)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        with autocast(self.precision, image.device):
            return self.run[0](image)


def age(name: str, moments: dict[str, Tensor]) -> Hashable:
    """What parameters must share to share a step counter: how many steps their moments saw; None
    without moments."""
    if f"{name}.{STEP}" in moments:
        return int(moments[f"{name}.{STEP}"])
    return "ageless" if any(key.rpartition(".")[0] == name for key in moments) else None


def join_process_group(ranks: Ranks) -> None:
    """DeepSpeed needs a process group even for one rank; a single rank has none."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def quiet_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed without its chatter on stdout, and without compiling anything: its shared-memory
    collectives stay off."""
    os.environ["DS_ACCELERATOR"] = device.type
    # it looks here for the number of its device, again and again
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    with quiet():
        try:
            import deepspeed
        except ImportError as error:
            raise InputError(
                f"engine.name: deepspeed cannot be imported ({error}): pip install it or set "
                "engine.name=ddp"
            ) from None
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # in every step: it calls collectives by their older names
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """stdout belongs to the command line: what a library prints goes to stderr. Its warnings are
    not ours to repair. What it tries to compile is gone after a kill, too."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings(), temporary_files():
        warnings.simplefilter("ignore")
        yield
