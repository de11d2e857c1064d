"""VM-UNet's parts against their definitions, by other means."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from segfleet.models.drop_path import DropPath
from segfleet.models.profile import count_macs
from segfleet.models.registry import ModelError, build_model, count_parameters, spec
from segfleet.models.scan import selective_scan_ref
from segfleet.models.vm_unet import (
    SS2D,
    PatchExpand,
    PatchMerge,
    VSSBlock,
    fold_directions,
    unfold_directions,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_directions_of_a_map():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]]).view(1, 1, 2, 3)
    expected = [[1, 2, 3, 4, 5, 6], [1, 4, 2, 5, 3, 6], [6, 5, 4, 3, 2, 1], [6, 3, 5, 2, 4, 1]]
    assert unfold_directions(x)[0, :, 0].tolist() == expected


def test_folding_puts_every_direction_back():
    x = torch.randn(2, 3, 4, 5)
    sequences = unfold_directions(x)
    for direction in range(4):
        alone = torch.zeros_like(sequences)
        alone[:, direction] = sequences[:, direction]
        torch.testing.assert_close(fold_directions(alone, (4, 5)), x)


def test_one_grouped_scan_equals_four_scans():
    ss2d, (rows, columns) = SS2D(8, state=4).double(), (3, 4)
    x = torch.randn(2, 16, rows, columns, dtype=torch.float64)
    total = torch.zeros_like(x)
    for k, (turned, flipped) in enumerate(
        [(False, False), (True, False), (False, True), (True, True)]
    ):
        s = rearrange(x, "b d y x -> b d (x y)" if turned else "b d y x -> b d (y x)")
        s = s.flip(-1) if flipped else s
        dt, B, C = (ss2d.x_proj_weight[k] @ s).split([1, 4, 4], 1)
        of = slice(16 * k, 16 * (k + 1))
        y = selective_scan_ref(
            s,
            ss2d.dt_projs_weight[k] @ dt,
            -ss2d.A_logs[of].exp(),
            B,
            C,
            ss2d.Ds[of],
            None,
            ss2d.dt_projs_bias[k],
            True,
        )
        y = y.flip(-1) if flipped else y
        total += rearrange(y, "b d (x y) -> b d y x" if turned else "b d (y x) -> b d y x", y=rows)
    torch.testing.assert_close(ss2d.scan(x), total)


def test_ss2d_around_the_scan():
    ss2d, m = SS2D(8, state=4), torch.randn(2, 3, 5, 8)
    xz = m @ ss2d.in_proj.weight.T
    x, z = xz[..., :16], xz[..., 16:]
    x = F.silu(
        F.conv2d(
            rearrange(x, "b y x d -> b d y x"),
            ss2d.conv2d.weight,
            ss2d.conv2d.bias,
            padding=1,
            groups=16,
        )
    )
    y = F.layer_norm(rearrange(ss2d.scan(x), "b d y x -> b y x d"), (16,))
    torch.testing.assert_close(ss2d(m), (y * F.silu(z)) @ ss2d.out_proj.weight.T)


def test_block_has_105408_parameters_at_width_96():
    assert count_parameters(VSSBlock(96, 16, 0.0)) == 105_408


def test_merging_joins_neighbours_column_by_column():
    merge, x = PatchMerge(6), torch.randn(2, 4, 6, 6)
    joined = rearrange(x, "b (y p) (x q) c -> b y x (q p c)", p=2, q=2)
    torch.testing.assert_close(merge(x), F.layer_norm(joined, (24,)) @ merge.linear.weight.T)


@pytest.mark.parametrize("factor", [2, 4])
def test_expanding_deals_out_pixels_row_by_row(factor):
    expand, x = PatchExpand(8, 6, factor), torch.randn(2, 3, 5, 8)
    pixels = rearrange(
        x @ expand.linear.weight.T, "b y x (p q c) -> b (y p) (x q) c", p=factor, q=factor
    )
    torch.testing.assert_close(expand(x), F.layer_norm(pixels, (6,)))


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    drop, x = DropPath(0.2), torch.ones(4000, 2, 3)
    out = drop.train()(x)
    kept = out.flatten(1)
    assert torch.equal(kept.amin(1), kept.amax(1)) and set(kept.unique().tolist()) == {0.0, 1.25}
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


def test_drop_rates_rise_through_the_encoder_and_fall_through_the_decoder():
    with torch.device("meta"):
        model = build_model("vm_unet", in_channels=3, num_classes=1)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates[:8] == pytest.approx([0.2 * i / 7 for i in range(8)])
    assert rates[8:] == pytest.approx([0.2 * i / 6 for i in range(6, -1, -1)])


def test_initial_values():
    ss2d = (
        build_model(
            "vm_unet", in_channels=1, num_classes=1, options={"width": 32, "depths": [1] * 4}
        )
        .encoder1[0]
        .mixer
    )
    assert ss2d.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert ss2d.A_logs.shape == (4 * 128, 16)
    torch.testing.assert_close(ss2d.A_logs[7].exp(), torch.arange(1.0, 17))
    steps = F.softplus(ss2d.dt_projs_bias)
    assert 1e-3 * 0.99 <= steps.min() and steps.max() <= 0.1 * 1.01
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)
    assert (
        ss2d.dt_projs_weight.abs().max() <= 4**-0.5 and ss2d.x_proj_weight.abs().max() <= 128**-0.5
    )


def test_skips_are_added_before_the_upsampling():
    model = build_model(
        "vm_unet", in_channels=3, num_classes=2, options={**spec("vm_unet").reduced, "width": 8}
    ).eval()
    inputs = {}
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        module.register_forward_hook(
            lambda _, __, out, name=name: inputs.update({f"{name} out": out})
        )
    out = model(torch.randn(1, 3, 64, 32))
    assert out.shape == (1, 2, 64, 32)
    for stage, (size, width, encoder) in enumerate(
        [((2, 1), 64, 3), ((4, 2), 32, 2), ((8, 4), 16, 1)], 1
    ):
        assert inputs[f"decoder{stage}"].shape == (1, *size, width)
        torch.testing.assert_close(
            inputs[f"decoder{stage}"],
            inputs[f"decoder{stage - 1} out"] + inputs[f"encoder{encoder}"],
        )


def test_a_grey_image_needs_no_repeating():
    """Three equal channels through a three-channel embedding are one channel through the sum of its
    weights."""
    options = dict(spec("vm_unet").reduced)
    colour = build_model("vm_unet", in_channels=3, num_classes=1, options=options).eval()
    grey = build_model("vm_unet", in_channels=1, num_classes=1, options=options).eval()
    weights = colour.state_dict()
    weights["embed.conv.weight"] = weights["embed.conv.weight"].sum(1, keepdim=True)
    grey.load_state_dict(weights)
    x = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-5)


def test_published_cost_and_the_deeper_variants_size():
    with torch.device("meta"):
        model = build_model("vm_unet", in_channels=3, num_classes=1)
        deeper = build_model(
            "vm_unet",
            in_channels=3,
            num_classes=1,
            options={"depths": [2, 2, 9, 2], "decoder_depths": [2, 9, 2, 2]},
        )
    assert round(count_macs(model, (1, 3, 256, 256)) / 1e9, 2) == 5.29
    assert count_parameters(deeper) == 44_273_833


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 6}, "width: found 6, expected a multiple of 4"),
        ({"depths": [2, 2, 2]}, "depths: found .2, 2, 2., expected four"),
        ({"drop_path": 1.0}, "drop_path: found 1.0"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ModelError, match=said):
        build_model("vm_unet", in_channels=3, num_classes=1, options=options)
