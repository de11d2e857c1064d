"""What `segfleet plan` chooses, worked out by hand for a machine whose speed is known."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.planning import choices, cpu, gpu, target, timing
from segfleet.pipeline.planning.target import Device
from segfleet.pipeline.planning.timing import Measured
from segfleet.preprocess.stores.manifest import Manifest, load_manifest

CPU = Device(kind="cpu", memory_gb=4.0, here=True, name="2 CPU core(s)")


@pytest.fixture
def volumes(tiny_store) -> Manifest:
    """Six volumes of 120 x 260 x 240 voxels."""
    return of_size(load_manifest(tiny_store(dims=3)), (120, 260, 240))


@pytest.fixture
def pictures(tiny_store) -> Manifest:
    return of_size(load_manifest(tiny_store(dims=2)), (1, 300, 200))


def of_size(manifest: Manifest, shape: tuple[int, int, int]) -> Manifest:
    cases = tuple(case.model_copy(update={"shape": shape}) for case in manifest.cases)
    return manifest.model_copy(update={"cases": cases})


@pytest.fixture
def measured(monkeypatch):
    """(patch, batch, precision, enough) of every measurement; `speed` seconds a megavoxel, half of
    them in bf16, and a gigabyte a megavoxel."""
    asked = []

    def at(speed: float, half: float = 0.5, **more):
        def measure(recipe, manifest, device, steps, enough=math.inf):
            precision, patch = recipe.engine.precision, tuple(recipe.data.patch)
            asked.append((patch, recipe.data.batch, precision, enough))
            voxels = math.prod(patch) * recipe.data.batch / 1e6
            share = half if precision == "bf16" else 1.0
            return Measured(**{"seconds": speed * voxels * share, "gigabytes": voxels, **more})

        monkeypatch.setattr(timing, "measure", measure)
        return asked

    return at


def test_a_cpu_gets_the_largest_patch_that_is_fast_enough(volumes, measured, tmp_path):
    """An hour: 70 % of it for 2500 steps are 1.008 s a step. 2 s a megavoxel: four patches of
    32 x 64 x 64 take 1.049 s, of 28 x 56 x 48 0.602 s, in bf16 0.301 s: 8370 steps, 139 epochs of
    60. Such a patch sees 1.0051 % of a case, a 24.87th of a quarter: 2.919 times as wide."""
    asked = measured(2.0)
    planned = cpu.for_cpu(volumes, tmp_path, CPU, 3600.0, 1)
    assert asked == [
        ((80, 192, 160), 4, "fp32", pytest.approx(4.032)),
        ((32, 64, 64), 4, "fp32", pytest.approx(4.032)),
        ((28, 56, 48), 4, "fp32", pytest.approx(4.032)),
        ((28, 56, 48), 4, "bf16", pytest.approx(4 * 0.602112)),
    ]
    stage = {"steps": 60, "lr": 0.001, "schedule": "constant", "warmup": 50}
    wide = {"augment": {"scale": 1.0, "scale_range": [2.481, 3.357]}}
    assert planned.document == {
        "name": "auto_tiny",
        "seed": 0,
        "data": {"store": str(tmp_path), "split": "kfold", "fold": 0, "patch": [28, 56, 48],
                 "batch": 4, "foreground": 1 / 3, "augment": {}, "workers": "auto"},
        "model": {
            "name": "plain_unet_3d",
            "options": {"features": [16, 32, 64, 128], "deep_supervision": False},
        },
        "loss": {"name": "auto"},
        "optimizer": {"name": "adamw", "weight_decay": 0.01},
        "stages": [
            {"name": "low_resolution", "epochs": 46, "data": wide, **stage},
            {"name": "train", "epochs": 93, **stage},
        ],
        "engine": {"precision": "bf16", "channels_last": "auto", "ema": 0.998},
        "evaluation": {"overlap": 0.5, "mirror": []},
    }  # fmt: skip
    assert planned.notes[-1] == "A step held 0.3 GB here."
    assert planned.recipe().data.patch == (28, 56, 48)


@pytest.mark.parametrize(
    ("seconds", "steps", "epochs", "warmup", "ema"),
    [
        (10.0, 10, 2, 1, 0.99),  # 2 steps, and 20 are the fewest
        (1000.0, 23, 10, 11, 0.99),  # 233.3: a tenth of them, a twentieth
        (4290.0, 60, 16, 50, 0.998),  # 1001
        (4285.0, 60, 16, 49, 0.99),  # 999.8
    ],
)
def test_steps_of_a_budget(pictures, measured, tmp_path, seconds, steps, epochs, warmup, ema):
    """Steps of 3 s, whatever the patch."""
    measured(0.0, seconds=3.0)
    planned = cpu.for_cpu(pictures, tmp_path, CPU, seconds, 1)
    (stage,) = planned.document["stages"]
    assert (stage["steps"], stage["epochs"], stage["warmup"]) == (steps, epochs, warmup)
    assert planned.document["engine"]["ema"] == ema
    assert planned.document["engine"]["precision"] == "fp32"  # bf16 is not faster here
    assert any("steps only, and 2500 are usual" in note for note in planned.notes)


def test_bf16_has_to_be_a_tenth_faster(pictures, measured, tmp_path):
    for half, precision in ((0.91, "fp32"), (0.9, "fp32"), (0.89, "bf16")):
        measured(1.0, half)
        planned = cpu.for_cpu(pictures, tmp_path, CPU, 36000.0, 1)
        assert planned.document["engine"]["precision"] == precision
        said = {"fp32": "bf16 was not faster here.", "bf16": "bf16 was the faster here."}
        assert planned.reasons["engine.precision"] == said[precision]
    assert not any("are usual" in note for note in planned.notes)


def test_pictures_on_a_cpu(pictures, volumes, measured, tmp_path):
    """Five stages and eight of them at once, though no more than there are to train on; of volumes
    four."""
    measured(0.001)
    few = cpu.for_cpu(pictures, tmp_path, CPU, 3600.0, 1).document
    assert few["data"]["batch"] == len(pictures.fold("kfold", 0)["train"]) < 8
    ids = tuple(f"c{n}" for n in range(20))
    many = pictures.model_copy(update={"splits": {"kfold": ({"train": ids, "val": ids[:1]},)}})
    document = cpu.for_cpu(many, tmp_path, CPU, 3600.0, 1).document
    assert document["data"]["batch"] == 8 and document["model"]["name"] == "plain_unet_2d"
    assert document["model"]["options"]["features"] == [16, 32, 64, 128, 256]
    assert len(document["data"]["patch"]) == 2
    deep = volumes.model_copy(update={"splits": many.splits})
    assert cpu.for_cpu(deep, tmp_path, CPU, 3600.0, 1).document["data"]["batch"] == 4
    one = pictures.model_copy(update={"splits": {"kfold": ({"train": ids[:1], "val": ids[1:]},)}})
    assert cpu.for_cpu(one, tmp_path, CPU, 3600.0, 1).document["data"]["batch"] == 2


def test_four_fifths_of_the_memory_are_for_a_step(volumes, measured, tmp_path):
    """Of 4 GB: 3.2. A batch of 64 x 128 x 128 holds 4.2 of these gigabytes, of
    56 x 112 x 96 2.4."""
    measured(1e-6)
    first = cpu.for_cpu(volumes, tmp_path, CPU, 3600.0, 1).document["data"]["patch"]
    assert first == [56, 112, 96]
    for gigabytes, fits in ((3.19, True), (3.21, False), (None, True)):
        measured(0.0, gigabytes=gigabytes, seconds=0.01)
        patch = cpu.for_cpu(volumes, tmp_path, CPU, 3600.0, 1).document["data"]["patch"]
        assert (patch == [80, 192, 160]) == fits


def test_a_busy_machine_is_said(pictures, measured, tmp_path):
    measured(1.0, clock=8.0)
    notes = cpu.for_cpu(pictures, tmp_path, CPU, 3600.0, 1).notes
    assert any("a step took 8 s by the clock" in note for note in notes)
    measured(1.0)
    assert not any("busy" in n for n in cpu.for_cpu(pictures, tmp_path, CPU, 3600.0, 1).notes)


def test_no_patch_at_all_is_one_message(volumes, monkeypatch, tmp_path):
    def measure(*_):
        raise ValueError("too small")

    monkeypatch.setattr(timing, "measure", measure)
    with pytest.raises(InputError, match="no patch of tiny is large enough for a network"):
        cpu.for_cpu(volumes, tmp_path, CPU, 3600.0, 1)


@pytest.mark.parametrize(
    ("memory", "model", "patch", "epochs"),
    [
        # 8 GB to plan for: at most one step of 0.35 s, and 60480 s hold 691 x 250 of them
        (10.0, "plain_unet_3d", [80, 192, 160], 691),
        # 64 GB hold eight, the batch is 4 times nnU-Net's voxels: 1.4 s, 172 x 250
        (80.0, "resenc_unet_3d", [128, 256, 256], 172),
        (20.0, "resenc_unet_3d", None, None),
        (19.9, "plain_unet_3d", None, None),
    ],
)
def test_a_gpu_elsewhere(volumes, tmp_path, memory, model, patch, epochs):
    device = Device(kind="cuda", memory_gb=memory, here=False, name="x")
    planned = gpu.for_gpu(volumes, tmp_path, device, 86400.0, 1)
    document = planned.document
    assert (document["model"], document["data"]["batch"]) == ({"name": model, "options": {}}, 2)
    if epochs is None:
        return
    assert document["data"]["patch"] == patch
    assert document["stages"] == [
        {"name": "train", "epochs": epochs, "steps": 250, "lr": 0.01, "schedule": "poly",
         "power": 0.9}
    ]  # fmt: skip
    sgd = {"name": "sgd", "weight_decay": 3e-5, "momentum": 0.99, "nesterov": True}
    assert document["optimizer"] == sgd and document["loss"] == {"name": "auto"}
    assert document["engine"] == {"precision": "bf16", "channels_last": "auto"}
    mirrored = {"overlap": 0.5, "mirror": [0, 1, 2], "average": "logits"}
    assert document["evaluation"] == mirrored
    steps, hours = {691: ("172750 steps, 0.35 s", "16.8 h"), 172: ("43000 steps, 1.4 s", "16.7 h")}[
        epochs
    ]
    said = planned.reasons["stages.0.epochs"]
    assert said.startswith(f"{steps} a step, assumed") and f"{hours} of 1 d" in said
    assert planned.recipe()


def test_pictures_on_a_gpu_elsewhere(pictures, tmp_path):
    """Six pictures are little: 0.05 s a step at least, 1000 epochs at most."""
    device = Device(kind="cuda", memory_gb=10.0, here=False, name="x")
    day = gpu.for_gpu(pictures, tmp_path, device, 86400.0, 1).document
    assert day["stages"][0]["epochs"] == 1000 and day["evaluation"]["mirror"] == [1, 2]
    hour = gpu.for_gpu(pictures, tmp_path, device, 3600.0, 1).document
    assert hour["stages"][0]["epochs"] == 201  # 2520 s of 12.5 s an epoch
    second = gpu.for_gpu(pictures, tmp_path, device, 1.0, 1).document
    assert second["stages"][0]["epochs"] == 1


@pytest.mark.parametrize(
    ("gigabytes", "batch", "epochs"),
    [
        # four fifths of 10 GB hold two patches of 3 GB, five of 1.6 and four of 1.7; two at least
        (3.0, 2, 120),
        (1.6, 5, 48),
        (1.7, 4, 60),
        (9.0, 2, 120),
    ],
)
def test_a_gpu_here_is_asked_what_it_holds(
    volumes, monkeypatch, tmp_path, gigabytes, batch, epochs
):
    """A second a patch: 60480 s hold 120 x 250 steps of two."""
    monkeypatch.setattr(gpu, "network_plan", lambda *_: ((64, 64, 64), 5))
    asked = []

    def measure(recipe, manifest, device, steps):
        asked.append((recipe.data.batch, device.type, steps))
        held = gigabytes * recipe.data.batch
        return Measured(seconds=1.0 * recipe.data.batch, gigabytes=held)

    monkeypatch.setattr(timing, "measure", measure)
    device = Device(kind="cuda", memory_gb=10.0, here=True, name="x")
    planned = gpu.for_gpu(volumes, tmp_path, device, 86400.0, 7)
    assert planned.document["data"]["batch"] == batch
    assert asked == [(n, "cuda", 7) for n in range(5, batch - 1, -1)]
    assert sum(stage["epochs"] for stage in planned.document["stages"]) == epochs
    assert f"A step held {gigabytes * batch:.3g} GB here." in planned.reasons["data.batch"]
    assert "measured here" in planned.reasons["stages.0.epochs"]


def test_two_dimensions_or_three(volumes, pictures):
    assert choices.dims_of(pictures)[0] == 2 and choices.dims_of(volumes)[0] == 3
    for depth, dims in ((1, 2), (2, 3)):
        plan = volumes.plan.model_copy(update={"patch": (depth, 64, 64)})
        assert choices.dims_of(volumes.model_copy(update={"plan": plan}))[0] == dims


def test_the_median_case_is_the_median_of_each_axis(volumes):
    shapes = [(9, 1, 5), (3, 2, 5), (4, 30, 6)]
    cases = tuple(
        case.model_copy(update={"shape": shape})
        for case, shape in zip(volumes.cases, shapes, strict=False)
    )
    assert choices.median_case(volumes.model_copy(update={"cases": cases})) == (4, 2, 5)


def test_a_split_of_the_data_set_is_taken_where_there_are_no_folds(volumes, tmp_path):
    day = 86400.0
    assert choices.base(volumes, tmp_path, day, CPU)[0]["data"]["split"] == "kfold"
    own = volumes.model_copy(update={"splits": {"theirs": ({"train": ("a",), "val": ("b",)},)}})
    document, reasons = choices.base(own, tmp_path, day, CPU)
    assert document["data"]["split"] == "theirs" and reasons["data.split"].startswith("1 fold(s)")
    name = own.dataset.model_copy(update={"name": "My set: 3"})
    named = choices.base(own.model_copy(update={"dataset": name}), tmp_path, day, CPU)[0]
    assert named["name"] == "auto_my_set__3"


def test_a_low_resolution_is_worth_it_where_it_halves_the_voxels(volumes):
    """7,488,000 voxels: of a patch of 936,000 an eighth is seen, and a quarter is twice that."""
    stage = {"name": "train", "epochs": 3, "steps": 1, "lr": 1}

    def stages(patch, epochs=3):
        document = {"stages": [{**stage, "epochs": epochs}]}
        choices.low_first(document, {"stages.0.epochs": "."}, volumes, patch)
        return [one["epochs"] for one in document["stages"]]

    assert stages((120, 120, 65)) == [1, 2] == stages((120, 120, 65), 3)
    assert stages((120, 120, 66)) == [3] and stages((1, 64, 64)) == [3]
    assert stages((64, 64, 64), 2) == [2] and stages((64, 64, 64), 100) == [33, 67]


def test_a_flat_field_of_view_is_widened_within_its_slices(volumes):
    """Slices six times as thick as their pixels: two axes, not three."""
    plan = volumes.plan.model_copy(update={"target_spacing": (6.0, 1.0, 1.0)})
    document = {"stages": [{"name": "train", "epochs": 30, "steps": 1, "lr": 1}]}
    manifest = volumes.model_copy(update={"plan": plan})
    choices.low_first(document, {"stages.0.epochs": "."}, manifest, (16, 64, 64))
    low, high = document["stages"][0]["data"]["augment"]["scale_range"]
    factor = math.sqrt(0.25 * 120 * 260 * 240 / (16 * 64 * 64))
    assert (low, high) == (round(0.85 * factor, 3), round(1.15 * factor, 3))


def test_times_and_budgets():
    words = {59: "59 s", 60: "1 min", 90: "1.5 min", 3600: "1 h", 86399: "24 h", 86400: "1 d"}
    assert {seconds: target.in_words(seconds) for seconds in words} == words
    for text in ("0h", "5", "h", "1.h", "-1h", "1 week", "1e3s"):
        with pytest.raises(InputError, match="budget: found"):
            target.parse_budget(text)


def test_pictures_of_one_size_are_planned_whole(pictures):
    """Where the memory is that of nnU-Net's planner or more."""
    plan = pictures.plan.model_copy(update={"size": (1, 96, 80), "target_spacing": (0, 0, 0)})
    manifest = pictures.model_copy(update={"plan": plan})
    assert choices.network_plan(manifest, 2, 8.0)[0] == (1, 96, 80)
    small = choices.network_plan(manifest, 2, 7.9)[0]
    assert small != (1, 96, 80)
    ones = plan.model_copy(update={"target_spacing": (1, 1, 1)})  # pixels without a size
    assert choices.network_plan(manifest.model_copy(update={"plan": ones}), 2, 7.9)[0] == small


