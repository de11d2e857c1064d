"""Networks: a name and options become an `nn.Module`. Single-device code only; imports nothing else
of segfleet.

from segfleet.models import build_model
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segfleet.models.registry import build_model, register, specs

__all__ = ["build_model", "register", "specs"]

# What plugins add, see core/plugins.py.
__path__ += [
    os.path.join(folder, "models")
    for folder in os.environ.get("SEGFLEET_PLUGINS", "").split(os.pathsep)
    if folder
]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: they need torch."""
    if name in __all__:
        from segfleet.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
