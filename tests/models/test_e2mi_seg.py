"""E2MISeg's attention, blocks and skips against their formulas; its counts, cost and patch rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfleet.models.e2mi_seg.attention import PairedAttention
from segfleet.models.e2mi_seg.blocks import GroupAggregation, HybridBlock, ResidualBlock
from segfleet.models.e2mi_seg.network import SMALL, E2MISeg
from segfleet.models.profile import count_macs
from segfleet.models.registry import ModelError, build_model, count_parameters, spec, stage_table

MCL = {
    "projection": "shared",
    "merge": "concat",
    "dropout": 0.15,
    "qk_source": "conv",
    "legacy_qkvv": True,
    "legacy_scramble": False,
}
BRATS = MCL | {"projection": "shared_no_bias", "merge": "sum"}
ACDC = MCL | {"projection": "separate"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("variant", "giga"), [("acdc", 60.4), ("brats", 98.8), ("mcl", 70.0)])
def test_counts_and_cost(variant, giga):
    chosen = spec(f"e2mi_seg_{variant}")
    with torch.device("meta"):
        model = chosen.build(in_channels=chosen.in_channels, num_classes=chosen.num_classes)
        lean = chosen.build(
            in_channels=chosen.in_channels, num_classes=chosen.num_classes, legacy_qkvv=False
        )
    assert count_parameters(model) == chosen.parameters == sum(chosen.stages.values())
    assert stage_table(model, chosen) == dict(chosen.stages)
    blocks = [m for m in model.modules() if isinstance(m, HybridBlock)]
    unused = sum(m.attention.qkvv.weight.numel() // 2 for m in blocks)
    assert count_parameters(lean) == chosen.parameters - unused
    # The published figure counts the discarded half of the projections and the heads that
    # evaluation leaves out.
    discarded = sum(m.attention.qkvv.weight.numel() // 2 * m.position.shape[1] for m in blocks)
    finer, coarser = (step.blocks[0].position.shape[1] for step in (model.dec1, model.dec2))
    heads = model.head1.weight.numel() * finer + model.head2.weight.numel() * coarser
    macs = count_macs(model, (1, chosen.in_channels, *chosen.paper_input))
    assert (macs + discarded + heads) / 1e9 == pytest.approx(giga, abs=0.06)


@pytest.mark.parametrize(
    "options", [MCL, BRATS, ACDC, MCL | {"qk_source": "tokens"}, MCL | {"legacy_scramble": True}]
)
def test_paired_attention_per_head(options):
    """Every head and sample on its own, with plain matrices."""
    batch, tokens, channels, heads, p = 2, 6, 8, 2, 3
    pa = PairedAttention(channels, tokens, p, heads, **options).eval()
    nn.init.normal_(pa.channel_scale)
    nn.init.normal_(pa.spatial_scale)
    t, y = torch.randn(batch, tokens, channels), torch.randn(batch, channels, tokens)
    found = pa(t, y)
    d, project_k, project_v = (
        channels // heads,
        pa.key_projection,
        pa.value_projection or pa.key_projection,
    )
    parts = (t @ pa.qkvv.weight.T).split(channels, -1)
    for b in range(batch):
        by_channel, by_space = torch.empty(tokens, channels), torch.empty(heads, tokens, d)
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            from_tokens = options["qk_source"] == "tokens"
            q, k = (
                (parts[0][b, :, own].T, parts[1][b, :, own].T)
                if from_tokens
                else (y[b, own], y[b, own])
            )
            q_unit, k_unit = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
            values_c, values_s = parts[-2][b, :, own].T, parts[-1][b, :, own].T  # (d, N)
            by_channel[:, own] = (
                torch.softmax(pa.channel_scale[h] * q_unit @ k_unit.T, 1) @ values_c
            ).T
            by_space[h] = (
                torch.softmax(pa.spatial_scale[h] * q_unit.T @ project_k(k), 1)
                @ project_v(values_s).T
            )
        by_space = by_space.permute((2, 0, 1) if options["legacy_scramble"] else (1, 0, 2)).reshape(
            tokens, channels
        )
        expected = by_space + by_channel
        if pa.merge is not None:
            expected = torch.cat((pa.merge[0](by_space), pa.merge[1](by_channel)), 1)
        torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-5)


def test_unused_projection_does_not_act():
    pa, t, y = PairedAttention(8, 6, 3, 2, **MCL).eval(), torch.randn(1, 6, 8), torch.randn(1, 8, 6)
    before = pa(t, y)
    with torch.no_grad():
        pa.qkvv.weight[:16] += 1
    assert torch.equal(pa(t, y), before)


@pytest.mark.parametrize("local_residual", [True, False])
@pytest.mark.parametrize("early_skip", [False, True])
@pytest.mark.parametrize(("qk_source", "weight"), [("conv", 1.0), ("tokens", 1.0), ("tokens", 1.1)])
def test_hybrid_block(local_residual, qk_source, weight, early_skip):
    switches = {
        "norm": "batch",
        "local_norm": True,
        "local_residual": local_residual,
        "local_weight": weight,
        "residual_blocks": 2,
        "dropout": 0.1,
    }
    block = HybridBlock(
        8, (2, 3, 4), 3, 2, **switches, early_skip=early_skip,
        attention=MCL | {"qk_source": qk_source},
    ).eval()  # fmt: skip
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, 2, 3, 4)
    y = x
    for i in (0, 3):
        y = F.leaky_relu(block.local[i + 1](F.conv3d(y, block.local[i].weight, padding=1)), 0.01)
    y = x + y if local_residual else y
    t = x.reshape(2, 8, 24).transpose(1, 2) + block.position
    a = t + block.scale * block.attention(
        F.layer_norm(t, (8,), block.norm.weight, block.norm.bias), y.reshape(2, 8, 24)
    )
    a = a.transpose(1, 2).reshape(x.shape)
    mix = block.refine[-1]
    r = a + F.conv3d(block.refine[1](block.refine[0](a)), mix.weight, mix.bias)
    last = r + weight * y if qk_source == "tokens" else r
    if early_skip:
        expected = F.conv3d(last + x, block.out.weight)
    else:
        expected = F.conv3d(last, block.out.weight) + x
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["acdc", "brats", "mcl"])
def test_one_option_is_one_revision(variant):
    """The older design: ordinary paired attention, the bare convolution branch added at the end."""
    chosen = spec(f"e2mi_seg_{variant}")
    for revision, source in (("2025-01", "conv"), ("2024-08", "tokens")):
        model = chosen.build(
            in_channels=1, num_classes=2, **chosen.reduced, revision=revision, local_weight=1.1
        )
        blocks = [m for m in model.modules() if isinstance(m, HybridBlock)]
        for block in blocks:
            assert block.attention.from_tokens == (source == "tokens")
            assert block.joins_late == (source == "tokens") and block.local_weight == 1.1
            assert block.local_residual == (variant == "acdc" and revision == "2025-01")
    early = chosen.build(in_channels=1, num_classes=2, **chosen.reduced, early_skip=True)
    assert all(m.early_skip for m in early.modules() if isinstance(m, HybridBlock))
    with torch.device("meta"):  # "the old revision has identical counts"
        old = chosen.build(
            in_channels=chosen.in_channels, num_classes=chosen.num_classes, revision="2024-08"
        )
    assert count_parameters(old) == chosen.parameters


def test_published_size_of_a_block():
    switches = {
        "norm": "batch",
        "local_norm": True,
        "local_residual": True,
        "local_weight": 1.0,
        "residual_blocks": 2,
        "dropout": 0.1,
    }
    with torch.device("meta"):
        block = HybridBlock(32, (16, 40, 40), 64, 4, **switches, attention=ACDC)
    assert count_parameters(block) == 4_269_736
    assert count_parameters(block.attention) == 3_282_088
    assert count_parameters(GroupAggregation(256, 128, 4, (2, 2, 2))) == 305_772
    assert [count_parameters(ResidualBlock(a, 16)) for a in (1, 4)] == [7_360, 8_704]


@pytest.mark.parametrize("clamped", [True, False])
def test_group_aggregation(clamped):
    """Four groups, each a quarter of both maps and the whole guess, under one layer norm; outputs
    at the skip's size."""
    grid = (4, 10, 8)
    mfga = GroupAggregation(16, 8, 3, (2, 2, 2), grid if clamped else None)
    deep, skip = torch.randn(2, 16, 2, 5, 4), torch.randn(2, 8, *grid)
    v = F.conv_transpose3d(deep, mfga.up.weight, stride=2)
    m = F.conv3d(v, mfga.guess.weight, mfga.guess.bias)
    parts = []
    for g, r in enumerate((1, 2, 6, 7)):
        z = torch.cat((v[:, 2 * g : 2 * g + 2], skip[:, 2 * g : 2 * g + 2], m), 1)
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        reach = tuple(min(r, size - 1) for size in grid) if clamped else (r,) * 3
        conv = mfga.convs[g]
        parts.append(F.conv3d(z, conv.weight, conv.bias, padding=reach, dilation=reach, groups=7))
    z = torch.cat(parts, 1)
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        mfga(deep, skip), F.conv3d(z, mfga.mix[1].weight), rtol=1e-4, atol=1e-4
    )


