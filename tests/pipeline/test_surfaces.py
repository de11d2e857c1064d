"""Surface distances, lesions and calibration against DeepMind's own code and numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from surface_distance import metrics as surface_distance

from segfleet.core.errors import InputError
from segfleet.pipeline.scoring.calibration import (
    BINS,
    _on_device,
    binary_calibration,
    calibration,
)
from segfleet.pipeline.scoring.evaluate import check_tolerance
from segfleet.pipeline.scoring.lesions import lesion_counts
from segfleet.pipeline.scoring.metrics import score_case, score_structure
from segfleet.pipeline.scoring.surfaces import surface_scores
from segfleet.pipeline.task import Task


def blobs(seed, shape):
    """Two solid, similar masks with noise at their borders."""
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.normal(size=shape), [min(2, n / 4) for n in shape])
    other = noise + 0.6 * ndimage.gaussian_filter(
        generator.normal(size=shape), [min(2, n / 4) for n in shape]
    )
    return noise > 0.5 * noise.std(), other > 0.5 * other.std()


def deepmind(a, b, spacing, tolerance):
    found = surface_distance.compute_surface_distances(a, b, spacing)
    return {
        "nsd": surface_distance.compute_surface_dice_at_tolerance(found, tolerance),
        "hd95_area": surface_distance.compute_robust_hausdorff(found, 95),
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "shape, spacing", [((14, 24, 20), (2.5, 0.7, 0.9)), ((1, 40, 50), (3.0, 0.5, 0.8))]
)
def test_nsd_and_hd95_by_area_are_deepmind_s(seed, shape, spacing):
    a, b = blobs(seed, shape)
    flat = slice(None) if shape[0] > 1 else 0
    expected = deepmind(a[flat], b[flat], spacing if shape[0] > 1 else spacing[1:], 1.0)
    found = surface_scores(a, b, spacing, 1.0)
    assert 0 < expected["nsd"] < 1
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_far_apart_in_much_air_and_nearly_equal():
    """The tree of points instead of the distance map, and its short cut where surfaces meet."""
    a = np.zeros((60, 60, 60), bool)
    a[5:12, 6:15, 7:14] = True
    b = np.roll(a, 30, axis=1)
    near = a.copy()
    near[5, 6, 7] = False
    for other in (b, near):
        expected = deepmind(a, other, (1.5, 1.0, 0.5), 0.4)
        found = surface_scores(a, other, (1.5, 1.0, 0.5), 0.4)
        assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_averages_by_hand():
    """Two lines of pixels 3 apart; the prediction has one pixel more at one end."""
    truth, prediction = np.zeros((1, 9, 9), bool), np.zeros((1, 9, 9), bool)
    truth[0, 2, 2:6] = True
    prediction[0, 5, 2:7] = True
    found = surface_scores(prediction, truth, (1, 2, 2), 6.0)
    back, there = [6.0] * 4, [6.0] * 4 + [2 * np.sqrt(10)]
    assert found["assd"] == pytest.approx(np.mean(there + back))
    assert found["masd"] == pytest.approx((np.mean(there) + np.mean(back)) / 2)
    assert found["nsd"] == pytest.approx(deepmind(truth[0], prediction[0], (2, 2), 6.0)["nsd"])


def test_empty_masks_have_no_distance_but_a_surface_dice():
    some = np.zeros((3, 5, 5), bool)
    some[1, 2, 2] = True
    nothing = np.zeros_like(some)
    assert surface_scores(some, nothing, (1, 1, 1), 1.0)["nsd"] == 0.0
    assert set(surface_scores(nothing, nothing, (1, 1, 1), 1.0).values()) == {None}
    assert surface_scores(some, some, (1, 1, 1), 1.0) == {
        "hd95": 0, "hd95_max": 0, "hd95_area": 0, "assd": 0, "masd": 0, "nsd": 1,
    }  # fmt: skip


def test_every_structure_has_its_own_tolerance():
    task = Task(head="softmax", names=("a", "b"), members=((1,), (2,)), values=(0, 1, 2))
    truth, prediction = np.zeros((1, 20, 20), np.uint8), np.zeros((1, 20, 20), np.uint8)
    for value, start in ((1, 2), (2, 12)):
        truth[0, 4:10, start : start + 6] = value
        prediction[0, 7:13, start : start + 6] = value  # 3 mm lower
    kwargs = {"spacing": (1, 1, 1), "task": task}
    found = score_case(prediction, truth, tolerance={"a": 3.0, "b": 1.0}, **kwargs)
    assert found["a"]["nsd"] == 1.0 and found["b"]["nsd"] < 0.8
    default = score_case(prediction, truth, **kwargs)
    assert default["a"]["nsd"] == score_case(prediction, truth, tolerance=2.0, **kwargs)["a"]["nsd"]
    with pytest.raises(InputError, match="'liver', expected structures of the data set: a, b"):
        check_tolerance({"liver": 3.0}, task)


def test_lesions_by_hand():
    truth, prediction = np.zeros((3, 8, 8), bool), np.zeros((3, 8, 8), bool)
    truth[0, 0, 0] = truth[1, 1, 1] = True  # one lesion: they touch by their corners
    truth[0, 5:7, 0] = True  # missed
    truth[2, 5:8, 5:8] = True  # found by two parts
    prediction[1, 1, 1:3] = True
    prediction[2, 5, 5] = prediction[2, 7, 7] = True
    prediction[0, 0, 6] = True  # invented
    assert lesion_counts(prediction, truth) == (2, 1, 1)
    found = score_structure(prediction, truth, spacing=(1, 1, 1))
    assert found["lesion_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["lesion_recall"] == pytest.approx(2 / 3) and found["lesion_fp"] == 1
    nothing = score_structure(truth & False, truth & False, spacing=(1, 1, 1))
    assert [nothing[f"lesion_{key}"] for key in ("f1", "recall", "fp")] == [None, None, 0]


def test_calibration_by_the_definition():
    generator = np.random.default_rng(0)
    p = generator.random(4000).astype(np.float32) ** 4
    truth = generator.random(4000) < p * 0.8
    expected, bins = 0.0, np.minimum((p.astype(float) * BINS).astype(int), BINS - 1)
    for index in range(BINS):
        inside = bins == index
        expected += abs(p[inside].mean(dtype=float) - truth[inside].mean()) * inside.mean()
    found = binary_calibration(p, truth)
    assert found["ece"] == pytest.approx(expected, abs=1e-6)
    assert found["brier"] == pytest.approx(np.mean((p.astype(float) - truth) ** 2))


def test_calibration_of_structures_leaves_out_the_ignored():
    task = Task(
        head="softmax", names=("a", "b"), members=((1,), (2,)), values=(0, 1, 2), ignore_label=9
    )
    label = np.array([[[1, 2, 0, 9]]], np.uint8)
    p = torch.tensor([[0.2, 0.0, 1.0, 0.0], [0.8, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 1.0]])
    found = calibration(p.reshape(3, 1, 1, 4), label, task)
    assert found["a"]["brier"] == pytest.approx((0.2**2 + 0.5**2) / 3)
    assert found["b"]["brier"] == pytest.approx(0.5**2 / 3)
    assert found["a"]["ece"] == pytest.approx((0.2 + 0.5) / 3)
    logits = Task(**{**task.__dict__, "averages": "logits"})
    assert calibration(p.reshape(3, 1, 1, 4), label, logits)["a"] == {"brier": None, "ece": None}


@pytest.mark.parametrize("ignore", [None, 9])
def test_calibration_on_a_device_is_that_on_the_host(ignore):
    """Its sums run where the probabilities are; a CPU does for a device here."""
    task = Task(
        head="softmax",
        names=("a", "b"),
        members=((1,), (2,)),
        values=(0, 1, 2),
        ignore_label=ignore,
    )
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 9, 40, 50, generator=generator).softmax(0)
    p[1, 0, 0, :3] = torch.tensor([1.0, 0.0, 1 / 15])
    label = torch.randint(0, 3, (9, 40, 50), generator=generator, dtype=torch.uint8).numpy()
    if ignore:
        label[:, :20] = ignore
    expected, found = calibration(p, label, task), _on_device(p[1:], label, task)
    for name in task.names:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    nothing = np.full(label.shape, 9, np.uint8)
    if ignore:
        assert _on_device(p[1:], nothing, task) == calibration(p, nothing, task)
