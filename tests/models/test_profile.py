"""Costs found on the meta device against published tables and hand counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segfleet.models.profile import count_macs, peak_training_bytes, profile
from segfleet.models.registry import ModelError, spec, specs

UNET_LITE_GMAC = {  # specification unet_lite, 3 x 256 x 256
    "standard": 48.167,
    "depthwise": 7.569,
    "se": 48.168,
    "se_depthwise": 7.570,
    "se_depthwise_r32": 7.570,
    "spatial": 7.578,
    "ultralight": 0.308,
}


@pytest.mark.parametrize(("variant", "gmac"), UNET_LITE_GMAC.items())
def test_multiply_accumulates_of_the_published_table(variant, gmac):
    found = profile(spec(f"unet_lite_{variant}"))
    assert round(found.macs / 1e9, 3) == gmac
    assert found.size == (256, 256) and found.peak_bytes is None


def test_multiply_accumulates_by_hand():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1),
            nn.Conv3d(4, 4, 3, padding=1, groups=4),
            nn.ConvTranspose3d(4, 3, 2, stride=2),
        )
    voxels = 6 * 8 * 10
    assert count_macs(model, (5, 2, 6, 8, 10)) == 5 * voxels * (2 * 4 * 27 + 4 * 27 + 4 * 3 * 8)


def test_linear_layers_and_matrix_products_count():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.device("meta"):
        model = Attention()
    assert count_macs(model, (2, 5, 8)) == 2 * (5 * 8 * 24 + 2 * 5 * 5 * 8)


def test_peak_memory_by_hand():
    """Without the bias everything alive at the worst moment can be named; no tensor is counted
    twice and releases are seen."""
    n, b = 64, 32
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(n, n, bias=False), nn.ReLU(inplace=True), nn.Linear(n, n, bias=False)
        )
    matrix, activation, scalar = 4 * n * n, 4 * b * n, 4
    # backward of the second layer, after its weight gradient: 2 weights, 1 weight gradient, input,
    # hidden, the output still held, the hidden's gradient and the loss
    found = peak_training_bytes(model, (b, n))
    assert 4 * matrix + 2 * activation <= found <= 4 * matrix + 5 * activation + 8 * scalar
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


def test_peak_memory_grows_with_the_batch_and_shrinks_with_checkpointing():
    from segfleet.models.checkpointing import activation_checkpointing

    chosen = spec("unet_lite_standard")
    with torch.device("meta"):
        model = chosen.build(3, 1, width=16)
    one, two = (peak_training_bytes(model, (batch, 3, 128, 128)) for batch in (1, 2))
    fixed = 4 * sum(p.numel() for p in model.parameters())
    assert 1.5 * one < two + fixed < 2.5 * one + fixed
    assert peak_training_bytes(activation_checkpointing(model), (2, 3, 128, 128)) < 0.8 * two


def test_profiling_leaves_the_mode_and_allocates_nothing():
    with torch.device("meta"):
        model = spec("resenc_unet_3d").build(1, 2)  # 102 million parameters
    model.train()
    assert round(count_macs(model, (1, 1, 128, 128, 128)) / 1e9) == 717
    assert model.training and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", list(specs()))
def test_every_network_can_be_profiled(name):
    found = profile(spec(name))
    assert found.parameters == spec(name).parameters
    assert found.macs > found.parameters / 100


def test_an_illegal_size_is_refused():
    with pytest.raises(ModelError, match="multiple of 32"):
        profile(spec("resenc_unet_3d"), size=(100, 128, 128))
