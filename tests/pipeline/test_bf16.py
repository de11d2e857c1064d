"""Gradients of bf16 3D convolutions are right for any number of slices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segfleet.pipeline.training.precision import guard


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_weight_gradients(slices, channels_last):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv3d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 16, 3, padding=1)
    )
    guarded = copy.deepcopy(plain)
    guard(guarded, "bf16", torch.device("cpu"))
    x = torch.randn(2, 16, slices, 8, 8)
    if channels_last:
        x, guarded = (
            x.contiguous(memory_format=torch.channels_last_3d),
            guarded.to(memory_format=torch.channels_last_3d),
        )
    plain(x).square().mean().backward()
    for _ in range(4):
        guarded.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = guarded(x)
        y.float().square().mean().backward()
        for right, found in zip(plain.parameters(), guarded.parameters(), strict=True):
            assert ((found.grad - right.grad).norm() / right.grad.norm()).item() < 0.03


def test_only_bf16_on_a_cpu_is_guarded():
    layer = nn.Conv3d(4, 4, 3)
    guard(layer, "fp32", torch.device("cpu"))
    guard(layer, "bf16", torch.device("cuda"))
    assert "forward" not in vars(layer)
    guard(layer, "bf16", torch.device("cpu"))
    assert "forward" in vars(layer)
