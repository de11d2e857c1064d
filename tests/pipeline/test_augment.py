"""Augmentation against independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from segfleet.pipeline.data import augment, geometry, intensity, kernels
from segfleet.pipeline.sections import Augment

OFF = (
    "rotation",
    "scale",
    "elastic",
    "gamma",
    "gamma_inverted",
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


def changed(image, drawn, in_plane=False, masked=()):
    return intensity.apply_intensity(image.clone(), drawn, in_plane, masked)


def resample(image, label, grid):
    out, out_label = np.empty((len(image), *grid.patch), np.float32), np.empty(grid.patch, np.uint8)
    geometry.resample(image, label, grid, out, out_label)
    return out, out_label


@pytest.fixture(params=["compiled", "without a compiler"])
def both_ways(request, monkeypatch):
    if request.param == "without a compiler":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("no compiler")


def test_nothing_drawn_is_a_plain_copy():
    spatial = augment.draw_spatial(Augment(**NOTHING), rng(), (8, 8, 8), (1.0, 1.0, 1.0))
    box, grid = geometry.source(spatial, (1, 2, 3), (8, 8, 8))
    assert grid is None and box == (slice(1, 9), slice(2, 10), slice(3, 11))
    image = image_of()
    assert torch.equal(changed(image, augment.draw_intensity(Augment(**NOTHING), rng(), 1)), image)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_rotation_and_scale_equal_scipy(spacing, both_ways):
    """One pass of ours is scipy's affine_transform about the patch centre."""
    options = Augment(**{**NOTHING, "rotation": 1, "scale": 1, "angle": 40})
    patch, start = (8, 10, 12), (14, 15, 16)
    volume = ndimage.gaussian_filter(rng(1).normal(size=(40, 40, 40)), 1).astype(np.float32)
    spatial = augment.draw_spatial(options, rng(3), patch, spacing)
    box, grid = geometry.source(spatial, start, patch)
    part = volume[box].copy()[None]
    ours, _ = resample(part, np.zeros(part.shape[1:], np.uint8), grid)
    half = (np.array(patch) - 1) / 2
    offset = np.array(start) + half - spatial.matrix @ half
    theirs = ndimage.affine_transform(
        volume, spatial.matrix, offset, output_shape=patch, order=1, mode="nearest"
    )
    np.testing.assert_allclose(ours[0], theirs, atol=2e-5)
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
    box, grid = geometry.source(
        augment.draw_spatial(options, rng(2), (1, 16, 16), (1.0, 1.0, 1.0)), (5, 0, 0), (1, 16, 16)
    )
    assert box[0] == slice(5, 6) and np.abs(grid.positions()[0]).max() == 0


def cut(volume, box):
    padded = np.pad(volume, [(0, 0)] * (volume.ndim - 3) + [(40, 40)] * 3)
    return padded[(..., *(slice(b.start + 40, b.stop + 40) for b in box))].copy()


def test_labels_are_the_largest_of_the_linear_weights(both_ways):
    """Against one channel per label value, resampled by scipy."""
    options = Augment(**{**NOTHING, "rotation": 1, "scale": 1, "elastic": 1})
    label = np.zeros((40, 40, 40), np.uint8)
    label[10:30, 10:30, 10:20], label[10:30, 10:30, 20:30], label[20:30, 14:20, :] = 1, 3, 7
    box, grid = geometry.source(
        augment.draw_spatial(options, rng(4), (16, 18, 20), (1.0, 1.0, 1.0)),
        (12, 12, 12),
        (16, 18, 20),
    )
    part = cut(label, box)
    _, moved = resample(part[None].astype(np.float32), part, grid)
    votes = [
        ndimage.map_coordinates((part == v).astype(float), grid.positions().astype(float), order=1)
        for v in (0, 1, 3, 7)
    ]
    clear = np.sort(votes, 0)[-1] - np.sort(votes, 0)[-2] > 1e-4
    expected = np.array([0, 1, 3, 7])[np.argmax(votes, 0)]
    assert clear.mean() > 0.99 and moved.dtype == np.uint8
    assert np.array_equal(moved[clear], expected[clear]) and len(np.unique(moved)) == 4


