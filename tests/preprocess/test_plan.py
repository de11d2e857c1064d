"""Planning: spacing, patch, normalisation. Expected values are nnU-Net's rules worked out by
hand."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from segfleet.core.errors import InputError
from segfleet.core.machine import cpus, memory_budget
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.planning.fingerprint import (
    Fingerprint,
    fingerprint,
    samples_per_case,
    summary,
)
from segfleet.preprocess.planning.plan import (
    Overrides,
    feature_maps,
    make_plan,
    normalisation,
    plan_patch,
    poolings,
    target_spacing,
)
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.manifest import Dataset
from segfleet.preprocess.transforms.case_transforms import stored_grid

FACTS = {
    "mean": 100.0,
    "std": 20.0,
    "median": 99.0,
    "min": -50.0,
    "max": 300.0,
    "percentile_00_5": -17.0,
    "percentile_99_5": 201.0,
}


def dataset(channels=("MRI",), dims=3) -> Dataset:
    return Dataset(
        name="d", reader="msd", dims=dims, channels=channels, labels={"background": 0, "a": 1}
    )


def prints(shapes, spacings, kept=1.0, dtypes=("int16",), channels=1) -> Fingerprint:
    return Fingerprint(
        shapes=shapes,
        spacings=spacings,
        intensity=(FACTS,) * channels,
        kept=kept,
        dtypes=dtypes,
        cases_with={1: 1},
        orientations={},
    )


def test_the_target_is_the_median_spacing():
    spacings = [(1.0, 0.8, 0.8), (2.0, 0.7, 0.7), (3.0, 0.9, 0.9)]
    assert target_spacing(spacings, [(100, 300, 300)] * 3) == (2.0, 0.8, 0.8)


def test_a_far_coarser_axis_with_few_slices_takes_its_tenth_percentile():
    # median 5, tenth percentile 1.8
    spacings = [(float(s), 0.8, 0.8) for s in np.linspace(1, 9, 9)]
    assert target_spacing(spacings, [(50, 512, 512)] * 9) == (1.8, 0.8, 0.8)
    assert target_spacing(spacings, [(200, 512, 512)] * 9) == (5.0, 0.8, 0.8), (
        "many slices: the median stays"
    )
    fine = [(float(s), 0.8, 0.8) for s in (0.5, 0.5, 0.5, 5, 5, 5, 5)]
    assert target_spacing(fine, [(50, 512, 512)] * 7) == (0.80001, 0.8, 0.8), (
        "not finer than the other axes, and still the slice axis"
    )


def test_far_coarser_is_more_than_three_times_and_few_slices_fewer_than_a_third():
    """nnU-Net's two strict comparisons, at their borders."""
    steps = [float(s) for s in np.linspace(1, 9, 9)]  # median 5, tenth percentile 1.8
    twice = [(s, 2.5, 2.5) for s in steps]
    assert target_spacing(twice, [(50, 512, 512)] * 9) == (5.0, 2.5, 2.5)
    thrice = [(s - 2, 1.0, 1.0) for s in steps]
    assert target_spacing(thrice, [(50, 512, 512)] * 9) == (3.0, 1.0, 1.0)
    far = [(s, 0.8, 0.8) for s in steps]
    assert target_spacing(far, [(40, 120, 130)] * 9) == (5.0, 0.8, 0.8)
    assert target_spacing(far, [(39, 120, 130)] * 9) == (1.8, 0.8, 0.8)


@pytest.mark.parametrize(
    ("patch", "spacing", "expected"),
    [
        ((128, 128, 128), (1, 1, 1), [5, 5, 5]),
        # ACDC: z joins when its spacing is within a factor 2
        (
            (20, 256, 224),
            (5.0, 1.56, 1.56),
            [2, 5, 5],
        ),
        ((40, 56, 40), (1, 1, 1), [3, 3, 3]),  # 40 20 10 5
        ((7, 7, 7), (1, 1, 1), [0, 0, 0]),
        ((4, 11, 4), (1, 1, 1), [0, 0, 0]),  # a single axis needs 12
        ((4, 12, 4), (1, 1, 1), [0, 1, 0]),
        ((512, 512), (1, 1), [7, 7]),
    ],
)
def test_poolings(patch, spacing, expected):
    assert poolings(patch, spacing) == expected


