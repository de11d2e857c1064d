"""From a store and a recipe to a scored run, and from that to predictions.

from segfleet.pipeline import load_run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segfleet.pipeline.loading import load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: they need torch."""
    if name == "load_run":
        from segfleet.pipeline.loading import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
