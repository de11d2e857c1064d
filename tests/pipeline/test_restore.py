"""Back to the raw grid: crop, resample and paste undo what preprocessing did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segfleet.pipeline.inference import restore as module
from segfleet.pipeline.inference.restore import resampled, restore
from segfleet.pipeline.scoring.metrics import masks, ratio
from segfleet.pipeline.task import Task
from segfleet.preprocess.case import Case, Geometry
from segfleet.preprocess.planning.plan import coarsest_first
from segfleet.preprocess.stores.manifest import Plan
from segfleet.preprocess.transforms.case_transforms import (
    preprocess_case,
    raw_resample_axis,
    resample_axis,
    resample_probabilities,
)

SOFTMAX = Task(head="softmax", names=("shell", "core"), members=((1,), (2,)), values=(0, 1, 2))
REGIONS = Task(head="sigmoid", names=("whole", "core"), members=((1, 2), (2,)), values=(1, 2))


def phantom(shape, spacing) -> Case:
    """Two nested ellipsoids of the same size in mm, off centre, with an empty margin that cropping
    removes."""
    grid = np.indices(shape).astype(float) * np.reshape(spacing, (3, 1, 1, 1))
    middle = np.array(shape) * np.array(spacing) * (0.55, 0.45, 0.5)
    away = np.sqrt(((grid - middle.reshape(3, 1, 1, 1)) ** 2).sum(0))
    radius = min(np.array(shape) * np.array(spacing)) * 0.4
    label = np.where(away < 0.5 * radius, 2, np.where(away < radius, 1, 0)).astype(np.uint8)
    image = np.where(away < 1.1 * radius, 1.0 + label, 0.0).astype(np.float32)[None]
    return Case(
        id="phantom",
        image_CZYX=image,
        label_ZYX=label,
        geometry=Geometry(shape=shape, spacing=spacing),
    )


def plan(target) -> Plan:
    return Plan(target_spacing=target, patch=(8, 8, 8), normalisation=("zscore",))


def one_hot(label: np.ndarray, task: Task) -> torch.Tensor:
    if task.head == "softmax":
        return torch.stack([torch.from_numpy(label == value).float() for value in task.values])
    return torch.stack([torch.from_numpy(np.isin(label, group)).float() for group in task.members])


@pytest.mark.parametrize("task", [SOFTMAX, REGIONS], ids=["softmax", "regions"])
@pytest.mark.parametrize(
    "shape, spacing, target, least",
    [
        ((24, 70, 64), (2.5, 0.8, 0.8), (2.5, 0.8, 0.8), 1.0),  # only cropped: nothing is lost
        # coarser: the core is 10 voxels wide
        (
            (40, 60, 64),
            (1.0, 0.7, 0.7),
            (1.5, 1.0, 1.0),
            0.94,
        ),
        ((14, 90, 84), (6.0, 0.9, 0.9), (6.0, 1.4, 1.4), 0.95),  # anisotropic, in-plane only
        ((14, 90, 84), (6.0, 0.9, 0.9), (3.0, 0.9, 0.9), 0.95),  # nearest along z, then back
        ((30, 40, 40), (2.0, 2.0, 2.0), (1.0, 1.0, 1.0), 0.98),
    ],
)
def test_round_trip_of_a_perfect_network(task, shape, spacing, target, least):
    case = phantom(shape, spacing)
    _, label, facts = preprocess_case(case, plan(target))
    axis = resample_axis(spacing, plan(target))
    back = restore(
        one_hot(label, task),
        task,
        crop=facts["crop"],
        raw_shape=facts["raw_shape"],
        anisotropic_axis=axis,
    )
    assert back.shape == shape and back.dtype == np.uint8
    assert facts["crop"] != tuple((0, n) for n in shape), "the phantom is cropped"
    for group in task.members:
        found, truth = masks(back, group), masks(case.label_ZYX, group)
        assert ratio(2 * (found & truth).sum(), found.sum() + truth.sum()) >= least


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "old, new",
    [
        ((7, 12, 10), (9, 31, 10)),
        ((9, 20, 21), (5, 13, 40)),
        ((1, 8, 8), (1, 20, 5)),
        ((1, 6, 6), (4, 6, 6)),
    ],
)
def test_resampling_is_that_of_preprocessing(axis, old, new):
    given = np.random.default_rng(0).random((3, *old), dtype=np.float32)
    expected = resample_probabilities(given, new, axis)
    np.testing.assert_allclose(
        resampled(torch.from_numpy(given), new, axis).numpy(), expected, atol=2e-6
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("task", [SOFTMAX, REGIONS], ids=["softmax", "regions"])
def test_sagittal_and_coronal_stacks_are_stored_slices_first_and_return(axes, task):
    """The same patient with the slice axis elsewhere in the file: the same store, and a label that
    lies on the file again."""
    straight = phantom((14, 90, 84), (6.0, 0.9, 0.9))
    back = np.argsort(axes)  # raw axis -> axis of `straight`
    turned = Case(
        id="turned",
        image_CZYX=straight.image_CZYX.transpose(0, *(1 + back)),
        label_ZYX=straight.label_ZYX.transpose(back),
        geometry=Geometry(
            shape=tuple(np.array(straight.geometry.shape)[back]),
            spacing=tuple(np.array(straight.geometry.spacing)[back]),
        ),
    )
    chosen = plan((3.0, 0.9, 1.2)).model_copy(update={"transpose": axes})
    expected = preprocess_case(straight, plan((3.0, 0.9, 1.2)))
    image, label, facts = preprocess_case(turned, chosen)
    assert np.array_equal(image, expected[0]) and np.array_equal(label, expected[1])
    assert facts["shape"] == expected[2]["shape"] and facts["spacing"] == (3.0, 0.9, 1.2)
    assert facts["foreground"].keys() == expected[2]["foreground"].keys()
    assert coarsest_first(turned.geometry.spacing) == axes
    found = restore(
        one_hot(label, task),
        task,
        crop=facts["crop"],
        raw_shape=facts["raw_shape"],
        anisotropic_axis=raw_resample_axis(facts["raw_spacing"], chosen),
        transpose=axes,
    )
    assert found.shape == turned.label_ZYX.shape
    for group in task.members:
        one, truth = masks(found, group), masks(turned.label_ZYX, group)
        assert ratio(2 * (one & truth).sum(), one.sum() + truth.sum()) >= 0.95


@pytest.mark.parametrize("shape", [(13, 20, 11), (40, 20, 11)])
@pytest.mark.parametrize("axis", [None, 0, 2])
def test_slabs_do_not_show(shape, axis, monkeypatch):
    given = torch.from_numpy(np.random.default_rng(0).random((3, 17, 12, 10), dtype=np.float32))
    options = {
        "crop": tuple((2, 2 + n) for n in shape),
        "raw_shape": tuple(n + 3 for n in shape),
        "anisotropic_axis": axis,
    }
    whole, seen = restore(given, SOFTMAX, **options), []
    monkeypatch.setattr(module, "SLAB", 3 * 20 * 11 * 3)
    kept = module.resampled
    monkeypatch.setattr(module, "resampled", lambda *a: seen.append(kept(*a)) or seen[-1])
    assert np.array_equal(restore(given, SOFTMAX, **options), whole)
    assert max(slab.numel() for slab in seen) <= 3 * 20 * 11 * 3 and len(seen) == -(-shape[0] // 3)


def test_the_crop_lands_where_it_was_and_the_rest_is_background():
    label = np.zeros((2, 3, 4), np.uint8)
    label[1, 2, 3] = 2
    back = restore(
        one_hot(label, SOFTMAX), SOFTMAX, crop=((1, 3), (4, 7), (0, 4)), raw_shape=(5, 9, 6)
    )
    assert back.shape == (5, 9, 6) and back.sum() == 2 and back[2, 6, 3] == 2


def test_probabilities_are_interpolated_not_labels():
    """Two voxels, 0.9 and 0.2: linear interpolation puts the border at 0.5 nearer to the second,
    labels would put it halfway."""
    task = Task(head="sigmoid", names=("a",), members=((1,),), values=(1,))
    probabilities = torch.tensor([0.9, 0.2]).reshape(1, 1, 1, 2)
    back = restore(probabilities, task, crop=((0, 1), (0, 1), (0, 20)), raw_shape=(1, 1, 20))
    # 0.9 - 0.7 x > 0.5 for x < 0.571 voxels; cells are 0.1 wide from -0.45: 5 before 0, 6 after
    assert back.sum() == 11


def test_the_largest_probability_wins_and_of_equals_the_first():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randint(0, 4, (3, 4, 5, 6), generator=generator).float()
    # numpy's argmax is the first of equals
    expected = np.array([0, 1, 2])[probabilities.numpy().argmax(0)]
    np.testing.assert_array_equal(SOFTMAX.labels(probabilities).numpy(), expected)
    assert SOFTMAX.labels(probabilities).dtype == torch.uint8


def test_later_regions_are_painted_over_earlier_ones():
    probabilities = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.8, 0.7]]).reshape(2, 1, 1, 3)
    back = restore(probabilities, REGIONS, crop=((0, 1), (0, 1), (0, 3)), raw_shape=(1, 1, 3))
    assert back.ravel().tolist() == [1, 2, 2]
