"""Transforms: against scipy, against themselves run backwards, and against the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from segfleet.core.errors import InputError
from segfleet.preprocess.case import Case, Geometry
from segfleet.preprocess.stores.manifest import Plan
from segfleet.preprocess.transforms import resample
from segfleet.preprocess.transforms.case_transforms import (
    crop_box,
    nonzero_box,
    nonzero_mask,
    normalise,
    paste,
    preprocess_case,
    resample_axis,
    resample_image,
    resample_label,
    resample_probabilities,
    stored_grid,
)
from segfleet.preprocess.transforms.resample import nearest

RANDOM = np.random.default_rng(3)


def plan(**changes) -> Plan:
    return Plan(
        **{
            "target_spacing": (1.0, 1.0, 1.0),
            "patch": (8, 8, 8),
            "normalisation": ("zscore",),
            "dtype": "float32",
            **changes,
        }
    )


def case(image, label=None, spacing=(1.0, 1.0, 1.0)) -> Case:
    return Case(
        id="c",
        image_CZYX=image,
        label_ZYX=label,
        geometry=Geometry(shape=image.shape[1:], spacing=spacing),
    )


@pytest.mark.parametrize(
    ("old", "new"), [((9, 20, 31), (14, 11, 40)), ((1, 30, 7), (3, 9, 21)), ((2, 3, 4), (5, 6, 7))]
)
@pytest.mark.parametrize(("order", "resample"), [(3, resample_image), (1, resample_probabilities)])
def test_resampling_is_that_of_scipy(old, new, order, resample):
    image = RANDOM.standard_normal((2, *old)).astype(np.float32)
    zoom = [n / o for n, o in zip(new, old, strict=True)]
    expected = [
        ndimage.zoom(channel.astype(float), zoom, order=order, mode="nearest", grid_mode=True)
        for channel in image
    ]
    if order == 3:  # a spline swings beyond its samples
        expected = [np.clip(e, i.min(), i.max()) for e, i in zip(expected, image, strict=True)]
    assert np.allclose(resample(image, new), expected, atol=1e-4)


@pytest.mark.parametrize("smooth", [0, 1.5])
@pytest.mark.parametrize(
    ("shape", "new"),
    [((20, 24, 28), (31, 17, 28)), ((9, 10, 11), (18, 20, 22)), ((30, 31, 32), (10, 11, 12))],
)
def test_cubic_is_scikit_image_s_resize(shape, new, smooth):
    """Growing, shrinking and both; noise overshoots most, and is clipped alike."""
    transform = pytest.importorskip("skimage.transform")
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), smooth)
    image = image.astype(np.float32)
    expected = transform.resize(
        image, new, order=3, mode="edge", clip=True, anti_aliasing=False, preserve_range=True
    )
    found = resample_image(image[None], new)[0]
    assert np.abs(found - expected).max() < 5e-6 * np.ptp(image)


def test_cubic_resampling_stays_within_the_range():
    """Saturated voxels, as in CT, stay saturated, though scipy's spline swings beyond them."""
    image = np.clip(3 * RANDOM.standard_normal((1, 9, 20, 31)), -1, 1).astype(np.float32)
    zoom = (14 / 9, 33 / 20, 40 / 31)
    swing = ndimage.zoom(image[0].astype(float), zoom, order=3, mode="nearest", grid_mode=True)
    found = resample_image(image, (14, 33, 40))[0]
    assert np.abs(swing).max() > 1.1 and np.abs(found).max() <= 1
    assert np.allclose(found, np.clip(swing, -1, 1), atol=1e-4)


def test_the_anisotropic_axis_takes_whole_slices():
    image = RANDOM.standard_normal((1, 4, 10, 10)).astype(np.float32)
    out = resample_image(image, (8, 10, 10), anisotropic_axis=0)
    assert np.array_equal(out, image.repeat(2, 1))
    plane = resample_image(image, (6, 15, 15), anisotropic_axis=0)
    assert np.allclose(plane[:, [0, 5]], resample_image(image, (4, 15, 15))[:, [0, 3]], atol=1e-5)
    assert nearest(4, 6).tolist() == [0, 1, 1, 2, 3, 3] and nearest(3, 1).tolist() == [1]