def test_the_memory_that_nothing_was_said_of_is_nnu_nets_eight_gigabytes():
    for median in ((120, 260, 240), (200, 200, 200), (60, 300, 310), (150, 180, 90)):
        assert plan_patch(median, (1, 1, 1), 3, 3) == plan_patch(
            median, (1, 1, 1), 3, 3, memory_gb=8.0
        )


def test_what_a_user_may_ask_for():
    """The borders of what is legal, and that what is said reaches the plan."""
    Overrides(slices=True, patch=(1, 64, 64)).check(dataset())
    with pytest.raises(InputError, match="expected one slice"):
        Overrides(slices=True, patch=(2, 64, 64)).check(dataset())
    Overrides(spacing=(100.0, 0.01, 1.0)).check(dataset())
    for wrong in ((100.5, 1.0, 1.0), (1.0, 0.009, 1.0)):
        with pytest.raises(InputError, match="spacing: .* from 0.01 to 100"):
            Overrides(spacing=wrong).check(dataset())
    flat = prints([(1, 60, 80)] * 3, [(1.0, 0.5, 0.25)] * 3)
    plan = make_plan(dataset(dims=2), flat, overrides=Overrides(spacing=(2.0, 3.0)))
    assert plan.target_spacing == (1.0, 2.0, 3.0)


def test_hippocampus_gets_the_published_patch():
    assert plan_patch((36, 50, 35), (1.0, 1.0, 1.0), 3, 3) == (40, 56, 40)


def test_brain_tumour_gets_the_published_patch():
    assert plan_patch((138, 169, 138), (1.0, 1.0, 1.0), 3, 4) == (128, 128, 128)


@pytest.mark.parametrize("memory", [4.0, 8.0, 24.0])
@pytest.mark.parametrize(
    ("median", "spacing", "dims"),
    [
        ((482, 512, 512), (1.0, 0.77, 0.77), 3),
        ((149, 375, 375), (1.5, 0.8, 0.8), 3),
        ((18, 237, 208), (5.0, 1.56, 1.56), 3),
        ((1, 1024, 1024), (1.0, 1.0, 1.0), 2),
        ((1, 700, 2300), (1.0, 1.0, 1.0), 2),
        ((1, 256, 256), (1.0, 1.0, 1.0), 2),
    ],
)
def test_a_patch_fits_the_memory_the_case_and_the_poolings(median, spacing, dims, memory):
    patch = plan_patch(median, spacing, dims, 3, memory)
    inner, step = patch[3 - dims :], spacing[3 - dims :]
    # two patches where a batch of two in 3D, of twelve in 2D fills 8 GB
    most = (5.6e8 if dims == 3 else 8.5e7 * 6) * memory / 8
    assert feature_maps(inner, step, dims, 3) <= most
    pools = poolings(inner, step)
    assert all(n % 2**p == 0 for n, p in zip(inner, pools, strict=True))
    assert all(n < m + 2**p for n, m, p in zip(inner, median[3 - dims :], pools, strict=True))
    assert patch[0] == 1 or dims == 3
    if memory > 4:
        assert np.prod(patch) >= np.prod(plan_patch(median, spacing, dims, 3, memory / 2))


def test_channel_names_choose_the_normalisation():
    names = ("CT", "ct", "PET", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "R")
    assert normalisation(dataset(names)) == (
        "ct",
        "ct",
        "zscore",
        "none",
        "rescale_to_0_1",
        "rgb_to_0_1",
        "zscore",
    )
    assert normalisation(dataset(("R", "G", "blue"), dims=2)) == ("rgb_to_0_1",) * 3