@pytest.mark.parametrize(
    ("clock", "computing", "said"),
    [(3.2, 4.0, (3.2, None)), (3.21, 4.0, (2.0, 3.21)), (2.0, 4.0, (2.0, None))],
)
def test_a_step_of_a_busy_machine_is_what_it_computes(
    pictures, measured, monkeypatch, tmp_path, clock, computing, said
):
    """Two threads: 4 s of computing are 2 s, and more than 1.6 times as long by the clock is busy.
    A step is a whole one: forwards, backwards, and the weights move."""
    measured(1.0)
    recipe = cpu.for_cpu(pictures, tmp_path, CPU, 3600.0, 1).recipe()
    monkeypatch.undo()
    ticks = {
        "perf_counter": itertools.count(0, clock),
        "process_time": itertools.count(0, computing),
    }
    for name, count in ticks.items():
        monkeypatch.setattr(timing.time, name, lambda count=count: float(next(count)))
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 2)
    moved = []

    class Noted(torch.optim.AdamW):
        def step(self):
            before = [p.clone() for group in self.param_groups for p in group["params"]]
            assert all(p.grad is not None for group in self.param_groups for p in group["params"])
            super().step()
            after = [p for group in self.param_groups for p in group["params"]]
            moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    monkeypatch.setattr(timing.torch.optim, "AdamW", Noted)
    found = timing.measure(recipe, pictures, torch.device("cpu"), 2)
    seconds, by_clock = said
    assert found.seconds == pytest.approx(seconds)
    assert found.clock == (by_clock and pytest.approx(by_clock))
    assert moved == [True] * 3 and not found.rough


