"""Scores by hand, distances by brute force, empty cases by the written rules."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from segfleet.pipeline.scoring.metrics import (
    METRICS,
    confusion,
    score_case,
    score_structure,
)
from segfleet.pipeline.scoring.summary import VARIANTS, definitions, summarise
from segfleet.pipeline.scoring.surfaces import distances_between, outline, surface_scores
from segfleet.pipeline.task import Task

SPACING = (2.0, 0.5, 0.8)
ONE = Task(head="sigmoid", names=("lesion",), members=((1,),), values=(1,))


def box(shape, *slices) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


def surface_percentiles(a, b, spacing):
    found = surface_scores(a, b, spacing, tolerance=1.0)
    return found["hd95"], found["hd95_max"]


def surface_distances(a, b, spacing):
    return distances_between(outline(a), outline(b), spacing)


def brute_force(a, b, spacing, percentile=95):
    """Directed distances between surfaces, voxel by voxel: no tree, no distance map, no erosion
    routine."""

    def surface(mask):
        points = []
        for point in zip(*np.nonzero(mask), strict=True):
            for axis in range(mask.ndim):
                if mask.shape[axis] == 1:
                    continue
                for step in (-1, 1):
                    near = list(point)
                    near[axis] += step
                    inside = 0 <= near[axis] < mask.shape[axis] and mask[tuple(near)]
                    if not inside:
                        points.append(point)
        return sorted(set(points))

    def directed(p, q):
        return [
            min(
                math.sqrt(sum(((u - v) * s) ** 2 for u, v, s in zip(x, y, spacing, strict=True)))
                for y in q
            )
            for x in p
        ]

    p, q = surface(a), surface(b)
    there, back = directed(p, q), directed(q, p)
    return {
        "hd95": np.percentile(there + back, percentile),
        "hd95_max": max(np.percentile(there, percentile), np.percentile(back, percentile)),
        "assd": np.mean(there + back),
        "masd": (np.mean(there) + np.mean(back)) / 2,
    }


def test_overlap_by_hand():
    truth = box((2, 4, 4), slice(0, 1), slice(0, 2), slice(0, 4))  # 8 voxels
    prediction = box((2, 4, 4), slice(0, 1), slice(1, 4), slice(0, 2))  # 6 voxels, 2 of them right
    found = score_structure(prediction, truth, spacing=SPACING)
    assert (found["tp"], found["fp"], found["fn"]) == (2, 4, 6)
    assert found["dice"] == pytest.approx(4 / 14)
    assert found["iou"] == pytest.approx(2 / 12)
    assert found["sensitivity"] == pytest.approx(2 / 8)
    assert found["precision"] == pytest.approx(2 / 6)
    assert found["volume_error"] == pytest.approx(-2 / 8)
    assert found["volume_error_ml"] == pytest.approx(-2 * 2.0 * 0.5 * 0.8 / 1000)
    assert (found["slice_dice_sum"], found["slices"]) == (pytest.approx(4 / 14 + 1), 2)


def test_distance_of_two_points_is_their_distance_in_mm():
    a, b = box((5, 9, 9), 1, 2, 3), box((5, 9, 9), 3, 6, 8)
    expected = math.sqrt((2 * 2.0) ** 2 + (4 * 0.5) ** 2 + (5 * 0.8) ** 2)
    assert surface_percentiles(a, b, SPACING) == (pytest.approx(expected), pytest.approx(expected))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(5, 8, 7), (1, 12, 11), (9, 1, 6)])
def test_surface_distances_equal_brute_force(seed, shape):
    generator = np.random.default_rng(seed)
    if seed % 2:  # scattered voxels: the distance map
        a, b = (generator.random(shape) < p for p in (0.2, 0.4))
    else:  # two solid boxes: touching the border of the array, and an outlier
        a, b = (
            box(shape, *(slice(0, max(1, int(n * f))) for n in shape))
            for f in generator.uniform(0.3, 1.0, 2)
        )
        b[-1, -1, -1] = True
    found, expected = surface_scores(a, b, SPACING, tolerance=1.0), brute_force(a, b, SPACING)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_the_two_ways_to_the_distances_agree():
    z, y, x = np.ogrid[:30, :40, :40]
    a = (z - 15) ** 2 / 100 + (y - 20) ** 2 / 225 + (x - 20) ** 2 / 225 < 1
    b = (z - 13) ** 2 / 100 + (y - 21) ** 2 / 200 + (x - 20) ** 2 / 225 < 1
    spacing = np.array(SPACING)
    # full box: a distance map
    near = surface_distances(a[3:27, 4:37, 4:37], b[3:27, 4:37, 4:37], spacing)
    far = surface_distances(np.pad(a, 40), np.pad(b, 40), spacing)  # few points in much air: a tree
    for one, other in zip(near, far, strict=True):
        np.testing.assert_allclose(np.sort(one), np.sort(other), atol=1e-9)


def test_pooled_and_max_conventions_differ_and_are_named():
    truth = box((1, 60, 60), 0, slice(10, 50), slice(10, 50))
    prediction = truth.copy()
    prediction[0, 55:59, 55:59] = True  # a far blob: 12 of 168 outline voxels of the prediction
    pooled, larger = surface_percentiles(prediction, truth, (1, 1, 1))
    assert pooled < larger
    expected = brute_force(prediction, truth, (1, 1, 1))
    assert (pooled, larger) == pytest.approx((expected["hd95"], expected["hd95_max"]))
    assert "pooled" in METRICS["hd95"] and "larger" in METRICS["hd95_max"]


def test_a_2d_mask_has_an_outline_not_a_solid():
    """A filled square and its own outline: distance 0, though every pixel of a one-slice volume
    would be 'surface' in 3D."""
    square = box((1, 20, 20), 0, slice(4, 16), slice(4, 16))
    ring = square.copy()
    ring[0, 5:15, 5:15] = False
    there, _ = surface_distances(square[0], ring[0], np.array([1.0, 1.0]))
    assert len(there) == 44 and there.max() == 0


def test_empty_rules():
    empty, full = np.zeros((2, 4, 4), bool), box((2, 4, 4), slice(0, 1), slice(1, 3), slice(1, 3))
    both = score_structure(empty, empty, spacing=SPACING)
    assert all(
        both[m] is None
        for m in ("dice", "iou", "sensitivity", "precision", "hd95", "hd95_max", "volume_error")
    )
    missed = score_structure(empty, full, spacing=SPACING)
    five = ("dice", "iou", "sensitivity", "precision", "hd95")
    assert [missed[m] for m in five] == [0.0, 0.0, 0.0, None, None]
    invented = score_structure(full, empty, spacing=SPACING)
    assert [invented[m] for m in five] == [0.0, 0.0, None, 0.0, None]
    perfect = score_structure(full, full, spacing=SPACING)
    assert (perfect["dice"], perfect["hd95"], perfect["hd95_max"], perfect["volume_error"]) == (
        1.0,
        0.0,
        0.0,
        0.0,
    )


def test_regions_overlap_and_the_ignore_label_counts_for_nothing():
    task = Task(
        head="sigmoid",
        names=("whole", "core"),
        members=((1, 2), (2,)),
        values=(1, 2),
        ignore_label=3,
    )
    truth = np.array([[[0, 1, 2, 2, 3, 3]]], dtype=np.uint8)
    prediction = np.array([[[1, 1, 1, 2, 2, 0]]], dtype=np.uint8)
    found = score_case(prediction, truth, spacing=(1, 1, 1), task=task)
    assert (found["whole"]["tp"], found["whole"]["fp"], found["whole"]["fn"]) == (3, 1, 0)
    assert (found["core"]["tp"], found["core"]["fp"], found["core"]["fn"]) == (1, 0, 1)


def case(name, prediction, truth, group=None):
    scores = score_case(
        np.array(prediction, np.uint8), np.array(truth, np.uint8), spacing=(1, 1, 1), task=ONE
    )
    return {"id": name, "group": group or name, "scores": scores}


def five_cases():
    blank = [[[0, 0, 0, 0]]]
    return [
        case("good", [[[1, 1, 0, 0]]], [[[1, 1, 0, 0]]], "p1"),  # Dice 1
        case("half", [[[1, 0, 0, 0]]], [[[1, 1, 1, 0]]], "p1"),  # Dice 2/4
        case("missed", blank, [[[1, 0, 0, 0]]], "p2"),  # Dice 0, hd95 missing
        case("invented", [[[1, 1, 0, 0]]], blank, "p3"),  # Dice 0, hd95 missing
        case("nothing", blank, blank, "p4"),  # excluded
    ]


def test_the_summary_counts_what_is_empty_and_never_drops_it_silently():
    summary = summarise(five_cases(), ["lesion"])
    lesion = summary["structures"]["lesion"]
    assert lesion["dice"]["mean"] == pytest.approx(1.5 / 4) and lesion["dice"]["n"] == 4
    assert lesion["hd95"]["n"] == 2
    assert lesion["counts"] == {
        "cases": 5,
        "empty_truth": 2,
        "empty_prediction": 2,
        "excluded": 1,
        "hd95_missing": 2,
    }
    assert summary["mean_foreground_dice"] == pytest.approx(1.5 / 4)
    assert (summary["cases"], summary["patients"]) == (5, 4)


def test_named_variants_by_hand():
    variants = summarise(five_cases(), ["lesion"])["structures"]["lesion"]["variants"]
    assert set(variants) == set(VARIANTS)
    assert variants["pooled"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 3))  # tp 2+1, fp 2, fn 2+1
    assert variants["per_image"] == pytest.approx((1 + 0.5 + 0 + 0 + 1) / 5)
    assert variants["per_volume"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert variants["per_patient"] == pytest.approx((2 * 3 / (2 * 3 + 2) + 0 + 0) / 3)
    assert variants["per_slice"] == pytest.approx((1 + 0.5 + 0 + 0 + 1) / 5)


def with_stored(prediction, truth, name):
    """A case whose stored grid is the raw one."""
    found = case(name, prediction, truth)
    counts = confusion(np.array(prediction, np.uint8), np.array(truth, np.uint8), ONE)
    found["scores"]["lesion"]["stored_counts"] = list(counts["lesion"])
    return found


def test_accuracy_specificity_and_mean_iou_against_scikit_learn_s_definitions():
    """3 TP, 2 FP, 4 FN, 11 TN of 20 pixels; the ignored pixels of the second case count nowhere."""
    prediction = np.array([1] * 5 + [0] * 15, np.uint8).reshape(1, 4, 5)
    truth = np.array([1] * 3 + [0] * 2 + [1] * 4 + [0] * 11, np.uint8).reshape(1, 4, 5)
    found = score_structure(prediction == 1, truth == 1, spacing=SPACING)
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (3, 2, 4, 11)
    assert found["accuracy"] == pytest.approx(14 / 20)
    assert found["specificity"] == pytest.approx(11 / 13)
    assert found["mean_iou"] == pytest.approx((3 / 9 + 11 / 17) / 2)
    task = Task(head="sigmoid", names=("lesion",), members=((1,),), values=(1,), ignore_label=2)
    truth[0, 3, 2:] = 2  # three of the true negatives
    assert confusion(prediction, truth, task) == {"lesion": (3, 2, 4, 8)}
    ignoring = score_case(prediction, truth, spacing=SPACING, task=task)["lesion"]
    assert ignoring["tn"] == 8 and ignoring["accuracy"] == pytest.approx(11 / 17)


def test_pooling_at_the_stored_size_and_over_batches_by_hand():
    """Three images of 4 pixels in batches of two: {tp 2, fp 1, fn 1}, {tp 0, fp 1, fn 1}, {tp
    2}."""
    images = [
        ([[[1, 1, 1, 0]]], [[[1, 1, 0, 1]]]),
        ([[[1, 0, 0, 0]]], [[[0, 1, 0, 0]]]),
        ([[[1, 1, 0, 0]]], [[[1, 1, 0, 0]]]),
    ]
    cases = [with_stored(*pair, name) for pair, name in zip(images, "abc", strict=True)]
    # as if the first had been ten times as large before it was resized
    for key in ("tp", "fp", "fn", "tn"):
        cases[0]["scores"]["lesion"][key] *= 10
    lesion = summarise(cases, ["lesion"], pool=2)["structures"]["lesion"]
    variants, pooled = lesion["variants"], lesion["pooled"]
    assert variants["pooled"] == pytest.approx(2 * 22 / (2 * 22 + 11 + 11))
    assert variants["pooled_at_stored_size"] == pytest.approx(2 * 4 / (2 * 4 + 2 + 2))
    first, second = 2 / 6, 1.0  # IoU of the batches of two and of one
    dice = [2 * iou / (1 + iou) for iou in (first, second)]
    assert variants["pooled_per_batch"] == pytest.approx((2 * dice[0] + dice[1]) / 3, abs=1e-5)
    assert variants["pooled_per_batch_unweighted"] == pytest.approx(sum(dice) / 2, abs=1e-5)
    assert pooled["pooled_per_batch"]["iou"] == pytest.approx((2 * first + second) / 3, abs=1e-5)
    assert pooled["pooled_at_stored_size"] == pytest.approx(
        {"dice": 8 / 12, "iou": 4 / 8, "accuracy": 8 / 12, "specificity": 4 / 6,
         "sensitivity": 4 / 6, "precision": 4 / 6, "mean_iou": (4 / 8 + 4 / 8) / 2}
    )  # fmt: skip
    without = summarise(five_cases(), ["lesion"])["structures"]["lesion"]
    assert without["pooled"]["pooled_at_stored_size"] == {}
    assert without["variants"]["pooled_per_batch"] is None


def test_per_slice_is_inflated_by_empty_slices():
    truth = np.zeros((10, 1, 4), np.uint8)
    truth[0] = 1
    prediction = np.zeros_like(truth)
    variants = summarise([case("a", prediction, truth)], ["lesion"])["structures"]["lesion"][
        "variants"
    ]
    assert variants["per_volume"] == 0.0 and variants["per_slice"] == pytest.approx(0.9)


def test_the_interval_matches_the_standard_error_of_many_patients():
    generator = np.random.default_rng(0)
    values = generator.uniform(0.4, 0.9, 400)
    blank = five_cases()[0]["scores"]["lesion"]
    cases = [
        {"id": str(i), "group": str(i), "scores": {"lesion": {**blank, "dice": float(v)}}}
        for i, v in enumerate(values)
    ]
    dice = summarise(cases, ["lesion"])["structures"]["lesion"]["dice"]
    error = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert dice["ci95"] == pytest.approx(
        [values.mean() - error, values.mean() + error], abs=0.25 * error
    )


def test_the_document_is_strict_json_and_every_number_is_defined():
    summary = summarise(five_cases(), ["lesion"])
    json.dumps(summary, allow_nan=False)
    known = definitions()
    for key, value in summary["structures"]["lesion"].items():
        assert key in known or key in ("counts", "variants", "pooled"), key
        if key == "counts":
            assert set(value) - {"cases"} <= set(known)
        if key == "variants":
            assert {f"variant {v}" for v in value} <= set(known)
    assert summarise(five_cases()[:1], ["lesion"])["mean_foreground_dice_ci95"] is None


def test_no_case_and_a_structure_that_never_occurs():
    assert summarise([], ["lesion"])["mean_foreground_dice"] is None
    blank = [[[0, 0]]]
    lesion = summarise([case("a", blank, blank), case("b", blank, blank)], ["lesion"])[
        "structures"
    ]["lesion"]
    assert lesion["dice"] == {"mean": None, "sd": None, "median": None, "n": 0, "ci95": None}
    assert lesion["variants"]["pooled"] is None and lesion["variants"]["per_image"] == 1.0