def test_colour_images_are_stored_as_they_are():
    colours = dataset(("R", "G", "B"), dims=2)
    plan = make_plan(
        colours, prints([(1, 256, 320)] * 3, [(1.0, 1.0, 1.0)] * 3, dtypes=("uint8",), channels=3)
    )
    assert (plan.dtype, plan.scale, plan.patch) == ("uint8", 1 / 255, (1, 256, 320))
    mixed = make_plan(
        colours,
        prints([(1, 256, 320)] * 3, [(1.0, 1.0, 1.0)] * 3, dtypes=("uint16", "uint8"), channels=3),
    )
    assert (mixed.dtype, mixed.scale) == ("float16", 1.0)
    resampled = make_plan(
        colours,
        prints(
            [(1, 256, 320)] * 3,
            [(1.0, 1.0, 1.0)] * 2 + [(1.0, 2.0, 2.0)],
            dtypes=("uint8",),
            channels=3,
        ),
    )
    assert resampled.dtype == "float16"


def test_the_mask_counts_where_cropping_took_more_than_a_quarter():
    shapes, spacings = [(40, 40, 40)], [(1.0, 1.0, 1.0)]
    assert make_plan(dataset(), prints(shapes, spacings, kept=0.5)).nonzero_mask
    assert not make_plan(dataset(), prints(shapes, spacings, kept=0.75)).nonzero_mask
    assert not make_plan(dataset(("CT",)), prints(shapes, spacings, kept=0.5)).nonzero_mask


def test_the_anisotropic_axis_and_the_storage_type():
    plan = make_plan(dataset(), prints([(20, 256, 256)], [(10.0, 1.5, 1.5)]))
    assert plan.anisotropic_axis == 0 and plan.dtype == "float16"
    assert (
        make_plan(dataset(), prints([(20, 256, 256)], [(3.0, 1.5, 1.5)])).anisotropic_axis is None
    )
    # float16 holds every integer up to 2048
    for most, kind in ((9000.0, "float32"), (2049.0, "float32"), (2048.0, "float16")):
        wide = Fingerprint.model_validate(
            {
                **prints([(9, 9, 9)], [(1.0, 1.0, 1.0)]).model_dump(),
                "intensity": ({**FACTS, "max": most},),
            }
        )
        assert make_plan(dataset(("noNorm",)), wide).dtype == kind


def test_a_fingerprint_is_measured_and_survives_json(shared_data):
    found = survey(open_reader("msd", shared_data("Task01_BrainTumour")), workers=1)
    prints = fingerprint(found.dataset, found.facts)
    assert (
        prints.cases_with == {1: 2, 2: 2, 3: 2}
        and prints.orientations == {"RAS": 2}
        and len(prints.intensity) == 4
    )
    reader = open_reader("msd", shared_data("Task01_BrainTumour"))
    case = reader.read(reader.refs()[0])
    exact = case.image_CZYX[1][case.label_ZYX > 0]
    sampled = fingerprint(found.dataset, found.facts[:1]).intensity[1]
    assert sampled["median"] == pytest.approx(np.median(exact), rel=0.02)
    assert sampled["percentile_99_5"] == pytest.approx(np.percentile(exact, 99.5), rel=0.02)
    again = Fingerprint.model_validate(json.loads(json.dumps(prints.model_dump(mode="json"))))
    assert again == prints and make_plan(found.dataset, again) == make_plan(found.dataset, prints)


def test_summary_and_samples():
    facts = summary(np.arange(201.0))
    assert (
        facts["mean"],
        facts["median"],
        facts["min"],
        facts["max"],
        facts["percentile_00_5"],
    ) == (100, 100, 0, 200, 1)
    assert [samples_per_case(n) for n in (1, 200, 10**6)] == [50_000, 10_000, 20]


