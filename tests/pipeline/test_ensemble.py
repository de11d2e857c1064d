"""Several networks as one: the mean of their probabilities on the raw grid, in the memory of
one."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.ensemble import Member, Stored, predict_maps
from segfleet.pipeline.inference.postprocess import LARGEST, clean, parse_rule
from segfleet.pipeline.inference.predict import Wishes, check_sums, predict_files
from segfleet.pipeline.inference.restore import Map, combine
from segfleet.pipeline.inference.sliding_window import sliding_window
from segfleet.pipeline.task import Task
from segfleet.pipeline.trained.out_of_fold import compared
from segfleet.preprocess.stores.manifest import Dataset, Plan
from segfleet.preprocess.stores.shard_reader import to_float32

LABELS = {"background": 0, "a": 1, "b": 2}
TASK = Task(head="softmax", names=("a", "b"), members=((1,), (2,)), values=(0, 1, 2))
DATASET = Dataset(name="d", reader="msd", dims=3, channels=("mr",), labels=LABELS)
PLANS = {
    "fine": Plan(target_spacing=(1.0, 1.0, 1.0), patch=(8, 8, 8), normalisation=("zscore",)),
    "coarse": Plan(target_spacing=(2.0, 1.5, 1.5), patch=(8, 8, 8), normalisation=("zscore",)),
    "turned": Plan(
        target_spacing=(1.0, 1.2, 2.0),
        transpose=(2, 0, 1),
        patch=(8, 8, 8),
        normalisation=("zscore",),
    ),
}


def network(seed: int, task: Task = TASK):
    """A small convolution with fixed weights."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(3, 1, 3, 3, 3, generator=generator)

    def forward(x):
        return task.scores(torch.nn.functional.conv3d(x, kernel, padding=1))

    return forward


