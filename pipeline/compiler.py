"""PyTorch's compiler, loaded where something compiles.

It takes as long as all else of PyTorch, and every optimizer and DistributedDataParallel loads it to
say that they are not to be compiled. A rank that compiles nothing gets a module in its place that
answers these questions, and becomes the compiler when it is asked anything else.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

NAME = "torch._dynamo"


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
    if isinstance(found := sys.modules.get(NAME), _Later):
        found.load()
