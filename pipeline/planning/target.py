"""What is planned for: a device and a budget of time."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from segfleet.core.errors import InputError
from segfleet.core.machine import cpus, memory_budget

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What is planned for. `here`: steps can be measured."""

    kind: str  # cpu | cuda
    memory_gb: float
    here: bool
    name: str


def parse_budget(text: str) -> float:
    """Seconds of `30min`, `2d`, `1.5h`, `90s`. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if not match or not float(match[1]):
        raise InputError(f"budget: found '{text}', expected a time such as 30min, 8h or 2d")
    return float(match[1]) * UNITS[match[2]]


def in_words(seconds: float) -> str:
    for unit in ("d", "h", "min"):
        if seconds >= UNITS[unit]:
            return f"{seconds / UNITS[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def parse_device(text: str | None) -> Device:
    """`cpu`, `cuda`, or with the memory of one that is elsewhere `cuda:80G`; None: what is here.
    Raises InputError."""
    has_gpu = torch.cuda.is_available() and os.environ.get("SEGFLEET_DEVICE", "cuda") == "cuda"
    text = text or ("cuda" if has_gpu else "cpu")
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+(?:\.\d+)?)G)?", text)
    if not match:
        raise InputError(f"device: found '{text}', expected cpu, cuda or cuda:80G")
    kind, memory = match[1], float(match[2]) if match[2] else None
    if kind == "cpu":
        return Device(
            kind="cpu",
            memory_gb=memory or memory_budget() / 1e9,
            here=True,
            name=f"{cpus()} CPU core(s)",
        )
    if memory is None and not has_gpu:
        raise InputError("device: no GPU is here; say its memory, as cuda:80G, or plan for cpu")
    if memory is None:
        properties = torch.cuda.get_device_properties(0)
        return Device(
            kind="cuda", memory_gb=properties.total_memory / 1e9, here=True, name=properties.name
        )
    return Device(kind="cuda", memory_gb=memory, here=False, name=f"a GPU of {memory:g} GB")
