"""Augmentation against independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from segfleet.pipeline.data import augment
from segfleet.pipeline.recipe import Augment

OFF = (
    "rotation",
    "scale",
    "elastic",
    "gamma",
    "contrast",
    "brightness",
    "noise",
    "blur",
    "low_resolution",
)
NOTHING = {"flip": (), **dict.fromkeys(OFF, 0)}


def rng(seed=0):
    return np.random.default_rng(seed)


def image_of(shape=(1, 12, 14, 16)):
    return torch.from_numpy(
        ndimage.gaussian_filter(rng().normal(size=shape), (0, 1, 1, 1)).astype(np.float32)
    )


def test_nothing_drawn_is_a_plain_copy():
    spatial = augment.draw_spatial(Augment(**NOTHING), rng(), (8, 8, 8), (1.0, 1.0, 1.0))
    box, positions = augment.source_grid(spatial, (1, 2, 3), (8, 8, 8))
    assert positions is None and box == (slice(1, 9), slice(2, 10), slice(3, 11))
    image = image_of()
    assert torch.equal(
        augment.apply_intensity(image, augment.draw_intensity(Augment(**NOTHING), rng(), 1), False),
        image,
    )


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_rotation_and_scale_equal_scipy(spacing):
    """One pass of ours is scipy's affine_transform about the patch centre."""
    options = Augment(**{**NOTHING, "rotation": 1, "scale": 1, "angle": 40})
    patch, start = (8, 10, 12), (14, 15, 16)
    volume = ndimage.gaussian_filter(rng(1).normal(size=(40, 40, 40)), 1).astype(np.float32)
    spatial = augment.draw_spatial(options, rng(3), patch, spacing)
    box, positions = augment.source_grid(spatial, start, patch)
    part = torch.from_numpy(volume[box].copy())[None]
    ours, _ = augment.resample(part, torch.zeros(part.shape[1:], dtype=torch.uint8), positions)
    half = (np.array(patch) - 1) / 2
    offset = np.array(start) + half - spatial.matrix @ half
    theirs = ndimage.affine_transform(
        volume, spatial.matrix, offset, output_shape=patch, order=1, mode="nearest"
    )
    np.testing.assert_allclose(ours[0].numpy(), theirs, atol=2e-5)
    if spacing[0] > augment.ANISOTROPY:
        assert spatial.matrix[0].tolist() == [1, 0, 0]


def test_rotation_is_rigid_in_millimetres():
    spacing = np.array([2.0, 1.0, 0.5])
    spatial = augment.draw_spatial(
        Augment(**{**NOTHING, "rotation": 1}), rng(5), (8, 8, 8), tuple(spacing)
    )
    in_mm = np.diag(spacing) @ spatial.matrix @ np.linalg.inv(np.diag(spacing))
    np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-12)


def test_a_flat_patch_stays_in_its_slice():
    options = Augment(**{**NOTHING, "rotation": 1, "scale": 1, "elastic": 1})
    box, positions = augment.source_grid(
        augment.draw_spatial(options, rng(2), (1, 16, 16), (1.0, 1.0, 1.0)), (5, 0, 0), (1, 16, 16)
    )
    assert box[0] == slice(5, 6) and positions[..., 0].abs().max() == 0


def test_labels_are_resampled_without_new_values():
    options = Augment(**{**NOTHING, "rotation": 1, "scale": 1, "elastic": 1})
    label = torch.zeros(40, 40, 40, dtype=torch.uint8)
    label[10:30, 10:30, 10:20], label[10:30, 10:30, 20:30] = 1, 3
    box, positions = augment.source_grid(
        augment.draw_spatial(options, rng(4), (16, 16, 16), (1.0, 1.0, 1.0)),
        (12, 12, 12),
        (16, 16, 16),
    )
    part = torch.from_numpy(
        np.pad(label.numpy(), 40)[tuple(slice(b.start + 40, b.stop + 40) for b in box)].copy()
    )
    _, moved = augment.resample(part[None].float(), part, positions)
    assert set(moved.unique().tolist()) <= {0, 1, 3} and moved.dtype == torch.uint8
    assert not ((moved == 0).any() and (moved == 1).all())


def test_flips_and_turns():
    image, label = image_of((2, 4, 6, 6)), torch.arange(4 * 36).view(4, 6, 6)
    flipped, mirrored = augment.mirror(augment.Spatial(flips=(0, 2)), image, label)
    assert torch.equal(flipped, image.flip([1, 3])) and torch.equal(mirrored, label.flip([0, 2]))
    turned, _ = augment.mirror(augment.Spatial(turns=1), image, label)
    assert torch.equal(turned, image.rot90(1, (2, 3)))
    seen = {
        augment.draw_spatial(
            Augment(**{**NOTHING, "rot90": True}), rng(k), (1, 8, 6), (1.0,) * 3
        ).turns
        for k in range(40)
    }
    assert seen == {0, 2}  # a patch that is not square is only turned upside down


def test_flip_axes_are_limited_to_those_asked_for():
    drawn = [
        augment.draw_spatial(
            Augment(**{**NOTHING, "flip": (1,)}), rng(k), (8, 8, 8), (1.0,) * 3
        ).flips
        for k in range(50)
    ]
    assert set(drawn) == {(), (1,)}
    assert 10 < sum(d == (1,) for d in drawn) < 40


@pytest.mark.parametrize("in_plane", [False, True])
def test_blur_equals_scipy(in_plane):
    image = image_of()
    ours = augment.apply_intensity(image, {"blur": [0.8]}, in_plane)[0].numpy()
    sigma = (0 if in_plane else 0.8, 0.8, 0.8)
    theirs = ndimage.gaussian_filter(
        image[0].numpy(),
        sigma,
        mode="nearest",
        radius=[0 if s == 0 else int(3 * 0.8 + 0.5) for s in sigma],
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gamma_contrast_brightness_formulas():
    image = image_of()
    x = image.numpy()
    low, high, mean = x.min(), x.max(), x.mean(dtype=np.float64)
    np.testing.assert_allclose(
        augment.apply_intensity(image, {"brightness": 1.2}, False).numpy(), x * 1.2, rtol=1e-6
    )
    contrast = np.clip((x - mean) * 1.2 + mean, low, high)
    np.testing.assert_allclose(
        augment.apply_intensity(image, {"contrast": 1.2}, False).numpy(), contrast, atol=1e-5
    )
    gamma = ((x - low) / (high - low)) ** 1.4 * (high - low) + low
    ours = augment.apply_intensity(image, {"gamma": (1.4, False)}, False).numpy()
    np.testing.assert_allclose(ours, gamma - gamma.mean() + mean, atol=1e-5)


def test_noise_has_the_drawn_variance_and_is_repeatable():
    image = torch.zeros(1, 20, 30, 30)
    noisy = augment.apply_intensity(image, {"noise": (0.04, 11)}, False)
    assert abs(noisy.std().item() - 0.2) < 0.01
    assert torch.equal(noisy, augment.apply_intensity(image, {"noise": (0.04, 11)}, False))


def test_low_resolution_loses_detail_but_not_the_slice_axis():
    image = image_of((1, 6, 32, 32))
    coarse = augment.apply_intensity(image, {"low_resolution": 0.5}, True)
    assert coarse.shape == image.shape and coarse.std() < image.std()
    same = augment.apply_intensity(
        image.mean((2, 3), keepdim=True).expand(image.shape), {"low_resolution": 0.5}, True
    )
    torch.testing.assert_close(same, image.mean((2, 3), keepdim=True).expand(image.shape))
