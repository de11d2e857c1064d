"""UNeXt's shift and token MLP against their definitions, its counts and cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from segfleet.models.registry import ModelError, count_parameters, spec, stage_table
from segfleet.models.unext import TokenMLP, UNeXt, shift


def test_counts_and_cost():
    chosen = spec("unext")
    with torch.device("meta"):
        model, x = chosen.build(in_channels=3, num_classes=1), torch.zeros(1, 3, 256, 256)
        small = UNeXt(3, 1, widths=(8, 16, 32, 64, 128))
    assert count_parameters(model) == chosen.parameters == sum(chosen.stages.values())
    assert stage_table(model, chosen) == chosen.stages
    assert count_parameters(small) == 253_561
    for network, giga in ((model, 0.562), (small, 0.099)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(x)
        assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=5e-4)


@pytest.mark.parametrize("axis", [2, 3])
def test_shift_moves_five_chunks_with_zeros_entering(axis):
    x = torch.randn(1, 10, 4, 4, generator=torch.Generator().manual_seed(0))
    found = shift(x, axis)
    for channel in range(10):
        step = channel // 2 - 2
        for to in range(4):
            source = to - step
            expected = x[0, channel].select(axis - 2, source) if 0 <= source < 4 else torch.zeros(4)
            assert torch.equal(found[0, channel].select(axis - 2, to), expected)


def test_token_mlp():
    torch.manual_seed(0)
    block, x = TokenMLP(10), torch.randn(2, 10, 6, 5)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    t = (
        torch.einsum(
            "oc,bcyx->boyx", block.first.weight, shift((x - mean) / (variance + 1e-5).sqrt(), 2)
        )
        + block.first.bias[:, None, None]
    )
    t = F.gelu(F.conv2d(t, block.depthwise.weight, block.depthwise.bias, padding=1, groups=10))
    t = (
        torch.einsum("oc,bcyx->boyx", block.second.weight, shift(t, 3))
        + block.second.bias[:, None, None]
    )
    torch.testing.assert_close(block(x), x + t, rtol=1e-4, atol=1e-5)


def test_wrong_use_is_refused():
    with pytest.raises(ModelError, match="five channel chunks"):
        UNeXt(3, 1, widths=(4, 8, 4, 8, 8))
    with pytest.raises(ModelError, match="Y size is a multiple of 32, found 48"):
        UNeXt(3, 1, widths=(4, 8, 10, 10, 15))(torch.zeros(1, 3, 48, 64))
