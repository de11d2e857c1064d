"""Losses by name. A loss is one file `pipeline/losses/<name>.py` with a class `Loss`."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import nn

from segfleet.core.errors import InputError, import_part

SHARED = ("base", "deep_supervision", "hidden_error", "soft_dice")


def losses() -> list[str]:
    import segfleet.pipeline.losses as room

    return sorted(m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in SHARED)


def build_loss(name: str, *, head: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A loss module `loss(logits, target, valid) -> scalar float32`.

    logits (B, K, *S). head "softmax": target (B, *S) int64; head "sigmoid": target (B, K, *S)
    float32. valid (B, *S) bool or None: voxels where it is False do not count.
    `Loss.head` is "softmax", "sigmoid" or "any" (then `Loss.__init__` takes `head`).
    Raises InputError for an unknown name, a loss that does not fit the head, or an unknown option.
    """
    if name not in losses():
        raise InputError(f"loss.name: found '{name}', expected one of: {', '.join(losses())}")
    kind = import_part(f"segfleet.pipeline.losses.{name}", "loss").Loss
    if kind.head not in (head, "any"):
        raise InputError(
            f"loss.name: '{name}' needs a {kind.head} head, this task has a {head} head; set "
            "model.head or use another"
        )
    options = dict(options or {})
    legal = [p for p in inspect.signature(kind.__init__).parameters if p not in ("self", "head")]
    for key in options:
        if key not in legal:
            raise InputError(
                f"loss.options: '{key}' is no option of {name}; expected one of: "
                f"{', '.join(legal) or 'none'}"
            )
    return kind(head=head, **options) if kind.head == "any" else kind(**options)