def test_nothing_to_do_returns_the_same_array():
    image, label = np.zeros((1, 3, 4, 5), np.int16), np.zeros((3, 4, 5), np.uint8)
    assert resample_image(image, (3, 4, 5)) is image and resample_label(label, (3, 4, 5)) is label


def test_resampled_probabilities_stay_probabilities():
    logits = RANDOM.standard_normal((4, 5, 12, 9))
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    out = resample_probabilities(probabilities, (11, 7, 20))
    assert out.min() >= 0 and np.allclose(out.sum(0), 1, atol=1e-5)


def test_a_smooth_image_survives_there_and_back():
    z, y, x = np.meshgrid(*(np.linspace(0, 3, n) for n in (20, 30, 25)), indexing="ij")
    image = (np.sin(z) + np.cos(2 * y) * x)[None].astype(np.float32)
    back = resample_image(resample_image(image, (27, 41, 33)), (20, 30, 25))
    assert np.abs(back - image)[:, 2:-2, 2:-2, 2:-2].max() < 5e-3


def test_labels_are_resampled_without_new_values_or_holes():
    grid = np.indices((12, 24, 24)) - np.array([6, 12, 12])[:, None, None, None]
    radius = np.sqrt((grid * np.array([2, 1, 1])[:, None, None, None]) ** 2).sum(0)
    label = np.select([radius < 5, radius < 9], [7, 2], 0).astype(np.uint8)
    out = resample_label(label, (24, 48, 48))
    assert out.dtype == np.uint8 and set(np.unique(out)) == {0, 2, 7}
    assert abs((out > 0).sum() / 8 - (label > 0).sum()) < 0.04 * (label > 0).sum()
    back = resample_label(out, label.shape)
    assert (back != label).mean() < 0.01
    reference = [
        ndimage.zoom((label == v).astype(float), 2, order=1, mode="nearest", grid_mode=True)
        for v in (0, 2, 7)
    ]
    assert np.array_equal(out, np.array([0, 2, 7])[np.argmax(np.round(reference, 5), axis=0)])
    assert np.array_equal(
        resample_label(np.full((2, 2, 2), 5, np.uint8), (3, 3, 3)), np.full((3, 3, 3), 5)
    )


def test_the_box_of_what_is_not_zero_and_the_way_back():
    image = np.zeros((2, 6, 7, 8), np.float32)
    image[0, 2, 3, 4], image[1, 3, 1, 6] = 1, -1
    assert nonzero_box(image) == ((2, 4), (1, 4), (4, 7))
    assert nonzero_box(np.zeros((1, 2, 3, 4))) == ((0, 2), (0, 3), (0, 4))
    label = RANDOM.integers(0, 3, (2, 3, 3)).astype(np.uint8)
    whole = paste(label, nonzero_box(image), (6, 7, 8))
    assert (
        whole.shape == (6, 7, 8)
        and np.array_equal(whole[2:4, 1:4, 4:7], label)
        and whole.sum() == label.sum()
    )
    assert crop_box(image, ("rgb_to_0_1",) * 2) == ((0, 6), (0, 7), (0, 8)), "black is a colour"


@pytest.mark.parametrize("shape", [(9, 10, 11), (1, 12, 12)])
def test_the_mask_fills_holes_and_only_holes(shape):
    image = (RANDOM.random((1, *shape)) < 0.7).astype(np.float32)
    image[:, :, 3:6, 3:6] = 0
    image[:, :, 4, 4] = 1
    filled = ndimage.binary_fill_holes(image[0] if shape[0] > 1 else image[0, 0]).reshape(shape)
    assert np.array_equal(nonzero_mask(image), filled)
    assert (
        nonzero_mask(np.ones((1, *shape))).all() and not nonzero_mask(np.zeros((1, *shape))).any()
    )


