"""What the state machines of stores and stages share: death in the middle, and damage to a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def until(function: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
    """The same function, whose call number `count[0]`, from 0 on, ends the process at once."""

    def call(*words: Any, **more: Any) -> Any:
        if not count[0]:
            os._exit(0)
        count[0] -= 1
        return function(*words, **more)

    return call


def damage(path: Path, how: str) -> None:
    """`how`: flip a bit, cut it in half, leave it empty, or gone."""
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"x"
        path.write_bytes({"flip": flipped, "cut": data[:middle], "empty": b""}[how])
