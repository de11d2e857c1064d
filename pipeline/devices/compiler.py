"""PyTorch's compiler: which networks are compiled, and that it is loaded where one is.

It takes as long as all else of PyTorch, and every optimizer and DistributedDataParallel loads it to
say that they are not to be compiled. A rank that compiles nothing gets a module in its place that
answers these questions, and becomes the compiler when it is asked anything else.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from segfleet.pipeline import sections

NAME = "torch._dynamo"
OLDEST = (7, 0)  # compute capability that Triton's kernels need

log = logging.getLogger("segfleet.compiler")


def wanted(options: sections.Engine, device: torch.device) -> bool:
    """Whether a network is to be compiled on `device`."""
    if options.compile != "auto":
        return bool(options.compile)
    # Compiled kernels may be chosen by measuring, and the compiler decides itself what it
    # recomputes: neither for who asks for exact sums or for memory.
    plain = not options.deterministic and not options.checkpoint_activations
    return plain and options.name == "ddp" and device.type == "cuda" and able(device)


def able(device: torch.device) -> bool:
    """Whether kernels can be compiled for a GPU here: Triton wants a C compiler for its
    launchers."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    return (
        importlib.util.find_spec("triton") is not None
        and any(shutil.which(name) for name in compilers if name)
        and torch.cuda.get_device_capability(device) >= OLDEST
    )


def compiled(model: nn.Module, options: sections.Engine, device: torch.device) -> nn.Module:
    """What runs a network while it trains: itself, or its compiled form with the same
    parameters."""
    if not wanted(options, device):
        return model
    if options.compile is True:
        return torch.compile(model)
    return Whole(model, replayed=replayed(options, device))


def replayed(options: sections.Engine, device: torch.device) -> bool:
    """Whether a network's kernels are recorded and replayed as CUDA graphs. What comes out of them
    then lies in their memory, and is gone with the next forward pass."""
    return options.compile == "reduce-overhead" and device.type == "cuda"


class Whole(nn.Module):
    """A network compiled as one graph; as it is, if it cannot be. That shows at the first batch and
    before anything is computed, so that nothing is computed twice."""

    def __init__(self, model: nn.Module, backend: Any = "inductor", replayed: bool = False):
        super().__init__()
        self.model, self.replayed = model, replayed
        mode = "reduce-overhead" if replayed else None
        # in a tuple: registered once
        self.run: tuple[nn.Module, ...] = (
            torch.compile(model, fullgraph=True, backend=backend, mode=mode),
        )

    def forward(self, image: torch.Tensor) -> Any:
        if self.run:
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

            if self.replayed:  # what the pass before gave out is not needed any more
                torch.compiler.cudagraph_mark_step_begin()
            try:
                return self.run[0](image)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                reason = " ".join(str(error).split())[:300]
                log.warning("the network is not compiled (engine.compile: auto): %s", reason)
                self.run = ()
        return self.model(image)


class _Later(ModuleType):
    def __init__(self) -> None:
        super().__init__(NAME)
        self.disabled: list[Any] = []  # functions that are not to be compiled
        self.utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
        self.graph_break = lambda *_, **__: None  # there is no graph

    def disable(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        if fn is None:
            return self.disable
        self.disabled.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(self.load(), name)

    def load(self) -> ModuleType:
        """The compiler itself, which marks again what it is not to compile."""
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
            torch.__dict__.pop("_dynamo", None)
            for fn in self.disabled:  # PyTorch remembers the answer there, and asks again
                vars(fn).pop("__dynamo_disable", None)
        return importlib.import_module(NAME)


def load_later() -> None:
    """From now on the compiler is loaded when it is asked to compile."""
    if NAME not in sys.modules:
        sys.modules[NAME] = torch._dynamo = _Later()


def load_now() -> None:
    """For a rank that compiles, after one that did not in the same process."""
    if isinstance(module := sys.modules.get(NAME), _Later):
        module.load()
