"""Augmentation on the device computes what the loader computes from the same draws. Here the
device is the CPU: the same operations on tensors that lie elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from segfleet.pipeline import identity
from segfleet.pipeline.data import device_augment, handover, loader, normals
from segfleet.pipeline.data.sampler import MixedSampler, PatchSampler
from segfleet.pipeline.parts import augments_on_device
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.sections import Augment
from segfleet.preprocess.stores.base import open_store
from tests.conftest import write_tiny_store
from tests.pipeline.test_augment import NOTHING

CPU = torch.device("cpu")
CHANGES = ("blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")
SPATIAL = {"rotation": 0.5, "scale": 0.5, "elastic": 0.4, "flip": None, "rot90": True}
EVERYTHING = SPATIAL | dict.fromkeys((*CHANGES, "noise"), 0.6)


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    """`store_of(dims, **of_plan)`: a store of two channels."""
    made = {}

    def make(dims=3, **of_plan):
        key = (dims, *sorted(of_plan.items()))
        if key not in made:
            root = tmp_path_factory.mktemp("store")
            made[key] = write_tiny_store(root, dims, "zarr", 4, 2, 24, 2, **of_plan)
        return open_store(made[key])

    return make


def patches_of(store, on_device, sampler=None, **options):
    """With the changes that are named, of all there are."""
    several = isinstance(store, list)
    plan = (store[0] if several else store).manifest.plan
    sampler = sampler or sampler_of(store, plan)
    return loader.Patches(
        store, sampler, 0, 200, Augment(**(NOTHING | options)), False, on_device=on_device
    )


def sampler_of(store, plan, batch=4):
    return PatchSampler(
        cases=store.manifest.cases, patch=plan.patch, batch=batch, foreground=0.5, seed=3
    )


def compared(store, batches=6, sampler=None, **options):
    """Largest difference of images in their range, and share of labels that differ."""
    loaders = (
        patches_of(store, False, sampler, **options),
        patches_of(store, True, sampler, **options),
    )
    apart, other, voxels = 0.0, 0, 0
    for number in range(batches):
        places = [(0, 4 * number + k) for k in range(4)]
        ours, theirs = (each.__getitems__(places) for each in loaders)
        assert isinstance(theirs, loader.Boxes) and ours.cases == theirs.cases
        image, label = loader.on_device(theirs, CPU, channels_last=False)
        assert image.dtype == torch.float32 and label.dtype == torch.uint8
        assert image.shape == ours.image.shape and label.shape == ours.label.shape
        spread = ours.image.max() - ours.image.min()
        apart = max(apart, ((image - ours.image).abs().max() / spread).item())
        other, voxels = other + (label != ours.label).sum().item(), voxels + label.numel()
    return apart, other / voxels


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": None, "rot90": True},
        {"rotation": 1, "scale": 1},
        {"rotation": 0.4, "scale": 0.4, "flip": None},
    ],
    ids=["nothing", "flips and turns", "rotation and scale", "some"],
)
def test_geometry_has_the_bits_of_the_loader(store_of, dims, options):
    assert compared(store_of(dims), **options) == (0, 0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "options",
    [SPATIAL, {"elastic": 1}, {"rotation": 1, "scale": 1, "rot90": True, "flip": None}],
    ids=["some", "elastic", "turned"],
)
def test_sums_in_another_order_stay_within_a_hundred_thousandth(store_of, dims, options):
    """Positions are rounded differently where lines are turned or displacements enlarged: by some
    1e-6 voxels, times the steepest step between two of these noisy voxels."""
    apart, other = compared(store_of(dims), batches=12, **options)
    assert 0 < apart < 1e-5
    assert other < 2e-5


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_intensity_is_the_loaders(store_of, dims, name):
    one = compared(store_of(dims), **{name: 1})
    assert one[0] < 2e-6 and one[1] == 0
    alike = compared(store_of(dims), per_channel=False, **{name: 0.5})
    assert alike[0] < 2e-6 and alike[1] == 0


def test_all_changes_together_and_in_the_same_order(store_of):
    apart, other = compared(store_of(), batches=12, **(EVERYTHING | {"noise": 0}))
    assert apart < 1e-5 and other < 2e-5


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float16", 1.0), ("float32", 1.0), ("uint8", 1 / 255), ("int16", 0.01)]
)
def test_images_cross_as_they_are_stored(store_of, dtype, scale):
    store = store_of(dtype=dtype, scale=scale)
    batch = patches_of(store, True, rotation=0.5).__getitems__([(0, 0), (0, 1)])
    assert str(batch.image.dtype) == f"torch.{dtype}" and batch.label.dtype == torch.uint8
    assert compared(store, rotation=0.5, scale=0.5, flip=None) == (0, 0)


def test_stores_of_two_types_cross_as_float32(store_of):
    stores = [store_of(), store_of(dtype="uint8", scale=1 / 255)]
    mixed = MixedSampler(
        parts=tuple(sampler_of(store, store.manifest.plan) for store in stores), weights=(1, 1)
    )
    batch = patches_of(stores, True, mixed).__getitems__([(0, 0), (0, 1)])
    assert batch.image.dtype == torch.float32
    assert compared(stores, sampler=mixed, rotation=0.5) == (0, 0)


@pytest.mark.parametrize("dims", [2, 3])
def test_masked_background_stays_exactly_0(store_of, dims):
    store = store_of(dims, nonzero_mask=True)
    changes = dict.fromkeys((*CHANGES, "noise"), 1)
    plain = patches_of(store, False)
    zeros = 0
    for number in range(4):
        places = [(0, 4 * number + k) for k in range(4)]
        background = (plain.__getitems__(places).image == 0).all(1, keepdim=True)
        image, _ = loader.on_device(
            patches_of(store, True, **changes).__getitems__(places), CPU, False
        )
        assert (image[background.expand_as(image)] == 0).all()
        assert (image[~background.expand_as(image)] != 0).float().mean() > 0.99
        zeros += background.sum().item()
    assert zeros > 1000
    assert compared(store, **(changes | {"noise": 0}))[0] < 1e-5


def test_a_sample_depends_neither_on_the_others_nor_on_what_is_not_read(store_of):
    for dims in (2, 3):
        patches = patches_of(store_of(dims), True, **EVERYTHING)
        for first in (0, 5, 10):
            places = [(0, first + k) for k in range(5)]
            together = patches.__getitems__(places)
            read = sum(room_of(patches, place) for place in places)
            assert len(together.label) > read
            together.image[2 * read :], together.label[read:] = float("nan"), 255
            image, label = loader.on_device(together, CPU, False)
            for k, place in enumerate(places):
                alone = loader.on_device(patches.__getitems__([place]), CPU, False)
                assert torch.equal(alone[0][0], image[k]) and torch.equal(alone[1][0], label[k])


def room_of(patches, place):
    """Voxels that are read for a sample."""
    draw = patches.sampler.draw(0, *place, patches.steps)
    rng = patches._randomness(draw)
    size = device_augment.drawn_sample(patches.augment, rng, draw, patches.sampler.patch, 2).size
    return int(np.prod(size))


def test_batches_have_few_sizes():
    sizes = {device_augment._rounded(count) for count in range(2**20, 2**21)}
    assert len(sizes) == 5 and max(sizes) == 2**21
    assert all(n <= device_augment._rounded(n) <= 1.25 * n for n in range(8, 5000))


def test_workers_and_pinning_change_nothing(store_of, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.dtype) or t)
    patches = patches_of(store_of(), True, **EVERYTHING)
    schedule = loader.Schedule(0, 1, 3, 4, 1, 0, 1)
    alone = list(loader.batches(patches, schedule, 0))
    for one, other in zip(alone, loader.batches(patches, schedule, 1), strict=True):
        (image, label), (image2, label2) = (loader.on_device(b, CPU, False) for b in (one, other))
        assert torch.equal(image, image2) and torch.equal(label, label2)
    assert not pinned and alone[0].pin_memory().cases == alone[0].cases
    assert pinned == [torch.float16, torch.uint8, torch.int64]


def test_batches_go_through_a_pipe_where_shared_memory_is_full(store_of, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory")

    batch = patches_of(store_of(), True, **EVERYTHING).__getitems__([(0, 0), (0, 1)])
    expected = loader.on_device(batch, CPU, False)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    piped = handover.Sender("")(batch)
    assert all(isinstance(a, np.ndarray) for a in (piped.image, piped.label, piped.numbers))
    found = loader.on_device(device_augment.each_tensor(piped, torch.from_numpy), CPU, False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_case_that_cannot_be_read_is_named(tmp_path):
    store = open_store(write_tiny_store(tmp_path, 2, "zarr", 4, 2, 24, 1))
    for path in (tmp_path / "data").iterdir():
        path.rename(path.with_name("elsewhere"))
    failure = patches_of(store, True).__getitems__([(0, 0)])
    assert isinstance(failure, loader.Failure) and failure.user_error
    assert failure.case.startswith("case") and "is missing" in failure.message


def philox(counter, key):
    """Philox 4x32-10 in Python's integers, from its authors' description."""
    (a, b, c, d), (low, high), word = counter, key, 2**32 - 1
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ low, q & word, (p >> 32) ^ d ^ high, p & word
        low, high = (low + 0x9E3779B9) & word, (high + 0xBB67AE85) & word
    return [a, b, c, d]


def test_words_are_those_of_philox():
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    known = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # Random123's kat_vectors
    assert philox(*pi) == known
    keys = [0, 1, 2**32 + 7, 2**63 - 1]
    found = torch.stack(normals.philox(torch.tensor(keys), 1000), -1)
    assert found[0, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for row, key in zip(found, keys, strict=True):
        for count in (0, 1, 2, 500, 999):
            expected = philox((count, 0, 0, 0), (key & (2**32 - 1), key >> 32))
            assert row[count].tolist() == expected


def test_noise_is_normal_and_independent_from_sample_to_sample():
    keys = torch.tensor([1, 2, 2**62 + 1, 2**63 - 1, 5])
    found = normals.normals(keys, 400_001)
    assert found.shape == (5, 400_001) and found.isfinite().all()
    assert found.mean(1).abs().max() < 0.008 and (found.std(1) - 1).abs().max() < 0.005
    for row in found:
        assert stats.kstest(row[:50_000].numpy(), "norm").pvalue > 1e-3
    between = torch.corrcoef(found) - torch.eye(5)
    assert between.abs().max() < 0.008
    for lag in (1, 2, 3, 4, 64, 4096):  # within a sample
        assert (found[:, lag:] * found[:, :-lag]).mean(1).abs().max() < 0.008
    assert torch.equal(normals.normals(keys[2:3], 1001)[0], found[2, :1001])


def test_noise_has_the_deviation_that_was_drawn(store_of):
    patches = patches_of(store_of(), True, noise=0.5)
    clean = patches_of(store_of(), True)
    for number in range(4):
        places = [(0, 4 * number + k) for k in range(4)]
        noisy, before = (
            loader.on_device(p.__getitems__(places), CPU, False)[0] for p in (patches, clean)
        )
        again = loader.on_device(patches.__getitems__(places), CPU, False)[0]
        assert torch.equal(noisy, again)
        for k, place in enumerate(places):
            draw = patches.sampler.draw(0, *place, patches.steps)
            sample = device_augment.drawn_sample(
                patches.augment, patches._randomness(draw), draw, patches.sampler.patch, 2
            )
            sigma = sample.drawn.get("noise", (0.0, 0))[0]
            assert (noisy[k] - before[k]).std().item() == pytest.approx(sigma, rel=0.05, abs=1e-7)


def test_auto_is_the_gpu_that_trains_and_no_part_of_a_run(tiny_store):
    store = open_store(tiny_store(dims=2))
    document = {
        "name": "tiny",
        "data": {"store": str(store.root), "batch": 2, "patch": [16, 16]},
        "model": {"name": "unet_lite_standard"},
        "stages": [{"epochs": 1, "lr": 0.01}],
    }

    def recipe(augment):
        return parse(document | {"data": document["data"] | {"augment": augment}})

    auto, plain, none = recipe({"device": "auto"}), recipe({}), recipe(None)
    cuda = torch.device("cuda", 0)
    assert augments_on_device(auto, cuda) and not augments_on_device(auto, CPU)
    assert not augments_on_device(plain, cuda) and not augments_on_device(none, cuda)
    facts = identity.stage_facts(plain, store.manifest, 0)["data"]["augment"]
    assert facts == {k: v for k, v in Augment().model_dump(mode="json").items() if k != "device"}
    assert identity.stage_uids(auto, store.manifest) == identity.stage_uids(plain, store.manifest)
    assert identity.stage_uids(none, store.manifest) != identity.stage_uids(plain, store.manifest)


def test_patches_without_augmentation_are_left_to_nobody(store_of):
    store = store_of()
    made = loader.Patches(
        store, sampler_of(store, store.manifest.plan), 0, 200, None, False, on_device=True
    )
    batch = made.__getitems__([(0, 0)])
    assert isinstance(batch, loader.Batch)
    assert replace(batch, cases=()).image.dtype == torch.float32
