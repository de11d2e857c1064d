"""U-NetLite: closed forms, options and any input size (the tables themselves are checked for all
networks in test_conformance)."""

from __future__ import annotations

import pytest
import torch

from segfleet.models.registry import ModelError, build_model, count_parameters
from segfleet.models.unet_lite import SpatialAttention, light_block, standard_block

VARIANTS = (
    "standard",
    "depthwise",
    "se",
    "se_depthwise",
    "se_depthwise_r32",
    "spatial",
    "ultralight",
)


def small(variant: str, **options):
    return build_model(
        f"unet_lite_{variant}", in_channels=3, num_classes=1, options={"width": 32} | options
    )


@pytest.mark.parametrize(("a", "b"), [(3, 8), (16, 32)])
def test_blocks_have_the_closed_forms_of_the_specification(a, b):
    assert count_parameters(standard_block(a, b, b)) == 9 * a * b + 9 * b**2 + 4 * b
    assert count_parameters(light_block(a, b, b)) == 9 * a + a * b + 9 * b + b**2 + 4 * b
    assert count_parameters(SpatialAttention()) == 98


def test_grouped_block_has_the_closed_form_of_the_specification():
    a, b, g = 16, 32, 4
    assert (
        count_parameters(light_block(a, b, b, g)) == 9 * a + a * b // g + 9 * b + b**2 // g + 4 * b
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bilinear", [False, True])
def test_any_size_from_16(variant, bilinear):
    model = small(variant, bilinear=bilinear).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 37, 50)).shape == (1, 1, 37, 50)
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 1, 16, 16)
        with pytest.raises(ModelError, match="at least 16"):
            model(torch.randn(1, 3, 15, 32))


def test_bilinear_has_half_the_deepest_width_and_no_transposed_convolution():
    def block(a: int, mid: int, b: int) -> int:
        return 9 * a * mid + 9 * mid * b + 2 * (mid + b)

    encoder = (
        block(3, 64, 64)
        + block(64, 128, 128)
        + block(128, 256, 256)
        + block(256, 512, 512)
        + block(512, 512, 512)
    )
    decoder = (
        block(1024, 512, 256) + block(512, 256, 128) + block(256, 128, 64) + block(128, 64, 64)
    )
    with torch.device("meta"):
        model = build_model(
            "unet_lite_standard", in_channels=3, num_classes=1, options={"bilinear": True}
        )
    assert count_parameters(model) == encoder + decoder + 65


def test_upsampled_map_lies_in_the_middle_of_the_skip():
    """A skip one pixel larger is padded at the bottom and right, three larger one at the left and
    two at the right."""
    up = small("standard").up4
    with torch.no_grad():
        up.up.weight.zero_()
        up.up.bias.fill_(1.0)
    seen = {}
    up.block.register_forward_pre_hook(lambda _, args: seen.update(joined=args[0]))
    up(torch.zeros(1, 64, 4, 4), torch.zeros(1, 32, 9, 11))
    mask = seen["joined"][0, -1]
    assert mask[:8, 1:9].eq(1).all() and mask.sum() == 64


@pytest.mark.parametrize(
    ("variant", "width", "message"),
    [("se", 24, "multiple"), ("ultralight", 18, "groups"), ("standard", 3, "even")],
)
def test_a_width_that_cannot_be_is_refused(variant, width, message):
    with pytest.raises(ModelError, match=message):
        build_model(f"unet_lite_{variant}", in_channels=3, num_classes=1, options={"width": width})