@pytest.mark.parametrize("patch", [(9, 17, 21), (1, 33, 40)])
@pytest.mark.parametrize("elastic", [0, 1])
def test_the_compiled_pass_gives_the_bits_of_the_other(patch, elastic, monkeypatch):
    if kernels.library() is None:
        pytest.skip("no compiler")
    options = Augment(**{**NOTHING, "rotation": 1, "scale": 1, "elastic": elastic, "flip": None})
    image = rng(1).normal(size=(2, 1 if patch[0] == 1 else 40, 60, 60)).astype(np.float32)
    label = rng(2).integers(0, 5, image.shape[1:]).astype(np.uint8)
    found = []
    for _ in range(2):
        spatial = augment.draw_spatial(options, rng(7), patch, (1.0, 1.0, 1.0))
        box, grid = geometry.source(spatial, (0 if patch[0] == 1 else 10, 12, 14), patch)
        found.append(resample(cut(image, box), cut(label, box), grid))
        monkeypatch.setattr(kernels, "library", lambda: None)
    assert np.array_equal(found[0][0].view(np.int32), found[1][0].view(np.int32))
    assert np.array_equal(found[0][1], found[1][1])


def test_flips_within_the_pass_are_flips():
    image = rng(1).normal(size=(1, 30, 30, 30)).astype(np.float32)
    label = rng(2).integers(0, 3, (30, 30, 30)).astype(np.uint8)
    matrix, found = np.diag([0.9, 1.1, 0.8]), []
    shifts = rng(3).normal(size=(3, 2, 2, 2))
    for flips in ((), (0, 2)):
        spatial = geometry.Spatial(flips=flips, matrix=matrix, shifts=shifts)
        box, grid = geometry.source(spatial, (8, 9, 10), (8, 10, 12))
        found.append(resample(cut(image, box), cut(label, box), grid))
    assert np.array_equal(np.flip(found[0][0], (1, 3)), found[1][0])
    assert np.array_equal(np.flip(found[0][1], (0, 2)), found[1][1])