def test_memory_and_cores_come_from_the_tightest_limit(tmp_path, monkeypatch):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    gib = 2**30
    write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {64 * 2**20} kB\n")
    assert memory_budget({}, tmp_path) == int(0.8 * 64 * gib)
    assert memory_budget({"SLURM_MEM_PER_NODE": "16384"}, tmp_path) == int(0.8 * 16 * gib)
    assert memory_budget({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "4"}, tmp_path) == int(
        0.8 * 8 * gib
    )
    write("proc/self/cgroup", "0::/job/step\n")
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    write("sys/fs/cgroup/job/memory.max", f"{10 * gib}\n")
    write("sys/fs/cgroup/job/memory.current", f"{4 * gib}\n")
    write("sys/fs/cgroup/job/memory.stat", f"anon 1\ninactive_file {gib}\n")
    write("sys/fs/cgroup/job/cpu.max", "200000 100000\n")
    assert memory_budget({}, tmp_path) == int(0.8 * 7 * gib)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert cpus({}, tmp_path) == 2 and cpus({"SLURM_CPUS_PER_TASK": "1"}, tmp_path) == 1
    assert cpus({"SLURM_CPUS_PER_TASK": "8"}, tmp_path) == 2
    write("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n")
    write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{3 * gib}")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    assert memory_budget({}, tmp_path) == int(0.8 * 3 * gib)
    assert cpus({}, tmp_path) == 64
    write("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "300000\n")
    write("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n")
    assert cpus({}, tmp_path) == 3


def test_the_coarsest_axis_comes_first():
    """A sagittal and a coronal stack are planned as the axial one is."""
    axial = make_plan(dataset(), prints([(20, 320, 300)] * 9, [(6.0, 1.0, 1.1)] * 9))
    assert axial.transpose == (0, 1, 2)
    for axes in ((1, 0, 2), (2, 0, 1)):
        raw = {axis: place for place, axis in enumerate(axes)}
        shape, spacing = (
            tuple(v[raw[a]] for a in range(3)) for v in ((20, 320, 300), (6.0, 1.0, 1.1))
        )
        plan = make_plan(dataset(), prints([shape] * 9, [spacing] * 9))
        assert plan.transpose == axes
        assert plan.model_copy(update={"transpose": (0, 1, 2)}) == axial


def test_batches_fill_the_memory_but_not_a_twentieth_of_the_data():
    """nnU-Net's published plans: 12 x 512 x 512 for LiTS in 2D; 4 for ACDC in 3D."""
    lits = make_plan(
        dataset(("CT",)), prints([(432, 512, 512)] * 131, [(1.0, 0.7676, 0.7676)] * 131)
    )
    assert (lits.patch_2d, lits.batch_2d, lits.batch) == ((1, 512, 512), 12, 2)
    acdc = make_plan(dataset(), prints([(9, 256, 216)] * 200, [(10.0, 1.5625, 1.5625)] * 200))
    assert acdc.batch >= 4 and acdc.patch_2d == (1, 256, 224)
    few = make_plan(dataset(), prints([(20, 20, 20)], [(1.0, 1.0, 1.0)]))
    assert few.batch == 2


def test_slices_for_2d_networks_are_never_resampled_across():
    plan = make_plan(
        dataset(),
        prints([(50, 320, 320)] * 9, [(3.0, 0.7, 0.7)] * 5 + [(5.0, 0.9, 0.9)] * 4),
        overrides=Overrides(slices=True),
    )
    assert plan.target_spacing == (0.0, 0.7, 0.7) and plan.patch == plan.patch_2d
    assert stored_grid((40, 100, 100), (5.0, 1.4, 1.4), plan) == ((40, 200, 200), (5.0, 0.7, 0.7))
    with pytest.raises(InputError, match="slices"):
        make_plan(
            dataset(dims=2), prints([(1, 9, 9)], [(1.0,) * 3]), overrides=Overrides(slices=True)
        )
