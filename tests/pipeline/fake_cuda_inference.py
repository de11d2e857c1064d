"""A sliding window, labels and calibration on a "cuda" that computes nothing, see
`fake_cuda_program.py`: `python fake_cuda_inference.py LIBRARY`, JSON out."""

from __future__ import annotations

import ctypes
import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch

import numpy as np
import torch
from fake_cuda_program import CUDA, memory, readable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segfleet.pipeline.inference.restore import Map, combine
from segfleet.pipeline.inference.sliding_window import sliding_window
from segfleet.pipeline.scoring.calibration import calibration
from segfleet.pipeline.task import Task

SHAPE = (20, 40, 40)
RAW = (20, 60, 50)
TASK = Task(head="softmax", names=("a", "b"), members=((1,), (2,)), values=(0, 1, 2))


class Crossings(TorchDispatchMode):
    """Copies from the device to the host: [type, size]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else kwargs.get("device")
            if source.device == CUDA and target is not None and torch.device(target).type == "cpu":
                self.found.append([str(source.dtype).removeprefix("torch."), list(source.shape)])
        return function(*args, **kwargs)


def unpinned(original: Any) -> Any:
    """`torch.empty` of a build that cannot pin."""

    def empty(*sizes, pin_memory=False, **options):
        return original(*sizes, **options)

    return empty


def pinned(tensor: Tensor) -> Tensor:
    assert tensor.device.type == "cpu", "a tensor on a GPU cannot be pinned"
    return tensor


def window(free: int, device: torch.device | str = CUDA) -> dict[str, Any]:
    """Where sums are with so many bytes free, what crosses, and how many tiles went at once."""
    memory(free)
    passes = []

    def network(x: Tensor) -> Tensor:
        assert x.device == CUDA and x.dtype == torch.float32
        passes.append(len(x))
        return torch.cat([x, x, x], 1)

    crossings, label = Crossings(), np.zeros(SHAPE, np.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        stack.enter_context(readable())
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", pinned))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", mock.MagicMock()))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", mock.MagicMock()))
        image = torch.empty(1, *SHAPE, dtype=torch.float16)
        with crossings, mock.patch.object(torch, "empty", unpinned(torch.empty)):
            found = sliding_window(network, image, patch=(8, 16, 16), dims=3, device=device)
        sums, crossings.found = crossings.found, []
        read = {
            "numpy": lambda self: np.zeros(tuple(self.shape)),
            "tolist": lambda self: [1.0] * 32,
        }
        for name, function in read.items():
            stack.enter_context(mock.patch.object(Tensor, name, function))
        with crossings:
            crop = tuple((0, size) for size in RAW)
            restored = combine(
                [Map(scores_KZYX=found, task=TASK, crop=crop, anisotropic_axis=1)], RAW
            )
        labels, crossings.found = crossings.found, []
        with crossings:
            if found.device == CUDA:
                calibration(found, label, TASK)
    return {
        "device": str(found.device),
        "size": list(found.shape),
        "passes": passes,
        "sums": sums,
        "labels": labels,
        "restored": list(restored.shape),
        "calibration": crossings.found,
    }


if __name__ == "__main__":
    json.dump([window(2**33), window(2**20), window(2**33, "cuda")], sys.stdout)
