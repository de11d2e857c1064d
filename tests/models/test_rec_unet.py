"""REC-UNet's attention against its formula, its middle slice, and its published cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from segfleet.models.rec_unet import Calibration, EnhancementBlock, RecUNet, TripletAttention
from segfleet.models.registry import ModelError, build_model, count_parameters, spec, stage_table

SMALL = {"widths": (4, 8, 8, 12, 16)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["rec_unet", "rec_unet_em"])
def test_counts_and_cost(name):
    chosen = spec(name)
    with torch.device("meta"):
        model, x = chosen.build(in_channels=3, num_classes=2), torch.zeros(1, 3, 256, 256)
    assert count_parameters(model) == chosen.parameters == sum(chosen.stages.values())
    assert stage_table(model, chosen) == chosen.stages
    assert sum(b.numel() for b in model.buffers()) == 15_739
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    assert counter.get_total_flops() == 2 * 66_399_613_440


def test_triplet_attention_formula():
    """Every gate written out with the pooled plane laid out as rows x columns."""
    attention, x = TripletAttention().eval(), torch.randn(2, 5, 7, 9)
    for gate in attention.gates:
        gate.norm.running_mean.fill_(0.3)
        gate.norm.running_var.fill_(2.0)
        torch.nn.init.constant_(gate.norm.weight, 1.5)
        torch.nn.init.constant_(gate.norm.bias, -0.2)

    def weigh(gate, plane_max, plane_mean):
        out = F.conv2d(torch.stack((plane_max, plane_mean), 1), gate.conv.weight, padding=3)[:, 0]
        return torch.sigmoid((out - 0.3) / (2.0 + 1e-5) ** 0.5 * 1.5 - 0.2)

    over_rows = weigh(attention.gates[0], x.max(2).values, x.mean(2))  # (B, C, X)
    by_columns = x.permute(0, 2, 1, 3)  # (B, Y, C, X)
    # (B, Y, C)
    over_columns = weigh(attention.gates[1], by_columns.max(3).values, by_columns.mean(3))
    over_channels = weigh(attention.gates[2], x.max(1).values, x.mean(1))  # (B, Y, X)
    expected = (
        x
        * (
            over_rows[:, :, None]
            + over_columns.permute(0, 2, 1)[..., None]
            + over_channels[:, None]
        )
        / 3
    )
    torch.testing.assert_close(attention(x), expected)
    assert attention.gates[0].norm.momentum == 0.01


def test_calibration_puts_the_gated_skip_first():
    cm, deep, skip = Calibration(6).eval(), torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    found = cm(deep, skip)
    ratio = found[:, :6] / skip
    assert torch.equal(found[:, 6:], deep)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-6)
    assert 0 < ratio.min() and ratio.max() < 1


@pytest.mark.parametrize("residual", [True, False])
def test_block_averages_its_two_convolutions(residual):
    block, x = EnhancementBlock(3, 4, residual=residual).eval(), torch.randn(1, 3, 8, 8)
    x1 = block.first(x)
    x2 = block.attention(block.second(x1))
    torch.testing.assert_close(block(x), (x1 + x2) / 2 if residual else x2)


def test_only_the_middle_slice_is_seen():
    x = torch.randn(1, 3, 32, 32)
    alone = x.clone()
    alone[:, [0, 2]] = 0
    middle, whole = RecUNet(3, 2, **SMALL).eval(), RecUNet(3, 2, **SMALL, slices="all").eval()
    with torch.no_grad():
        assert torch.equal(middle(x), middle(alone))
        assert not torch.equal(whole(x), whole(alone))
    assert whole.e1.first[0].in_channels == 3


def test_wrong_use_is_refused():
    wrongs = (
        ({"slices": "first"}, "middle, all"),
        ({"widths": (4, 8)}, "five even"),
        ({"in_channels": 2}, "no middle slice"),
    )
    for wrong, message in wrongs:
        with pytest.raises(ModelError, match=message):
            RecUNet(**({"in_channels": 3, "num_classes": 2} | SMALL | wrong))
    with pytest.raises(ModelError, match="Y size is a multiple of 16, found 40"):
        build_model("rec_unet", in_channels=3, num_classes=2, options=SMALL)(
            torch.zeros(1, 3, 40, 32)
        )