def test_three_heads_at_their_grids():
    model, x = (
        E2MISeg(2, 3, patch=(16, 32, 64), stem_depth=2, **SMALL),
        torch.randn(2, 2, 16, 32, 64),
    )
    assert [tuple(y.shape) for y in model.train()(x)] == [
        (2, 3, 16, 32, 64),
        (2, 3, 8, 8, 16),
        (2, 3, 4, 4, 8),
    ]
    alone = E2MISeg(
        2, 3, patch=(16, 32, 64), stem_depth=2, **SMALL, deep_supervision=False, norm="instance"
    )
    assert alone.train()(x).shape == (2, 3, 16, 32, 64)


def test_wrong_use_is_refused():
    for wrong, message in (
        ({"patch": (16, 32, 40)}, r"multiples of \(16, 32, 32\), found \(16, 32, 40\)"),
        ({"stem_depth": 3}, "1, 2 or 4"),
        ({"widths": (8, 16)}, "four numbers"),
        ({"widths": (8, 12, 24, 48)}, "multiple of the one before"),
        ({"projection": "both"}, "separate, shared, shared_no_bias"),
        ({"merge": "mean"}, "concat, sum"),
        ({"revision": "2023"}, "2025-01, 2024-08"),
        ({"norm": "layer"}, "batch, instance"),
        ({"heads": 3}, "multiple of the 3 heads"),
    ):
        with pytest.raises(ModelError, match=message):
            E2MISeg(1, 2, **(SMALL | {"patch": (16, 32, 32)} | wrong))
    model = build_model(
        "e2mi_seg_mcl", in_channels=1, num_classes=2, options=SMALL | {"patch": (16, 32, 32)}
    )
    with pytest.raises(
        ModelError, match=r"built for patches of \(16, 32, 32\), found \(16, 32, 64\)"
    ):
        model(torch.zeros(1, 1, 16, 32, 64))