def test_of_several_steps_the_fastest_counts_and_the_most_memory(
    pictures, measured, monkeypatch, tmp_path
):
    """Steps of 10 s (the warm-up, of just what is enough), 3 s and 2 s; at most 2.5 GB, of which
    1 GB was there before."""
    measured(1.0)
    recipe = cpu.for_cpu(pictures, tmp_path, CPU, 3600.0, 1).recipe()
    monkeypatch.undo()
    for name, times in (("perf_counter", (0, 10, 10, 13, 13, 15)),
                        ("process_time", (0, 20, 20, 26, 26, 30))):  # fmt: skip
        monkeypatch.setattr(timing.time, name, iter(map(float, times)).__next__)
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 2)
    held = iter([1.0e9, 2.0e9, 2.5e9, 1.2e9])
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(held)))
    monkeypatch.setattr("psutil.Process", lambda: process)
    monkeypatch.delattr(timing.torch.cuda, "max_memory_allocated")  # nobody asks a GPU
    found = timing.measure(recipe, pictures, torch.device("cpu"), 2, enough=10.0)
    assert (found.seconds, found.gigabytes, found.rough) == (2.0, 1.5, False)


def test_a_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(target.torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=80e9, name="A card")
    monkeypatch.setattr(target.torch.cuda, "get_device_properties", {0: card}.__getitem__)
    monkeypatch.delenv("SEGFLEET_DEVICE", raising=False)
    for text in (None, "cuda"):
        said = target.parse_device(text)
        assert said == Device(kind="cuda", memory_gb=80.0, here=True, name="A card")
    assert not target.parse_device("cuda:24G").here and target.parse_device("cpu").kind == "cpu"
    monkeypatch.setenv("SEGFLEET_DEVICE", "cpu")
    assert target.parse_device(None).kind == "cpu"
    monkeypatch.setenv("SEGFLEET_DEVICE", "cuda")
    assert target.parse_device(None).kind == "cuda"
    monkeypatch.setattr(target.torch.cuda, "is_available", lambda: False)
    assert target.parse_device(None).kind == "cpu"


def test_a_cpu_may_be_given_less_memory(monkeypatch):
    monkeypatch.setattr(target, "memory_budget", lambda: 3e9)
    monkeypatch.setattr(target, "cpus", lambda: 5)
    said = target.parse_device("cpu")
    assert (said.kind, said.memory_gb, said.here, said.name) == ("cpu", 3.0, True, "5 CPU core(s)")
    assert target.parse_device("cpu:1.5G").memory_gb == 1.5
    there = target.parse_device("cuda:80G")
    assert (there.kind, there.here, there.name) == ("cuda", False, "a GPU of 80 GB")
    for text in ("cpu:4", "gpu", "cuda:80GB", "cuda:G"):
        with pytest.raises(InputError, match="device: found"):
            target.parse_device(text)
