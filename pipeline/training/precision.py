"""A wrong kernel, stepped around: PyTorch 2.13 on CPUs, bf16, 3D convolutions over exactly two
slices.

Their weight gradient is uninitialised memory when the kernel spans slices, the stride is 1 and
there are 16 channels or more; one, three and more slices are right, and so are forward passes and
transposed convolutions. Such layers run in fp32; no other layer changes.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn


def guard(model: nn.Module, precision: str, device: torch.device) -> None:
    """Make the 3D convolutions of a network that is trained in bf16 on a CPU take the safe way
    where the other one is wrong."""
    if precision == "bf16" and device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                module.forward = types.MethodType(_forward, module)


def _forward(self: nn.Conv3d, x: Tensor) -> Tensor:
    if x.shape[2] != 2:
        return nn.Conv3d.forward(self, x)
    with torch.autocast("cpu", enabled=False):
        return nn.Conv3d.forward(self, x.float())