def member(seed: int, plan: str = "fine", averages: str = "probabilities") -> Member:
    task = replace(TASK, averages=averages)
    return Member(
        forward=lambda: network(seed, task), plan=PLANS[plan], task=task, patch=PLANS[plan].patch
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A NIfTI file whose outer voxels are 0, so that a part of it is cropped."""
    array = np.zeros((20, 18, 14), np.float32)
    array[2:17, 3:16, 1:12] = np.random.default_rng(0).normal(5, 1, (15, 13, 11))
    path = tmp_path_factory.mktemp("image") / "x.nii.gz"
    nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])).to_filename(path)
    return path


def predict(members, image, out, **wishes):
    found = predict_files(members, DATASET, [image], out, wishes=Wishes(**wishes))
    assert not found["failed"], found["failed"]
    label = np.asarray(nib.load(out / "x.nii.gz").dataobj).T
    return label, np.load(out / "x.npz")["probabilities"] if wishes else None


@pytest.mark.parametrize(
    "members",
    [
        [member(1), member(2)],
        [member(1), member(2, "coarse"), member(3, "turned")],
        [member(1, averages="logits"), member(2, averages="logits")],
        [member(1), member(2), member(3, "coarse", "logits")],
    ],
    ids=["one plan", "three plans", "logits", "mixed"],
)
def test_the_mean_of_what_each_says_alone(members, image, tmp_path):
    """As nnU-Net ensembles: the mean of the softmax of each, on the raw grid, then the largest."""
    alone = [
        predict([one], image, tmp_path / str(n), probabilities=True)[1].astype(np.float64)
        for n, one in enumerate(members)
    ]
    label, found = predict(members, image, tmp_path / "all", probabilities=True)
    mean = sum(alone) / len(alone)
    assert found.shape == (3, 14, 18, 20) and found.dtype == np.float16
    np.testing.assert_allclose(found, mean, atol=2e-3)
    assert len(np.unique(label)) == 3
    sure = np.sort(mean, 0)[-1] - np.sort(mean, 0)[-2] > 5e-3  # float16 rounds
    assert np.array_equal(label[sure], mean.argmax(0)[sure]) and sure.mean() > 0.9
    np.testing.assert_allclose(found.astype(float).sum(0), 1, atol=2e-3)
    assert np.all(found[0, 0] == 1) and not label[0].any(), "background outside the kept box"


def test_probabilities_are_made_once_and_only_when_wanted(image, tmp_path):
    out = tmp_path / "out"
    label, _ = predict([member(1)], image, out)
    assert not (out / "x.npz").exists()
    wanted = Wishes(probabilities=True)
    first = predict_files([member(1)], DATASET, [image], out, wishes=wanted)
    assert len(first["done"]) == 1 and (out / "x.npz").exists()
    for wishes in (wanted, Wishes()):
        again = predict_files([member(1)], DATASET, [image], out, wishes=wishes)
        assert len(again["kept"]) == 1 and (out / "x.npz").exists()
    (out / "x.npz").write_bytes(b"edited")
    (failed,) = predict_files([member(1)], DATASET, [image], out, wishes=wanted)["failed"]
    assert "not as it was written" in failed["problem"]
    assert np.array_equal(label, np.asarray(nib.load(out / "x.nii.gz").dataobj).T)


def test_one_network_alone_gives_the_bits_it_gave(image, tmp_path):
    """The ensemble of one is the network: the shared sums change nothing."""
    x, forward = torch.randn(1, 12, 10, 9), network(4)
    options = {"patch": (8, 8, 8), "dims": 3}
    alone = sliding_window(forward, x, **options)
    assert torch.equal(sliding_window(iter([forward]), x, **options), alone)
    both = sliding_window([forward, network(5)], x, **options)
    torch.testing.assert_close(both, (alone + sliding_window(network(5), x, **options)) / 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_an_image_in_the_type_of_its_store_gives_the_bits_of_float32(dtype):
    """A byte for each value of a slide, not four."""
    stored = torch.randint(0, 255, (1, 12, 10, 9)).to(dtype)
    whole = torch.from_numpy(to_float32(stored.numpy(), 1 / 255))
    options = {"patch": (8, 8, 16), "dims": 3}  # padded along x
    expected = sliding_window(network(4), whole, **options)
    assert torch.equal(sliding_window(network(4), stored, scale=1 / 255, **options), expected)


def test_what_the_sums_would_take_is_asked_for_before(monkeypatch):
    monkeypatch.setattr("segfleet.pipeline.inference.predict.memory_budget", lambda: 2**30)
    check_sums("a.tif", (1, 8_000, 8_000), TASK)
    with pytest.raises(InputError, match=r"a.tif: size: found 1x20000x20000 .* 6.0 GiB.*tiles"):
        check_sums("a.tif", (1, 20_000, 20_000), TASK)


def test_no_two_networks_and_no_two_maps_are_there_at_once(tmp_path):
    """Memory does not grow with the number of networks: each goes before the next comes, and maps
    of other plans wait in files."""
    alive, most = weakref.WeakSet(), []

    class Network(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, -x, x * 0], 1).softmax(1)

    def load():
        gc.collect()
        most.append(len(alive))
        made = Network()
        alive.add(made)
        return made

    members = [
        replace(member(1, plan), forward=load) for plan in ("fine", "fine", "fine", "coarse")
    ]
    image = torch.randn(1, 10, 10, 10)
    stored = Stored(image_CZYX=image, crop=((0, 10),) * 3, raw_spacing=(1.0, 1.0, 1.0))
    maps = predict_maps(members, lambda one: stored, folder=tmp_path)
    assert most == [0, 0, 0, 0]
    assert [one.networks for one in maps] == [3, 1]
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "deleted" in line
    ]
    address = maps[0].scores_KZYX.data_ptr()
    of_file = [line for line in mapped if str(tmp_path) in line]
    assert any(
        int(start, 16) <= address < int(stop, 16)
        for start, stop in (line.split()[0].split("-") for line in of_file)
    )
    assert not list(tmp_path.iterdir()), "a file without a name"
    assert combine(maps, (10, 10, 10)).shape == (10, 10, 10)


def test_maps_of_other_boxes_meet_on_the_raw_grid():
    """Outside its box a map says background."""
    whole = torch.zeros(3, 2, 2, 4)
    whole[1] = 0.9
    whole[0] = 0.1
    part = torch.zeros(3, 2, 2, 2)
    part[2] = 1.0
    maps = [
        Map(scores_KZYX=whole, task=TASK, crop=((0, 2), (0, 2), (0, 4))),
        Map(scores_KZYX=part, task=TASK, crop=((0, 2), (0, 2), (1, 3))),
    ]
    keep = np.zeros((3, 2, 2, 4), np.float16)
    label = combine(maps, (2, 2, 4), keep)
    np.testing.assert_allclose(keep[:, 0, 0, 0], [0.55, 0.45, 0], atol=1e-3)
    np.testing.assert_allclose(keep[:, 0, 0, 1], [0.05, 0.45, 0.5], atol=1e-3)
    assert label[0, 0].tolist() == [0, 2, 2, 0]


def test_parts_are_those_of_itk():
    """The largest part and parts below a size, against SimpleITK, parts touching at corners too."""
    mask = np.random.default_rng(1).random((12, 14, 16)) < 0.06
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(image, True))  # the largest is 1
    largest = sitk.GetArrayFromImage(parts) == 1
    assert 1 < largest.sum() < mask.sum()
    assert np.array_equal(LARGEST.kept(mask, (1, 1, 1)), largest)
    sized = sitk.RelabelComponent(sitk.ConnectedComponent(image, True), minimumObjectSize=3)
    expected = sitk.GetArrayFromImage(sized) > 0
    assert np.array_equal(parse_rule("min-size=3").kept(mask, (1, 1, 1)), expected)
    # 3 voxels of 2 mm3
    assert np.array_equal(parse_rule("min-size=6mm3").kept(mask, (2.0, 1.0, 1.0)), expected)
    assert not LARGEST.kept(np.zeros((2, 2, 2), bool), (1, 1, 1)).any()


def test_a_rule_touches_its_structure_alone():
    label = np.zeros((1, 3, 9), np.uint8)
    label[0, 0, :4], label[0, 0, 6], label[0, 2, :2], label[0, 2, 5] = 1, 1, 2, 2
    found = clean(label, {"a": LARGEST}, TASK, (1, 1, 1))
    assert found[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert np.array_equal(found[0, 2], label[0, 2])
    assert clean(label, {"a": parse_rule("min-size=1")}, TASK, (1, 1, 1)) is label


@pytest.mark.parametrize("text", ["smallest", "min-size", "min-size=0", "min-size=-1", "auto "])
def test_a_rule_that_cannot_be_meant(text):
    with pytest.raises(InputError, match=r"postprocess: found .* expected one of: auto, largest"):
        parse_rule(text)


def test_paired_differences_by_hand():
    before, after = [0.5, 0.6, 0.7, 0.8], [0.6, 0.6, 0.9, 0.8]
    found = compared(before, after, ["p", "q", "r", "r"])
    assert found["cases"] == 4 and found["changed"] == 2
    assert found["difference"] == pytest.approx(0.075)
    assert found["before"] == pytest.approx(0.65) and found["after"] == pytest.approx(0.725)
    assert found["ci95"] is None, "three patients are too few"
    more = compared([0.5] * 6, [0.62, 0.6, 0.65, 0.58, 0.7, 0.5], list("pqrstu"))
    assert more["difference"] == pytest.approx(0.65 / 6)
    low, high = more["ci95"]
    assert low < more["difference"] < high
