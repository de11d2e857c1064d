"""MedNeXt's counts against the paper's table, its shapes, its blocks, UpKern."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfleet.models.mednext import Block, DownBlock, MedNeXt, UpBlock, enlarge_kernels
from segfleet.models.registry import ModelError, count_parameters, spec, stage_table

PAPER = {  # millions of parameters, kernel 3 and kernel 5
    "s": (5.6, 5.9), "b": (10.5, 11.0), "m": (17.6, 18.3), "l": (61.8, 63.0),
}  # fmt: skip


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", PAPER)
def test_counts(size, kernel):
    chosen = spec(f"mednext_{size}{kernel}")
    with torch.device("meta"):
        model = chosen.build(in_channels=1, num_classes=2)
    assert count_parameters(model) == chosen.parameters == sum(chosen.stages.values())
    assert stage_table(model, chosen) == dict(chosen.stages)
    # the table's digits: rounded, but for 5.98, which it prints as 5.9
    assert chosen.parameters / 1e6 == pytest.approx(PAPER[size][kernel == 5], abs=0.09)


def test_closed_form_of_a_block():
    """Depthwise k^3 C + C, norm 2C, expansion R C^2 + R C, compression R C^2 + C."""
    for c, r, k in ((8, 2, 3), (6, 4, 5)):
        expected = k**3 * c + c + 2 * c + r * c * c + r * c + r * c * c + c
        assert count_parameters(Block(c, c, r, k)) == expected


def by_hand(block: nn.Module, x: torch.Tensor, resize) -> torch.Tensor:
    y = resize(x, block.depthwise.weight, block.depthwise.bias, groups=x.shape[1])
    mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), keepdim=True, correction=0)
    y = (y - mean) / (var + 1e-5).sqrt() * block.norm.weight.view(-1, 1, 1, 1)
    y = y + block.norm.bias.view(-1, 1, 1, 1)
    y = F.gelu(F.conv3d(y, block.expand.weight, block.expand.bias))
    return F.conv3d(y, block.compress.weight, block.compress.bias)


def test_blocks_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 4, 8)
    same, down, up = Block(4, 4, 2, 3), DownBlock(4, 2, 5), UpBlock(4, 3, 3)
    torch.testing.assert_close(
        same(x), x + by_hand(same, x, lambda *a, **k: F.conv3d(*a, padding=1, **k))
    )
    expected = by_hand(down, x, lambda *a, **k: F.conv3d(*a, padding=2, stride=2, **k))
    shortcut = F.conv3d(x[..., ::2, ::2, ::2], down.shortcut.weight, down.shortcut.bias)
    torch.testing.assert_close(down(x), expected + shortcut)
    found = up(x)
    assert found.shape == (2, 2, 12, 8, 16)
    assert not found[:, :, 0].any() and not found[..., 0].any()  # the padded planes
    deep = by_hand(up, x, lambda *a, **k: F.conv_transpose3d(*a, padding=1, stride=2, **k))
    beside = F.conv_transpose3d(x, up.shortcut.weight, up.shortcut.bias, stride=2)
    torch.testing.assert_close(found[:, :, 1:, 1:, 1:], deep + beside)


def test_outputs_and_rules():
    small = {"expansions": (2,) * 9, "blocks": (1,) * 9, "width": 4}
    model = MedNeXt(1, 3, **small)
    shapes = [tuple(o.shape[2:]) for o in model.train()(torch.zeros(2, 1, 32, 16, 32))]
    assert shapes == [(32, 16, 32), (16, 8, 16), (8, 4, 8), (4, 2, 4), (2, 1, 2)]
    assert model.eval()(torch.zeros(1, 1, 16, 16, 32)).shape == (1, 3, 16, 16, 32)
    with pytest.raises(ModelError, match="deepest map of one voxel"):
        model(torch.zeros(2, 1, 16, 16, 16))
    for wrong, message in (
        ({"kernel": 4}, "kernel is 4, expected 3, 5 or 7"),
        ({"blocks": (1,) * 8}, "need 9 positive numbers"),
    ):
        with pytest.raises(ModelError, match=message):
            MedNeXt(1, 2, **(small | wrong))


def test_larger_kernels_start_from_smaller_ones():
    torch.manual_seed(0)
    small = {"expansions": (2,) * 9, "blocks": (1,) * 9, "width": 4}
    three, five = MedNeXt(1, 2, **small), MedNeXt(1, 2, **small, kernel=5)
    enlarge_kernels(three, five)
    there, here = three.state_dict(), five.state_dict()
    for name, value in here.items():
        if value.shape == there[name].shape:
            assert torch.equal(value, there[name]), name
        else:
            expected = F.interpolate(there[name], (5, 5, 5), mode="trilinear")
            torch.testing.assert_close(value, expected)
    with pytest.raises(ModelError, match="of one size only"):
        enlarge_kernels(MedNeXt(1, 2, **(small | {"blocks": (2,) * 9})), five)