def test_zscore_with_and_without_a_mask():
    image = np.zeros((1, 4, 10, 10), np.int16)
    image[:, :, 2:8, 2:8] = RANDOM.integers(50, 100, (1, 4, 6, 6))
    out = normalise(image, plan())
    assert (
        out.dtype == np.float32
        and abs(out.mean()) < 1e-5
        and out.std() == pytest.approx(1, abs=1e-4)
    )
    inside = normalise(image, plan(nonzero_mask=True))
    assert inside[image != 0].mean() == pytest.approx(0, abs=1e-5) and inside[
        image != 0
    ].std() == pytest.approx(1, abs=1e-4)
    assert not inside[image == 0].any()
    flat = normalise(np.full((1, 2, 2, 2), 7, np.uint8), plan())
    assert not flat.any()


def test_the_other_normalisations():
    image = np.array([-2000, -17, 99, 201, 4000], np.int16).reshape(1, 1, 1, 5)
    facts = {"mean": 99.0, "std": 50.0, "percentile_00_5": -17.0, "percentile_99_5": 201.0}
    assert normalise(image, plan(normalisation=("ct",), intensity=(facts,)))[
        0, 0, 0
    ] == pytest.approx([-2.32, -2.32, 0, 2.04, 2.04])
    stretched = normalise(image, plan(normalisation=("rescale_to_0_1",)))
    assert stretched[0, 0, 0] == pytest.approx([0, 1983 / 6000, 2099 / 6000, 2201 / 6000, 1])
    assert np.array_equal(normalise(image, plan(normalisation=("none",))), image)
    bytes_ = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    assert normalise(bytes_, plan(normalisation=("rgb_to_0_1",)))[0, 0, 0] == pytest.approx(
        [0, 0.2, 1]
    )
    words = np.array([0, 13107, 65535], np.uint16).reshape(1, 1, 1, 3)
    assert normalise(words, plan(normalisation=("rgb_to_0_1",)))[0, 0, 0] == pytest.approx(
        [0, 0.2, 1]
    )
    with pytest.raises(InputError, match="found 'zsocre', expected zscore"):
        normalise(bytes_, plan(normalisation=("zsocre",)))


def test_the_stored_grid_and_the_axis_apart():
    assert stored_grid((10, 20, 30), (3.0, 1.0, 0.5), plan()) == ((30, 20, 15), (1.0, 1.0, 1.0))
    assert stored_grid((1, 20, 30), (5.0, 1.0, 2.0), plan()) == ((1, 20, 60), (5.0, 1.0, 1.0)), (
        "one slice stays one"
    )
    assert stored_grid((10, 1, 1), (1.0004, 9, 9), plan())[0] == (10, 1, 1)
    assert (
        resample_axis((5.0, 1.0, 1.0), plan()) == 0
        and resample_axis((2.0, 1.0, 1.0), plan()) is None
    )
    assert (
        resample_axis((2.0, 1.0, 1.0), plan(anisotropic_axis=0)) == 0
        and resample_axis((1.0, 1.0, 9.0), plan(anisotropic_axis=0)) == 2
    )


def test_a_case_is_cropped_normalised_and_resampled():
    image = np.zeros((1, 10, 12, 12), np.float32)
    image[:, 2:8, 1:11, 1:11] = RANDOM.random((1, 6, 10, 10)) + 1
    label = np.zeros((10, 12, 12), np.uint8)
    label[3:6, 4:8, 4:8], label[6, 4:6, 4:6], label[0, 0, 0] = 1, 3, 2
    out, stored, facts = preprocess_case(
        case(image, label, (2.0, 1.0, 1.0)), plan(dtype="float16"), ignore_label=3
    )
    assert (
        out.dtype == np.float16
        and out.shape == (1, 12, 10, 10)
        and stored.shape == (12, 10, 10)
        and stored.dtype == np.uint8
    )
    assert (
        facts["crop"] == ((2, 8), (1, 11), (1, 11))
        and facts["raw_shape"] == (10, 12, 12)
        and facts["has_truth"]
    )
    assert facts["spacing"] == (1.0, 1.0, 1.0) and facts["raw_spacing"] == (2.0, 1.0, 1.0)
    assert (
        facts["voxels"] == {v: int((stored == v).sum()) for v in (0, 1, 3)}
        and sum(facts["voxels"].values()) == stored.size
    )
    assert (
        set(facts["foreground"]) == {1}
        and (stored.ravel()[list(facts["foreground"][1])] == 1).all()
    )
    again = preprocess_case(
        case(image, label, (2.0, 1.0, 1.0)), plan(dtype="float16"), ignore_label=3
    )
    assert again[2] == facts and np.array_equal(again[0], out)
    alone, nothing, prediction = preprocess_case(
        case(image, None, (2.0, 1.0, 1.0)), plan(dtype="float16")
    )
    assert (
        np.array_equal(alone, out)
        and nothing is None
        and prediction["crop"] == facts["crop"]
        and "voxels" not in prediction
    )


