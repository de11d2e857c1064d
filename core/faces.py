"""A room's public names, imported when they are first used: most need torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def public(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562). names: public name -> module of the package that has
    it."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    return get
