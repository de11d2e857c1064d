"""nnU-Net's two U-Nets against the package that nnU-Net uses, and the planned topology against
known plans."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segfleet.models.nnunet.planned_unet import POOL
from segfleet.models.nnunet.topology import topology_from_options, topology_from_plan
from segfleet.models.registry import ModelError, build_model, count_parameters

SMALL = {  # an anisotropic 3D plan and a 2D plan, narrow
    2: {"patch": [32, 48], "features": [4, 8, 12]},
    3: {"patch": [8, 32, 32], "spacing": [4.0, 1.0, 1.0], "features": [4, 8, 12]},
}


def reference(kind: str, model: nn.Module, **counts) -> nn.Module:
    """The network of dynamic-network-architectures with the topology of `model`."""
    package = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    plan, dims = model.topology, model.topology.dims
    build = package.PlainConvUNet if kind == "plain" else package.ResidualEncoderUNet
    return build(
        input_channels=model.in_channels,
        n_stages=len(plan.features),
        features_per_stage=plan.features,
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[dims],
        kernel_sizes=plan.kernels,
        strides=plan.strides,
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **counts,
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "resenc"])
def test_default_preset_has_the_parameters_of_the_package(kind, dims):
    with torch.device("meta"):
        model = build_model(f"{kind}_unet_{dims}d", in_channels=1, num_classes=2)
        stages = len(model.topology.features)
        encoder = (
            {"n_conv_per_stage": 2}
            if kind == "plain"
            else {"n_blocks_per_stage": (1, 3, 4, 6, 6, 6, 6, 6)[:stages]}
        )
        decoder = {"n_conv_per_stage_decoder": 2 if kind == "plain" else 1}
        assert count_parameters(model) == count_parameters(
            reference(kind, model, num_classes=2, **encoder, **decoder)
        )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "resenc"])
def test_computes_what_the_package_computes(kind, dims):
    """With the package's weights, every output of the deep supervision is the same."""
    torch.manual_seed(0)
    model = build_model(
        f"{kind}_unet_{dims}d",
        in_channels=2,
        num_classes=3,
        options=SMALL[dims] | {"conv_per_decoder": [2, 1]},
    )
    encoder = {"n_conv_per_stage": 2} if kind == "plain" else {"n_blocks_per_stage": (1, 3, 4)}
    other = reference(kind, model, num_classes=3, n_conv_per_stage_decoder=(2, 1), **encoder)
    parts = [other.encoder.stages]
    ours: list[nn.Module] = [model.encoder]
    if kind == "resenc":
        parts, ours = [other.encoder.stem, *parts], [model.stem, *ours]
    for mine, up, convs in zip(
        model.decoder, other.decoder.transpconvs, other.decoder.stages, strict=True
    ):
        parts += [up, convs]
        ours += [mine.up, mine.convs]
    parts.append(other.decoder.seg_layers)
    ours.append(model.heads)
    with torch.no_grad():
        for mine, theirs in zip(ours, parts, strict=True):
            for target, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                target.copy_(source.normal_(0, 0.2))
        x = torch.randn(2, 2, *SMALL[dims]["patch"])
        outputs, expected = model.train()(x), other(x)
    assert len(outputs) == len(expected) == 2
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("patch", "spacing", "strides", "first_kernels"),
    [
        # ACDC, published plan
        (
            (20, 256, 224),
            (5.0, 1.5625, 1.5625),
            "122 222 222 122 122",
            "133 333",
        ),
        ((128, 128, 128), (1.0, 1.0, 1.0), "222 222 222 222 222", "333 333"),  # BrainTumour
        ((64, 192, 192), (1.5, 0.8, 0.8), "222 222 222 222 122", "333 333"),  # HepaticVessel
        ((40, 56, 40), (1.0, 1.0, 1.0), "222 222 222", "333 333"),  # Hippocampus
        ((512, 512), (1.0, 1.0), "22 22 22 22 22 22 22", "33 33"),
    ],
)
def test_topology_of_known_plans(patch, spacing, strides, first_kernels):
    found = topology_from_plan(patch, spacing)
    assert " ".join("".join(map(str, s)) for s in found.strides[1:]) == strides
    assert found.strides[0] == (1,) * len(patch)
    assert " ".join("".join(map(str, k)) for k in found.kernels[:2]) == first_kernels
    assert found.kernels[-1] == (3,) * len(patch)
    assert (
        found.features[:4] == (32, 64, 128, 256)
        and max(found.features) <= {2: 512, 3: 320}[len(patch)]
    )
    assert found.padded(patch) == patch


def test_a_flat_axis_waits_for_the_others():
    """z six times coarser: halved only when the plane has come within a factor of two."""
    found = topology_from_plan((16, 128, 128), (6.0, 1.0, 1.0))
    assert found.strides[1:] == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert [kernel[0] for kernel in found.kernels] == [1, 1, 3, 3, 3, 3]
    assert found.padded((18, 100, 128)) == (20, 128, 128)


def test_without_deep_supervision_there_is_one_head_and_one_output():
    options = {"features": [8, 16, 32], "deep_supervision": False}
    model = build_model("resenc_unet_3d", in_channels=1, num_classes=2, options=options)
    assert len(model.heads) == 1
    assert model.train()(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_given_strides_and_kernels_are_taken_as_they_are():
    options = {"strides": [1, [1, 2, 2], 2], "kernels": [[1, 3, 3], 3, 3], "features": [4, 8, 8]}
    model = build_model("plain_unet_3d", in_channels=1, num_classes=2, options=options)
    assert model.divisor == (2, 4, 4)
    assert model.encoder[0][0][0].kernel_size == (1, 3, 3)
    assert [tuple(o.shape[2:]) for o in model(torch.randn(1, 1, 6, 8, 8))] == [(6, 8, 8), (6, 4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": [64, 64]}, "needs 3 numbers"),
        (
            {"patch": [20, 100, 224], "spacing": [5, 1.5, 1.5]},
            r"next larger patch is \(20, 112, 224\)",
        ),
        ({"patch": [16, 16, 16], "features": [8, 16, 32, 64]}, "found 4 stages.*allows 3"),
        ({"patch": [4, 4, 4]}, "too small"),
        ({"features": [8]}, "at least 2 stages"),
        ({"strides": [1, 2], "features": [4, 8, 16]}, "one entry per stage"),
        ({"strides": [1, [2, 2]]}, "needs 3 numbers per stage"),
        ({"features": [4, 8], "kernels": [2, 3]}, "odd"),
        ({"features": [4, 8], "blocks_per_stage": [1, 2, 3]}, "blocks_per_stage: expected 2"),
        ({"features": [4, 8], "conv_per_decoder": 0}, "conv_per_decoder"),
        ({"spacing": [1, 1]}, "must both have"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        build_model("resenc_unet_3d", in_channels=1, num_classes=2, options=options)


def test_a_deepest_map_of_one_voxel_is_refused():
    model = topology_from_options(dims=2, features=[4, 8])
    assert model.divisor == (2, 2)
    network = build_model(
        "plain_unet_2d", in_channels=1, num_classes=2, options={"features": [4, 8]}
    )
    with pytest.raises(ModelError, match="one voxel"):
        network(torch.randn(1, 1, 2, 2))


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 3, 2)])
def test_pooling_by_blocks_is_average_pooling_and_so_is_its_gradient(stride):
    pool = POOL[3](stride, stride)
    x = torch.randn(2, 3, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    weight, found = torch.randn_like(pool(x)), []
    for forward in (pool.by_blocks, pool):
        out = forward(x)
        found.append((out, *torch.autograd.grad((out * weight).sum(), x)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
