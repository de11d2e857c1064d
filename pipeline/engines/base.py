"""What the loop asks of an engine. An engine is one file `pipeline/engines/<name>.py` with a class
`Engine`."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from segfleet.core.errors import check_one_of, import_part
from segfleet.pipeline.checkpoint import Checkpoint, Tensors
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every engine is built from: the same on every rank."""

    model: nn.Module  # already on the ranks's device, same weights on every rank
    loss: nn.Module  # loss(output, label) -> scalar
    recipe: Recipe
    stage: Stage  # as it is now: what has thawed is no longer in `freeze`
    ranks: Ranks
    # parameter -> what `stage.anchor` pulls it to
    anchors: Mapping[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """Holds model and optimizer; turns micro-batches into one optimizer step."""

    def __init__(self, setup: Setup): ...

    def step(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], lr: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step over exactly `accumulate` micro-batches of (image, label).

        Returns this rank's mean loss and the norm of the global gradient before clipping, both on
        the device: no host sync. With a non-finite norm the step changed nothing, on any rank.
        """
        ...

    def tensors(self) -> Tensors:
        """Full named tensors, live ones where possible, or `HostCopies`. Every rank must call it;
        only rank 0's result is used, and others may have none."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue exactly where a checkpoint of this stage was made."""
        ...

    def inherit(self, moments: dict[str, Tensor]) -> None:
        """Begin with moments of another stage's optimizer, <parameter>.<moment>; what has none
        begins afresh."""
        ...

    def evaluation(self) -> AbstractContextManager[nn.Module]:
        """The model in eval mode, with averaged weights if there are any; train mode and weights
        are restored afterwards."""
        ...


SHARED = ("base", "common", "lora", "pieces", "twin")  # what engines share


def engines() -> list[str]:
    import segfleet.pipeline.engines as room

    return sorted(m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in SHARED)


def build_engine(setup: Setup) -> Engine:
    """The recipe's engine. Raises InputError with the legal names."""
    name = setup.recipe.engine.name
    check_one_of("engine.name", name, engines())
    return import_part(f"segfleet.pipeline.engines.{name}", "engine").Engine(setup)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of a precision on a device."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
