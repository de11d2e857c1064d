"""NLIE-UNet's blocks against their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from segfleet.models.nlie_unet import (
    Bridge,
    ChannelGate,
    CyclicBlock,
    CyclicDeformable,
    InterwovenFusion,
    NlieUNet,
    Resample,
)
from segfleet.models.registry import ModelError, build_model, count_parameters, spec, stage_table


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", "tsbl")
def test_counts_of_every_stage(size):
    chosen = spec(f"nlie_unet_{size}")
    with torch.device("meta"):
        model = chosen.build(in_channels=3, num_classes=1)
    assert count_parameters(model) == chosen.parameters == sum(chosen.stages.values())
    assert stage_table(model, chosen) == chosen.stages


@pytest.mark.parametrize(
    ("size", "giga"), [("t", 1.712), ("s", 4.967), ("b", 16.103732992), ("l", 56.885)]
)
def test_published_cost(size, giga):
    with torch.device("meta"):
        model, x = (
            build_model(f"nlie_unet_{size}", in_channels=3, num_classes=1),
            torch.zeros(1, 3, 256, 256),
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0 if size == "b" else 5e-4)


def test_pieces_of_the_bridge_have_the_published_counts():
    assert [
        count_parameters(Resample(a, b))
        for a, b in ((32, 64), (64, 128), (256, 128), (512, 256), (64, 32))
    ] == [26_432, 89_728, 147_072, 556_288, 12_192]
    assert [count_parameters(InterwovenFusion(128, n)) for n in (1, 2)] == [111_616, 167_424]
    assert count_parameters(CyclicBlock(128, 256, 4, "zero").chain) == 141_750


@pytest.mark.parametrize("groups", [2, 4])
def test_cyclic_chain(groups):
    """With zero offsets the chain is o0 = K0 u0, oi = Ki (o(i-1) + ui), and the last group
    unchanged."""
    chain, u = CyclicDeformable(8, groups, "zero").double(), torch.randn(2, 8, 6, 5).double()
    parts, expected, last = u.split(8 // groups, 1), [], 0.0
    for kernel, part in zip(chain.kernels, parts[:-1], strict=True):
        last = F.conv2d(last + part, kernel.kernel.weight, padding=1)
        expected.append(last)
    torch.testing.assert_close(chain(u), torch.cat((*expected, parts[-1]), 1))


def test_block_adds_the_first_stage_not_the_chain():
    block, x = CyclicBlock(3, 8, 2, "random").eval(), torch.randn(1, 3, 6, 6)
    u = F.relu(block.point[1](block.point[0](x)))
    w = u + F.relu(block.conv[1](block.conv[0](u + block.chain(u))))
    torch.testing.assert_close(block(x), block.gate(w))


def test_channel_gate():
    gate, x = ChannelGate(), torch.randn(2, 5, 3, 4)
    mean, (k0, k1, k2) = F.pad(x.mean((2, 3)), (1, 1)), gate.conv.weight.flatten()
    expected = torch.sigmoid(k0 * mean[:, :-2] + k1 * mean[:, 1:-1] + k2 * mean[:, 2:])
    torch.testing.assert_close(gate(x), x * expected.view(2, 5, 1, 1))


@pytest.mark.parametrize("neighbours", [1, 2])
def test_interwoven_fusion(neighbours):
    fuse, inputs = (
        InterwovenFusion(4, neighbours),
        [torch.randn(2, 4, 11, 10) for _ in range(neighbours + 1)],
    )
    gate, spatial = 0.0, 0.0
    for i, z in enumerate(inputs):
        gate = gate + z.mean((2, 3)) @ fuse.channel[i].weight.T + fuse.channel[i].bias
        path = fuse.spatial[i]
        z = F.conv2d(z, path.first.weight, path.first.bias, padding=1, groups=4)
        total = z if i == 0 else 0.0
        for scale in path.scales:
            total = total + F.conv2d(
                z, scale.weight, scale.bias, padding=scale.weight.shape[-1] // 2, groups=4
            )
        spatial = spatial + F.conv2d(total, path.mix.weight, path.mix.bias)
    a = torch.sigmoid(gate / len(inputs)).view(2, 4, 1, 1)
    x = inputs[0]
    torch.testing.assert_close(
        fuse(*inputs), F.relu(x * a) + x + spatial / len(inputs), rtol=1e-4, atol=1e-5
    )


def test_bridge_wiring():
    """Each fused level sees its neighbours only; the first refines level 2 as released, or its
    own."""
    widths = (2, 4, 6, 8, 10)
    for base, own in (("level2", 1), ("own", 0)):
        bridge, seen = Bridge(widths, base).eval(), []
        for fuse in bridge.fuse:
            fuse.register_forward_hook(lambda _m, inputs, _o, seen=seen: seen.append(inputs))
        levels = [torch.randn(1, w, 32 >> i, 32 >> i) for i, w in enumerate(widths)]
        outputs = bridge(levels)
        assert [tuple(y.shape) for y in outputs] == [tuple(e.shape) for e in levels]
        arrived = [gather(e) for gather, e in zip(bridge.gather, levels, strict=True)]
        order = [(own, 1 - own), (1, 0, 2), (2, 1, 3), (3, 2, 4), (4, 3)]
        for found, expected in zip(seen, order, strict=True):
            assert len(found) == len(expected) and all(
                torch.equal(f, arrived[i]) for f, i in zip(found, expected, strict=True)
            )


def test_options_and_wrong_use():
    small = {"widths": (4, 8, 12, 16, 24)}
    with torch.no_grad():
        assert NlieUNet(1, 2, **small, offset_bias="random", level1_base="own").eval()(
            torch.randn(1, 1, 48, 32)
        ).shape == (1, 2, 48, 32)
    with pytest.raises(ModelError, match="X size is a multiple of 16, found 250"):
        NlieUNet(3, 1, **small)(torch.zeros(1, 3, 256, 250))
    for wrong, message in (
        ({"widths": (4, 8)}, "five increasing"),
        ({"scales": (1, 4, 8)}, "at least 2"),
        ({"level1_base": "x"}, "level2, own"),
        ({"offset_bias": "x"}, "zero, random"),
    ):
        with pytest.raises(ModelError, match=message):
            NlieUNet(3, 1, **(small | wrong))
