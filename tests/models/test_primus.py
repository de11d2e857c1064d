"""Primus against the counts and the numbers of dynamic-network-architectures 0.4.4 with timm
1.0.15, which nnU-Net trains, and against its definitions by other means."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from segfleet.models.primus import Primus, RotaryAttention, Tokenizer, rotate, rotations
from segfleet.models.registry import ModelError, count_parameters, spec, stage_table

SMALL = {"patch": (16, 24, 16), "width": 24, "depth": 2, "heads": 2}
UPSTREAM = {  # one channel, two classes, patch 160 x 160 x 160
    "primus_m": 152_021_402, "primus_v3_s": 73_561_413, "primus_v3_m": 210_015_165,
}  # fmt: skip
OTHERS = {  # width, depth, heads: version 1, version 3
    (792, 12, 12): (98_173_994, 154_508_661), (1056, 24, 16): (332_177_954, 394_595_973),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAM)
def test_counts(name):
    chosen = spec(name)
    with torch.device("meta"):
        model = chosen.build(in_channels=1, num_classes=2)
    assert count_parameters(model) == chosen.parameters == UPSTREAM[name]
    assert stage_table(model, chosen) == dict(chosen.stages)


@pytest.mark.parametrize("size", OTHERS)
def test_counts_of_the_other_sizes(size):
    width, depth, heads = size
    options = {"width": width, "depth": depth, "heads": heads}
    with torch.device("meta"):
        found = [
            Primus(1, 2, **options, channels=channels) for channels in ((), (32, 64, 256, 1024))
        ]
    assert tuple(count_parameters(model) for model in found) == OTHERS[size]


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter from its place in the network alone, so that another library can do so."""
    with torch.no_grad():
        for parameter in model.parameters():
            n = torch.arange(parameter.numel(), dtype=torch.float64)
            fan = parameter.numel() / (len(parameter) if parameter.ndim else 1)
            value = torch.sin(1.7 * n * n + parameter.numel()) / fan**0.5
            parameter.copy_(value.view(parameter.shape))
    return model


@pytest.mark.parametrize(
    ("channels", "mean", "norm"),
    [
        ((), 0.3466059172900165, 86.12429509337264),
        ((8, 8, 16, 16), 0.3466447279947434, 86.149705896345),
    ],
)
def test_the_numbers_of_the_published_code(channels, mean, norm):
    model = filled(Primus(1, 2, **SMALL, channels=channels).double().eval())
    x = torch.sin(0.11 * torch.arange(16 * 24 * 16, dtype=torch.float64)).view(1, 1, 16, 24, 16)
    found = model(x)
    assert found.mean().item() == pytest.approx(mean, rel=1e-7)
    assert found.norm().item() == pytest.approx(norm, rel=1e-7)


def test_positions_turn_pairs_of_channels():
    """A pair of channels is a complex number, times e^(i · place · frequency) of its axis."""
    grid, width = (2, 3, 4), 12
    sine, cosine = rotations(grid, width)
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    found = torch.view_as_complex(rotate(x, sine, cosine).view(24, 6, 2).contiguous())
    given = torch.view_as_complex(x.view(24, 6, 2))
    for token, (z, y, x_) in enumerate(
        (z, y, x) for z in range(2) for y in range(3) for x in range(4)
    ):
        angles = [place * f for place in (z, y, x_) for f in (1.0, 1e-2)]
        for pair, angle in enumerate(angles):
            expected = given[token, pair] * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(found[token, pair], expected)


def test_attention_sees_distances_only():
    """Queries and keys turned by their places: scores depend on the difference of places."""
    sine, cosine = rotations((1, 1, 8), 12)
    draw = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 12, generator=draw), torch.randn(1, 12, generator=draw)
    scores = rotate(q.expand(8, -1), sine, cosine) @ rotate(k.expand(8, -1), sine, cosine).T
    for distance in range(-7, 8):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_attention_by_hand():
    torch.manual_seed(0)
    layer = RotaryAttention(12, 2).double()
    t = torch.randn(2, 5, 12, dtype=torch.float64)
    still = torch.zeros(5, 6, dtype=torch.float64), torch.ones(5, 6, dtype=torch.float64)
    q, k, v = (linear(t).view(2, 5, 2, 6) for linear in (layer.query, layer.key, layer.value))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(6)).softmax(-1)
    mixed = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 5, 12)
    torch.testing.assert_close(layer(t, *still), layer.out(layer.norm(mixed)))


def test_shortcuts_of_the_tokenizer_start_from_almost_nothing():
    torch.manual_seed(0)
    tokens = Tokenizer(1, 12, (4, 4, 8, 8))
    x = torch.randn(1, 1, 16, 8, 8)
    found = tokens(x)
    assert found.shape == (1, 12, 2, 1, 1)
    for scale in tokens.scales:
        assert scale.item() == pytest.approx(1e-5)
        torch.nn.init.zeros_(scale)
    plain = tokens(x)
    assert 0 < (found - plain).abs().max() < 1e-3
    deep = x
    for block in (tokens.stem, *tokens.halve):
        deep = block(deep)
    torch.testing.assert_close(plain, F.conv3d(deep, tokens.project.weight, tokens.project.bias))


def test_shapes_and_rules():
    model = Primus(2, 3, **SMALL)
    assert model(torch.zeros(2, 2, 16, 24, 16)).shape == (2, 3, 16, 24, 16)
    with pytest.raises(ModelError, match=r"built for patches of \(16, 24, 16\), found \(16, 16"):
        model(torch.zeros(1, 2, 16, 16, 16))
    for wrong, message in (
        ({"patch": (16, 24, 12)}, "patch must be three multiples of 8"),
        ({"heads": 3}, r"width / heads must be a multiple of 6, found 24 / 3"),
        ({"channels": (8, 8)}, "channels must be none or four numbers"),
        ({"drop_path": 1.0}, r"drop_path is 1.0, expected a probability"),
    ):
        with pytest.raises(ModelError, match=message):
            Primus(1, 2, **(SMALL | wrong))
