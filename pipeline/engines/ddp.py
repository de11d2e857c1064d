"""Data parallel training with PyTorch's DistributedDataParallel; on one rank, a plain model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline.checkpoint import Checkpoint, Tensors
from segfleet.pipeline.devices import compiler
from segfleet.pipeline.engines import lora
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

# PyTorch 2.13 renamed it
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class Engine:
    def __init__(self, setup: Setup):
        self.ranks, self.loss, self.options = setup.ranks, setup.loss, setup.recipe.engine
        if self.options.options:
            raise InputError(
                f"engine.options: found {', '.join(self.options.options)}, but ddp has no "
                f"options; set engine.options={{}}"
            )
        self.model, self.clip = setup.model, setup.recipe.optimizer.clip
        spec = registry.spec(setup.recipe.model.name)
        self.named = trainable(self.model, setup.stage, spec)
        self.held = hold_statistics(self.model, setup.stage, spec)
        self.anchor = Anchor(setup, self.named)
        self.optimizer = build_optimizer(
            self.named,
            setup.recipe.optimizer,
            setup.stage.lr,
            factors=rate_factors(self.model, setup.stage, spec),
            anchored=self.anchor.names,
        )
        zero_momentum(self.optimizer)
        self.scaler = torch.amp.GradScaler(
            self.ranks.device.type, enabled=self.options.precision == "fp16"
        )
        self.average, self.running = Average(self.model, self.options.ema), Running(self.model)
        self.forward = compiler.compiled(self.model, self.options, self.ranks.device)
        self.replayed = compiler.replayed(self.options, self.ranks.device)
        if self.ranks.size > 1:
            # Without the search for unused parameters DDP regroups its buckets after the first
            # step, and with it the order of sums in a ring of three or more ranks: a resumed run
            # would then differ from an uninterrupted one in the last bits. `static_graph` regroups
            # them, too; the search costs a walk over the graph and one small collective.
            self.forward = DistributedDataParallel(
                self.forward,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                **{SYNC_BUFFERS: False},  # batch normalisation over ranks keeps them equal
            )

    def step(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], lr: float
    ) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        self.running.keep()
        total, parts = torch.zeros((), device=self.ranks.device), self.options.accumulate
        for part in range(parts):
            image, label = next(micro_batches)
            wait_for_more = part < parts - 1
            wait = wait_for_more and self.ranks.size > 1
            with self.forward.no_sync() if wait else nullcontext():
                with autocast(self.options.precision, self.ranks.device):
                    output = self.forward(image)
                loss = self.loss(output, label) / parts
                self.scaler.scale(self.anchor.added(loss, parts)).backward()
            total += loss.detach()
            if self.replayed and wait_for_more:
                self._keep_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.named.values(), self.clip)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:  # the fused optimizers read this flag on the device and then change nothing
            self.optimizer.found_inf, self.optimizer.grad_scale = (
                (~torch.isfinite(norm)).float(),
                None,
            )
            self.optimizer.step()
        self.running.settle(norm)
        self.average.update(norm)
        return total, norm

    def _keep_gradients(self) -> None:
        """Gradients in memory of their own: that of CUDA graphs is written again by the next
        micro-batch."""
        for parameter in self.named.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def tensors(self) -> Tensors:
        groups = {
            "weights": lora.merged(self.model),
            "optimizer": optimizer_tensors(self.optimizer, self.named),
        }
        if parts := lora.adapters(dict(self.model.named_parameters())):
            groups["lora"] = parts
        groups |= self.average.tensors()
        if self.scaler.is_enabled():
            groups["scaler"] = {
                key: torch.tensor(value, dtype=torch.float64)
                for key, value in self.scaler.state_dict().items()
            }
        return groups

    def inherit(self, moments: dict[str, Tensor]) -> None:
        load_optimizer(self.optimizer, self.named, moments)

    def load(self, checkpoint: Checkpoint) -> None:
        weights = lora.divided(
            self.model, checkpoint.tensors("weights"), checkpoint.tensors("lora")
        )
        load_weights(self.model, weights, str(checkpoint.path))
        self.average.load(checkpoint)
        load_optimizer(self.optimizer, self.named, checkpoint.tensors("optimizer"))
        if self.scaler.is_enabled():
            state = {key: value.item() for key, value in checkpoint.tensors("scaler").items()}
            self.scaler.load_state_dict(
                {
                    key: int(v) if key in ("growth_interval", "_growth_tracker") else v
                    for key, v in state.items()
                }
            )

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        own = (
            {name: p.detach().clone() for name, p in self.model.named_parameters()}
            if self.average.values
            else {}
        )
        try:
            self._put(self.average.values)
            yield self.model.eval()
        finally:
            self._put(own)
            self.model.train()
            for module in self.held:
                module.eval()

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)