def test_flips_and_turns():
    image, label = image_of((2, 4, 6, 6)).numpy(), np.arange(4 * 36).reshape(4, 6, 6)
    flipped, mirrored = geometry.mirror(geometry.Spatial(flips=(0, 2)), image, label)
    assert np.array_equal(flipped, np.flip(image, [1, 3]))
    assert np.array_equal(mirrored, np.flip(label, [0, 2]))
    turned, _ = geometry.mirror(geometry.Spatial(turns=1), image, label)
    assert np.array_equal(turned, np.rot90(image, 1, (2, 3)))
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
def test_blur_equals_scipy(in_plane, both_ways):
    image = image_of()
    sigma = [0.5, 0.9, 0.7]
    ours = changed(image, {"blur": [sigma]}, in_plane)[0].numpy()
    if in_plane:
        sigma[0] = 0
    theirs = ndimage.gaussian_filter(
        image[0].numpy(),
        sigma,
        mode="nearest",
        radius=[0 if s == 0 else int(3 * s + 0.5) for s in sigma],
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gamma_contrast_brightness_formulas(both_ways):
    image = image_of((1, 12, 14, 17))
    x = image.numpy()
    low, high, mean = x.min(), x.max(), x.mean(dtype=np.float64)
    ours = changed(image, {"brightness": [1.2]}).numpy()
    np.testing.assert_allclose(ours, x * 1.2, rtol=1e-6)
    contrast = np.clip((x - mean) * 1.2 + mean, low, high)
    np.testing.assert_allclose(changed(image, {"contrast": [1.2]}).numpy(), contrast, atol=1e-5)
    for sign, name in ((1, "gamma"), (-1, "gamma_inverted")):
        y = sign * x
        gamma = ((y - y.min()) / (high - low)) ** 1.4 * (high - low) + y.min()
        expected = sign * ((gamma - gamma.mean()) / gamma.std() * y.std() + y.mean())
        np.testing.assert_allclose(changed(image, {name: [1.4]}).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", intensity.CHANGES)
@pytest.mark.parametrize("shape", [(7, 13, 31), (1, 40, 50)])
def test_compiled_changes_give_the_bits_of_the_others(name, shape, monkeypatch):
    if kernels.library() is None:
        pytest.skip("no compiler")
    image = image_of((1, *shape))
    image.view(-1)[:9] = image.min()
    value = [0.5, 1.0, 0.8] if name == "blur" else 0.73
    ours = changed(image, {name: [value]})
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert torch.equal(ours.view(torch.int32), changed(image, {name: [value]}).view(torch.int32))


@pytest.mark.parametrize("seed", [0, 19, 32, 2**63 - 1])
def test_noise_is_the_stream_of_numpy(seed, monkeypatch):
    """The body of the layers, their edges and the tail (2 million numbers reach all of them)."""
    if not intensity.same_normals():
        pytest.skip("no compiler, or another stream of numpy")
    image = torch.zeros(2_000_003)
    intensity.add_noise(image, 0.05, seed)
    assert stats.kstest(image[:20_000] / 0.05, "norm").pvalue > 0.01
    monkeypatch.setattr(kernels, "library", lambda: None)
    expected = torch.zeros(2_000_003)
    intensity.add_noise(expected, 0.05, seed)
    assert torch.equal(image.view(torch.int32), expected.view(torch.int32))


def test_another_stream_of_numpy_is_taken_from_numpy(monkeypatch):
    if kernels.library() is None:
        pytest.skip("no compiler")

    class Other:
        def segfleet_noise(self, *ignored):
            pass  # draws nothing, so it is not numpy's stream

    monkeypatch.setattr(kernels, "library", Other)
    assert not intensity.same_normals()
    image = torch.zeros(100)
    intensity.add_noise(image, 1.0, 3)
    drawn = np.random.Generator(np.random.Philox(key=3)).standard_normal(100, dtype=np.float32)
    assert np.array_equal(image.numpy(), drawn)


def test_labels_of_a_turned_patch_with_one_two_and_more_in_a_cell(monkeypatch):
    """Cells of one label, of two and of many are told apart by different code."""
    if kernels.library() is None:
        pytest.skip("no compiler")
    label = rng(3).integers(0, 2, (30, 30, 30)).astype(np.uint8) * 255
    label[:10] = 7
    label[20:] = rng(4).integers(0, 250, (10, 30, 30))
    turned = geometry.Spatial(matrix=augment._rotation(np.array([0.3, 0.2, 0.1])) * 0.9)
    box, grid = geometry.source(turned, (3, 3, 3), (24, 24, 24))
    image = np.zeros((1, *label.shape), np.float32)
    ours = resample(cut(image, box), cut(label, box), grid)[1]
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert np.array_equal(ours, resample(cut(image, box), cut(label, box), grid)[1])
    assert len(np.unique(ours)) > 50


@pytest.mark.parametrize("name", [*intensity.CHANGES, "noise"])
def test_changes_do_not_depend_on_threads(name):
    image, before = image_of((1, 24, 65, 67)), torch.get_num_threads()
    value = (0.1, 5) if name == "noise" else [[0.6, 0.9, 0.5] if name == "blur" else 0.8]
    try:
        torch.set_num_threads(1)
        one = changed(image, {name: value})
        torch.set_num_threads(2)
        assert torch.equal(one, changed(image, {name: value}))
    finally:
        torch.set_num_threads(before)


def test_noise_has_the_drawn_deviation_and_is_repeatable():
    image = torch.zeros(1, 20, 30, 30)
    noisy = changed(image, {"noise": (0.08, 11)})
    assert abs(noisy.std().item() - 0.08) < 0.004
    assert torch.equal(noisy, changed(image, {"noise": (0.08, 11)}))


def test_low_resolution_loses_detail_but_not_the_slice_axis():
    image = image_of((1, 6, 32, 32))
    coarse = changed(image, {"low_resolution": [0.5]}, True)
    assert coarse.shape == image.shape and coarse.std() < image.std()
    even = image.mean((2, 3), keepdim=True).expand(image.shape).contiguous()
    torch.testing.assert_close(changed(even, {"low_resolution": [0.5]}, True), even)


@pytest.mark.parametrize("name", intensity.CHANGES)
@pytest.mark.parametrize("strength", [0.55, 0.77, 0.93])
def test_no_change_of_intensity_moves_the_image(name, strength):
    """The shift that fits best, by least squares on the gradient, mean of smooth images: below 0.05
    voxels. 47 is prime: where the size is a multiple of the reduced one, "nearest-exact" itself has
    to choose between two voxels that are as near."""
    size, shifts = 47, []
    for seed in range(6):
        smooth = ndimage.gaussian_filter(rng(seed).normal(size=(size,) * 3), 4, mode="wrap")
        image = torch.from_numpy(smooth / smooth.std()).float()[None]
        value = [[strength] * 3] if name == "blur" else [strength]
        after = changed(image, {name: value})[0].numpy()
        slopes = [np.gradient(smooth / smooth.std(), axis=a)[6:-6, 6:-6, 6:-6] for a in range(3)]
        rest = (after - image[0].numpy())[6:-6, 6:-6, 6:-6]
        columns = [s.ravel() for s in slopes] + [image[0, 6:-6, 6:-6, 6:-6].numpy().ravel()]
        columns += [np.ones(rest.size)]
        found = np.linalg.lstsq(np.stack(columns, 1), rest.ravel(), rcond=None)[0]
        shifts.append(-found[:3])
    assert np.abs(np.mean(shifts, 0)).max() < 0.05


def test_masked_channels_keep_their_background():
    image = image_of((3, 6, 8, 8))
    image[:, :, :3] = 0
    image[1, 0, 0, 0] = 1.0  # background in one masked channel only is none
    drawn = {"noise": (0.1, 1), "brightness": [1.1] * 3, "gamma": [1.2] * 3}
    found = changed(image, drawn, masked=(0, 1))
    assert (found[:2, 1:, :3] == 0).all() and found[0, 0, 0, 0] != 0
    assert (found[2, :, :3] != 0).any() and (found[:2, :, 3:] != 0).all()


def published(seed=0, n=4000):
    """Quantities of nnU-Net 2.8's training augmentation, drawn here from its published ranges."""
    draw = rng(seed)

    def about_one(low, high):
        below = draw.uniform(low, 1, n)
        return np.where(draw.random(n) < 0.5, below, draw.uniform(1, high, n))

    return {
        "angle": draw.uniform(-30, 30, n),
        "view": draw.uniform(0.7, 1.4, n),
        "noise": draw.uniform(0, 0.1, n),
        "blur": draw.uniform(0.5, 1.0, n),
        "brightness": about_one(0.75, 1.25),
        "contrast": about_one(0.75, 1.25),
        "low_resolution": draw.uniform(0.5, 1.0, n),
        "gamma_inverted": about_one(0.7, 1.5),
        "gamma": about_one(0.7, 1.5),
    }


SHARES = {  # of samples; blur and low resolution then take half of the channels
    "noise": 0.1,
    "blur": 0.2,
    "brightness": 0.15,
    "contrast": 0.15,
    "low_resolution": 0.25,
    "gamma_inverted": 0.1,
    "gamma": 0.3,
}


def test_draws_follow_the_published_distributions():
    drawn: dict[str, list] = {name: [] for name in published()}
    for seed in range(4000):
        options = Augment(**{**dict.fromkeys(OFF, 1), "elastic": 0})
        spatial = augment.draw_spatial(options, rng(seed), (32, 32, 32), (1.0, 1.0, 1.0))
        view = np.cbrt(np.linalg.det(spatial.matrix))
        drawn["view"].append(view)
        only = augment.draw_spatial(
            Augment(**{**NOTHING, "rotation": 1}), rng(seed), (1, 32, 32), (1.0,) * 3
        ).matrix
        # in plane up to 180 degrees, a sixth of which is what a cube turns by
        drawn["angle"].append(np.degrees(np.arctan2(only[2, 1], only[1, 1])) / 6)
        one = augment.draw_intensity(options, rng(seed), 2)
        drawn["noise"].append(one["noise"][0])
        for name in ("blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma"):
            value = one[name][1]
            if value is not None:
                drawn[name].append(value[0] if name == "blur" else value)
    for name, expected in published().items():
        assert stats.ks_2samp(drawn[name], expected).statistic < 0.05, name
    for name in ("blur", "low_resolution"):  # half of the channels
        assert abs(len(drawn[name]) / 4000 - 0.5) < 0.03


def test_draws_have_the_published_probabilities_and_channels_their_own():
    draws = [augment.draw_intensity(Augment(), rng(seed), 3) for seed in range(6000)]
    for name, share in SHARES.items():
        assert abs(np.mean([name in drawn for drawn in draws]) - share) < 0.02, name
    assert all(len(set(d["gamma"])) == 3 for d in draws if "gamma" in d)
    alike = [augment.draw_intensity(Augment(per_channel=False), rng(k), 3) for k in range(300)]
    assert all(len(set(d["gamma"])) == 1 for d in alike if "gamma" in d)
    assert not any(None in d["blur"] for d in alike if "blur" in d)


def test_angles_follow_the_patch_unless_the_recipe_says_one():
    def angle(patch, spacing=(1.0, 1.0, 1.0), **options):
        in_plane = augment.flat(patch, spacing)
        return augment.largest_angle(Augment(**options), patch, in_plane)

    assert angle((32, 32, 32)) == 30 and angle((1, 64, 64)) == 180 and angle((1, 64, 128)) == 15
    assert angle((16, 64, 64)) == 180 and angle((32, 64, 64), (5.0, 1.0, 1.0)) == 180
    assert angle((1, 64, 64), angle=20) == 20