@pytest.mark.parametrize(
    ("spacing", "shape"), [((1.0, 1.0, 1.0), (6, 8, 8)), ((2.0, 1.5, 1.5), (12, 12, 12))]
)
def test_the_truth_is_stored_for_every_other_grid(spacing, shape):
    """Also where a crop keeps the spacing, and where what it leaves is resampled to the old
    shape."""
    image, label = np.zeros((1, 12, 12, 12), np.float32), np.zeros((12, 12, 12), np.uint8)
    image[:, 3:9, 2:10, 2:10] = 1 + RANDOM.random((1, 6, 8, 8))
    label[4:8, 4:8, 4:8] = 1
    _, stored, facts = preprocess_case(case(image, label, spacing), plan())
    assert stored.shape == facts["shape"] == shape and facts["has_truth"]
    whole = preprocess_case(case(image + 1, label), plan())
    assert not whole[2]["has_truth"] and np.array_equal(whole[1], label)


def test_foreground_samples_are_limited_and_distinct():
    label = np.zeros((1, 40, 40), np.uint8)
    label[0, :20], label[0, 39, :3] = 1, 2
    _, _, facts = preprocess_case(case(np.ones((1, 1, 40, 40)), label), plan())
    assert not facts["has_truth"]
    assert len(set(facts["foreground"][1])) == 256 and list(facts["foreground"][1]) == sorted(
        facts["foreground"][1]
    )
    assert facts["foreground"][2] == (39 * 40, 39 * 40 + 1, 39 * 40 + 2)


def test_colours_are_stored_as_bytes():
    colours = plan(normalisation=("rgb_to_0_1",) * 3, dtype="uint8", scale=1 / 255)
    image = RANDOM.integers(0, 256, (3, 1, 6, 5), dtype=np.uint8)
    image[:, :, 0] = 0
    out, _, facts = preprocess_case(case(image), colours)
    assert np.array_equal(out, image) and facts["crop"] == ((0, 1), (0, 6), (0, 5))
    words, _, _ = preprocess_case(case(image.astype(np.uint16) * 257), colours)
    assert np.array_equal(words, image)
    finer, _, _ = preprocess_case(case(image, spacing=(1.0, 2.0, 2.0)), colours)
    assert finer.dtype == np.uint8 and finer.shape == (3, 1, 12, 10)


def test_values_beyond_the_stored_type_are_set_to_its_border():
    image = np.array([0, 1e9, -1e9, 5], np.float32).reshape(1, 1, 2, 2)
    out, _, _ = preprocess_case(case(image), plan(normalisation=("none",), dtype="float16"))
    assert np.isfinite(out).all() and out.max() == np.finfo(np.float16).max


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(InputError, match="case 'c': channels: found 2, expected 1"):
        preprocess_case(case(np.ones((2, 3, 3, 3))), plan())


@pytest.mark.parametrize("shape", [(1, 12, 20), (1, 31, 17), (1, 9, 11)])
def test_bilinear_is_what_pytorch_calls_bilinear(shape):
    image = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    found = resample_image(image, (1, 16, 16), interpolation="bilinear")[:, 0]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image)[:, 0][None], (16, 16), mode="bilinear", align_corners=False
    )[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(12, 4), (17, 5), (1000, 256), (7, 6)])
