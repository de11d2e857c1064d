"""The blocks of ASC-Seg against their formulas, written here a second time with plain functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfleet.models.asc_seg.decoder import (
    ChannelGate,
    Connector,
    DecoderBlock,
    Denoise,
    MultiScale,
    SpatialGate,
)
from segfleet.models.asc_seg.encoder import (
    DeformableGate,
    EncoderBlock,
    GatedConv,
    ParallelMixer,
    RasterMamba,
)
from segfleet.models.profile import count_macs
from segfleet.models.registry import ModelError, build_model, count_parameters, spec
from segfleet.models.scan import Mamba


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(module: nn.Module) -> nn.Module:
    """The module in double precision with no parameter at a special value such as 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.double().train()


def bn(x, norm):
    """Batch normalisation by the batch's own statistics, from the definition."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(
        1, -1, 1, 1
    )


def cv(x, layer, k=1, *, dilation=1, groups=1):
    return F.conv2d(
        x, layer.weight, layer.bias, padding=dilation * (k // 2), dilation=dilation, groups=groups
    )


def ln(x, norm):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def up(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_parallel_mixer_equals_four_mambas_on_sequences():
    block, x = drawn(ParallelMixer(16, "mamba")), image(2, 16, 6, 5)
    mamba = Mamba(4).double()
    mamba.load_state_dict(block.mixer.state_dict())
    s = x.flatten(2).transpose(1, 2)  # (B, L, C), X fastest
    n = ln(s, block.norm)
    m = torch.cat([mamba(n[..., i : i + 4]) + n[..., i : i + 4] for i in range(0, 16, 4)], -1)
    r = ln(m, block.norm) @ block.linear.weight.T + block.linear.bias + s
    v = ln(r, block.norm).transpose(1, 2).view(2, 16, 6, 5)
    enter, depthwise, _, leave = block.tail
    expected = cv(gelu(cv(cv(v, enter), depthwise, 7, groups=16)), leave)
    torch.testing.assert_close(block(x), expected)


def test_mamba_reads_the_map_row_by_row_and_never_ahead():
    mixer, x = RasterMamba(4).double(), image(1, 5, 6, 4)
    changed = x.clone()
    changed[:, 2, 3] += 1
    differs = (mixer(changed) - mixer(x)).abs().amax((0, 3)).flatten() > 0
    assert not differs[: 2 * 6 + 3].any()
    assert differs[2 * 6 + 3 :].all()


def test_gated_conv_has_mambas_budget_and_looks_both_ways():
    for c in (2, 4, 6, 8):
        assert count_parameters(GatedConv(c)) == 6 * c * c + 100 * c
        assert count_parameters(Mamba(c)) == 6 * c * c + 114 * c
    with_mamba, without = spec("asc_seg").parameters, spec("asc_seg_nomamba").parameters
    assert abs(with_mamba - without) / with_mamba < 0.002
    mixer, x = GatedConv(4).double(), image(1, 9, 9, 4)
    changed = x.clone()
    changed[:, 4, 4] += 1
    differs = (mixer(changed) - mixer(x)).abs().amax((0, 3)) > 0
    assert differs[1:8, 1:8].all() and differs.sum() == 49


def test_deformable_gate_reads_where_the_offsets_say():
    block, x = drawn(DeformableGate(8, zero_offsets=False)), image(2, 8, 7, 6)
    # every tap one row further down, none sideways: offsets come as row, column, row, column, ...
    with torch.no_grad():
        block.offset[1].weight.zero_()
        block.offset[1].bias.copy_(torch.tensor([1.0, 0.0] * 9))
    q = gelu(bn(cv(x, block.enter[0]), block.enter[1]))
    below = F.pad(q, (0, 0, 0, 2))[:, :, 1:]  # one row up, two rows of zeros below
    # rows -1..1 of `below`, row -1 of it is row 0 of q
    w = F.conv2d(F.pad(below, (1, 1, 0, 0)), block.deform.weight, groups=8)
    top = F.conv2d(F.pad(q[:, :, :3], (1, 1, 0, 0)), block.deform.weight, groups=8)
    w = torch.cat([top, w], 2)[:, :, :7]
    g = gelu(bn(cv(w, block.leave[0]), block.leave[1]))
    torch.testing.assert_close(block(x), g * x + x)


def test_zero_offsets_start_as_a_plain_depthwise_convolution():
    block, x = DeformableGate(8, zero_offsets=True).double().train(), image(2, 8, 5, 5)
    q = gelu(bn(cv(x, block.enter[0]), block.enter[1]))
    w = F.conv2d(q, block.deform.weight, padding=1, groups=8)
    torch.testing.assert_close(block(x), gelu(bn(cv(w, block.leave[0]), block.leave[1])) * x + x)
    block(x).square().sum().backward()
    assert block.offset[1].weight.grad.abs().min() > 0, "the offsets can leave zero"


def test_encoder_block_is_the_plain_sum():
    block, x = (
        drawn(EncoderBlock(3, 8, mixer="gated_conv", zero_offsets=False)),
        image(2, 3, 16, 16),
    )
    a = x
    for i, k in ((0, 7), (3, 3), (6, 1)):
        a = F.relu(bn(cv(a, block.ipcb[i], k), block.ipcb[i + 1]))
    torch.testing.assert_close(block(x), block.pmb(a) + block.dcb(a))


def test_connector_equals_the_published_order():
    block, deep, skip = drawn(Connector(16, 8)), image(2, 16, 4, 3), image(2, 8, 8, 6)
    gate = torch.sigmoid(bn(cv(up(deep), block.conv), block.norm))
    torch.testing.assert_close(block(deep, skip), gate * torch.sigmoid(skip) + skip)


def test_multi_scale():
    block, x = drawn(MultiScale(8)), image(2, 8, 8, 12)

    def core(i, x, dilation):
        first, norm, _, last, last_norm = block.branches[i]
        return bn(cv(F.relu(bn(cv(x, first, 3, dilation=dilation), norm)), last), last_norm)

    branches = [core(i, x, i + 1) for i in range(4)]
    branches += [F.max_pool2d(core(4, up(x), 1), 2), F.max_pool2d(core(5, up(x), 3), 2)]
    branches += [up(core(6, F.max_pool2d(x, 2), 1)), up(core(7, F.max_pool2d(x, 2), 3))]
    grouped, norm, _, last, last_norm = block.fuse
    # at 8 channels output channel j of the grouped convolution reads branch j alone
    fused = torch.cat(
        [
            F.conv2d(b, grouped.weight[j : j + 1], grouped.bias[j : j + 1], padding=1)
            for j, b in enumerate(branches)
        ],
        1,
    )
    torch.testing.assert_close(block(x), bn(cv(F.relu(bn(fused, norm)), last), last_norm))


def test_denoise():
    block, x = drawn(Denoise(8)), image(2, 8, 6, 7)
    n = bn(x, block.enter)
    total = torch.zeros_like(x)
    for k, (depthwise, norm, _, last, last_norm) in zip((7, 5, 3), block.scales, strict=True):
        total = total + bn(cv(gelu(bn(cv(n, depthwise, k, groups=8), norm)), last), last_norm)
    s = bn(total, block.join)
    # padding counted
    mean = F.conv2d(s, torch.full((8, 1, 3, 3), 1 / 9, dtype=s.dtype), padding=1, groups=8)
    gate = torch.sigmoid(bn(cv(s - mean, block.gate[0]), block.gate[1]))
    torch.testing.assert_close(block(x), s * gate + s)


def test_spatial_gate():
    block, x = drawn(SpatialGate(8)), image(2, 8, 6, 7)

    def path(x, layers):
        return bn(cv(gelu(bn(cv(x, layers[0]), layers[1])), layers[3]), layers[4])

    mean = F.conv2d(x, torch.full((8, 1, 3, 3), 1 / 9, dtype=x.dtype), padding=1, groups=8)
    peak = (
        F.pad(x, (1, 1, 1, 1), value=-float("inf")).unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))
    )
    both = torch.cat([path(mean, block.mean), path(peak, block.peak)], 1)
    m = torch.sigmoid(bn(cv(both, block.gate[0], 7), block.gate[1]))
    torch.testing.assert_close(block(x), m * x + x)


def test_channel_gate():
    block, x = drawn(ChannelGate(8, "batch")), image(5, 8, 6, 7)
    v = (x.flatten(2).max(-1).values + x.flatten(2).mean(-1))[..., None, None]
    gate = torch.sigmoid(
        bn(cv(gelu(bn(cv(v, block.gate[0]), block.gate[1])), block.gate[3]), block.gate[4])
    )
    torch.testing.assert_close(block(x), gate * x + x)


def test_decoder_block_is_a_series_with_a_residual():
    block, x = drawn(DecoderBlock(8, "batch")), image(3, 8, 8, 8)
    out = block.cab(block.sab(block.dfb(block.msfa(x))))
    torch.testing.assert_close(block(x), (out + x).clamp(min=0))


@pytest.mark.parametrize("name", ["asc_seg", "asc_seg_nomamba"])
def test_heads(name):
    model = build_model(
        name, in_channels=2, num_classes=3, options={"widths": [8, 8, 16, 8]}
    ).train()
    seen = {}
    for level in (1, 2, 3, 4):
        model.get_submodule(f"decoder{level}").register_forward_hook(
            lambda _, __, out, level=level: seen.update({level: out})
        )
    outputs = model(torch.randn(2, 2, 32, 48))
    assert [tuple(out.shape) for out in outputs] == [(2, 3, 32, 48)] * 4
    # published: enlarged first, convolved after, then a sigmoid
    for level, out in enumerate(outputs, 1):
        head, factor = model.get_submodule(f"head{level}"), 2 ** (level - 1)
        full = F.interpolate(seen[level], scale_factor=factor, mode="bilinear", align_corners=True)
        torch.testing.assert_close(out, cv(full, head), rtol=1e-4, atol=1e-5)
    assert min(out.min() for out in outputs) < 0, "logits, not probabilities"
    model.eval()
    assert model(torch.randn(1, 2, 32, 48)).shape == (1, 3, 32, 48)


def test_without_deep_supervision_there_is_one_head():
    model = build_model(
        "asc_seg_nomamba", in_channels=3, num_classes=1, options={"deep_supervision": False}
    ).train()
    assert count_parameters(model) == spec("asc_seg_nomamba").parameters - 17 - 25 - 33
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 1, 16, 16)


def test_a_batch_of_one_is_refused_in_training_or_normalised_over_channels():
    small = {"widths": (8, 8, 8, 8)}
    model, x = (
        build_model("asc_seg_nomamba", in_channels=1, num_classes=1, options=small),
        torch.randn(1, 1, 32, 32),
    )
    with pytest.raises(ModelError, match="cannot train on a batch of 1.*gate_norm=group"):
        model.train()(x)
    assert model.eval()(x).shape == (1, 1, 32, 32)
    grouped = build_model(
        "asc_seg_nomamba", in_channels=1, num_classes=1, options=small | {"gate_norm": "group"}
    )
    assert len(grouped.train()(x)) == 4
    assert count_parameters(grouped) == count_parameters(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"widths": [8, 16, 24]}, "widths: found .8, 16, 24., expected four multiples of 8"),
        ({"widths": [8, 16, 24, 36]}, "expected four multiples of 8"),
        ({"gate_norm": "layer"}, "gate_norm: found 'layer', expected one of: batch, group"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ModelError, match=said):
        build_model("asc_seg", in_channels=3, num_classes=1, options=options)


@pytest.mark.parametrize(
    ("widths", "parameters"), [((16, 32, 48, 64), 811_688), ((16, 32, 64, 128), 2_008_384)]
)
def test_parameters_at_other_widths(widths, parameters):
    with torch.device("meta"):
        assert (
            count_parameters(
                build_model("asc_seg", in_channels=3, num_classes=1, options={"widths": widths})
            )
            == parameters
        )


def test_cost_is_the_published_one_less_what_the_order_of_operations_saves():
    with torch.device("meta"):
        ours = count_macs(build_model("asc_seg", in_channels=3, num_classes=1), (1, 3, 256, 256))
    pixels, widths = [(256 >> level) ** 2 for level in range(4)], (8, 16, 24, 32)
    connectors = sum((pixels[i] - pixels[i + 1]) * widths[i] * widths[i + 1] for i in range(3))
    heads = pixels[0] * sum(widths[1:])  # evaluation needs the first head only
    assert round((ours + connectors + heads) / 1e9, 2) == 1.69