def test_area_is_the_mean_over_what_a_new_pixel_covers(old, new):
    """By another way: every pixel repeated `new` times, then means of blocks of `old`."""
    line = np.random.default_rng(1).random(old)
    image = np.repeat(line[:, None], 4, 1)[None, None].astype(np.float32)  # (1, 1, old, 4)
    found = resample_image(image, (1, new, 4), interpolation="area")
    expected = np.repeat(line, new).reshape(new, old).mean(1)
    np.testing.assert_allclose(found[0, 0, :, 0], expected, rtol=1e-5)
    grown = resample_image(image, (1, 2 * old, 4), interpolation="area")
    np.testing.assert_array_equal(
        grown, resample_image(image, (1, 2 * old, 4), interpolation="bilinear")
    )


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_masks_are_nearest_as_pytorch_names_them(mode):
    label = np.random.default_rng(2).integers(0, 4, (1, 31, 45)).astype(np.uint8)
    found = resample_label(label, (1, 16, 20), masks=mode)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(label)[None].float(), (16, 20), mode=mode
    )[0]
    np.testing.assert_array_equal(found, expected.numpy().astype(np.uint8))
    centre = np.asarray(Image.fromarray(label[0]).resize((20, 16), Image.Resampling.NEAREST))
    assert np.array_equal(found[0], centre) == (mode == "nearest-exact")


def test_normalisations_of_pictures():
    picture = np.random.default_rng(3).integers(20, 200, (3, 1, 5, 6)).astype(np.uint8)
    facts = {"target_spacing": (1, 1, 1), "patch": (1, 5, 6)}

    def by(kind):
        return normalise(picture, Plan(**facts, normalisation=(kind,) * 3))

    red = (picture[0] / 255 - 0.485) / 0.229  # torchvision's published numbers
    blue = (picture[2] / 255 - 0.406) / 0.225
    np.testing.assert_allclose(by("imagenet")[[0, 2]], np.stack([red, blue]), atol=1e-6)
    span = picture.max() - picture.min().astype(float)
    share = (picture.astype(float) - picture.min()) / span
    np.testing.assert_allclose(by("minmax"), share, atol=1e-6)
    np.testing.assert_allclose(by("minmax255"), 255 * share, atol=1e-4)


def by_maps(label, new_shape, axis):
    """The 0/1 map of every label resampled as a whole, one after the other; the largest wins."""
    values = np.unique(label)
    maps = [resample_probabilities((label == v)[None], new_shape, axis)[0] for v in values]
    out, best = np.full(new_shape, values[0], label.dtype), maps[0].astype(np.float32)
    for value, shown in zip(values[1:], maps[1:], strict=True):
        out[shown > best + np.float32(1e-6)] = value
        best = np.maximum(best, shown)
    return out


@pytest.mark.parametrize("seed", range(8))
def test_labels_by_cells_are_labels_by_maps_to_the_bit(seed, monkeypatch):
    draw = np.random.default_rng(seed)
    for _ in range(40):
        shape, new = (tuple(int(n) for n in draw.integers(1, 16, 3)) for _ in range(2))
        most = int(draw.choice([2, 3, 9, 104]))
        label = draw.integers(0, most, shape).astype(draw.choice(["u1", "i2", "i4"]))
        if draw.random() < 0.5:  # areas, as labels have
            label = ndimage.zoom(label, [int(draw.integers(1, 4)) for _ in range(3)], order=0)
        axis = draw.choice([None, 0, 1, 2])
        monkeypatch.setattr(resample, "SLAB", int(draw.choice([1, 300, 2**24])))
        monkeypatch.setattr(resample, "VOTES", int(draw.choice([7, 2**16])))
        found = resample_label(label, new, axis)
        assert found.dtype == label.dtype and found.flags.c_contiguous
        assert np.array_equal(found, label if label.shape == new else by_maps(label, new, axis))
