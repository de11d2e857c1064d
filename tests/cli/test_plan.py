"""`segfleet plan` and `train auto`: a recipe that fits data, device and budget, and says why."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from segfleet.cli import main, plan
from segfleet.core.errors import InputError
from segfleet.pipeline.identity import stage_uids
from segfleet.pipeline.planning import cpu, timing
from segfleet.pipeline.planning.choices import low_first
from segfleet.pipeline.planning.planner import plan_recipe
from segfleet.pipeline.planning.target import parse_budget, parse_device
from segfleet.pipeline.planning.timing import Measured
from segfleet.pipeline.recipe import load_recipe, resolve
from segfleet.preprocess.stores.manifest import load_manifest, save_manifest


def segfleet(*words):
    return CliRunner().invoke(main.app, [str(word) for word in words])


@pytest.fixture
def speed(monkeypatch):
    """`speed(seconds per megavoxel)`: steps take that, whatever the machine is doing."""
    seen = []

    def set_speed(seconds: float, gigabytes: float = 0.1):
        def measure(recipe, manifest, device, steps, enough=math.inf):
            voxels = math.prod(recipe.data.patch) * recipe.data.batch
            seen.append(tuple(recipe.data.patch))
            fast = 0.5 if recipe.engine.precision == "bf16" else 1.0
            return Measured(seconds=seconds * voxels / 1e6 * fast, gigabytes=gigabytes)

        monkeypatch.setattr(timing, "measure", measure)
        return seen

    return set_speed


@pytest.fixture(scope="module")
def large(tiny_store, tmp_path_factory):
    """The manifest of a store of large volumes; its arrays are those of a tiny one."""
    import shutil

    folder = tmp_path_factory.mktemp("large") / "store"
    shutil.copytree(tiny_store(dims=3), folder)
    manifest = load_manifest(folder)
    plan = manifest.plan.model_copy(
        update={"median_shape": (120, 260, 240), "patch": (96, 160, 160)}
    )
    cases = tuple(case.model_copy(update={"shape": (120, 260, 240)}) for case in manifest.cases)
    save_manifest(folder, manifest.model_copy(update={"plan": plan, "cases": cases}))
    return folder


@pytest.mark.parametrize("dims", [2, 3])
def test_every_choice_has_a_sentence_and_the_recipe_is_valid(tiny_store, dims, tmp_path):
    """Really measured: steps of this machine."""
    out = tmp_path / "recipe.yaml"
    done = segfleet("plan", tiny_store(dims=dims), "--budget", "30s", "--out", out, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    document = json.loads(done.stdout)
    text = out.read_text()
    assert yaml.safe_load(text) == document["recipe"], "the comments are comments"
    recipe = load_recipe(str(out))
    assert recipe.model.name == f"plain_unet_{dims}d"
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key = line.strip().removeprefix("- ").partition(":")[0]
        plain = line.rstrip().endswith(":") or key in ("name", "store", "warmup", "schedule")
        if not line.lstrip().startswith("#") and line and not plain:
            assert lines[number - 1].lstrip().startswith("# "), line
    assert segfleet("recipe", out).exit_code == 0
    assert recipe.stages[0].epochs * recipe.stages[0].steps > 0
    again = segfleet("plan", tiny_store(dims=dims), "--out", out)
    assert isinstance(again.exception, InputError) and "exists" in str(again.exception)


def test_a_smaller_budget_takes_a_smaller_patch_and_never_more_time(large, speed):
    seen = speed(3.0)
    sizes = []
    for budget in ("12h", "1h", "15min"):
        recipe = plan_recipe(large, "cpu", budget).recipe()
        step = 3.0 * math.prod(recipe.data.patch) * recipe.data.batch / 1e6 / 2  # bf16
        steps = sum(stage.epochs * stage.steps for stage in recipe.stages)
        assert steps * step <= parse_budget(budget)
        assert steps >= cpu.ENOUGH or budget == "15min"
        sizes.append(math.prod(recipe.data.patch))
        assert recipe.engine.precision == "bf16"
    assert sizes[0] > sizes[1] >= sizes[2]
    assert len(seen) < 20


@pytest.mark.parametrize("busy", [True, False])
def test_on_a_busy_machine_a_step_is_its_own_computing(tiny_store, monkeypatch, busy):
    """A clock and a meter of CPU time by hand: 6 s a step by the clock, 4 s of two threads."""
    ticks = {"perf_counter": itertools.count(0, 6), "process_time": itertools.count(0, 4)}
    if not busy:
        ticks["process_time"] = itertools.count(0, 11)
    for name, count in ticks.items():
        monkeypatch.setattr(timing.time, name, lambda count=count: float(next(count)))
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 2)
    planned = plan_recipe(tiny_store(dims=2), "cpu", "1h")
    step, notes = (2.0, 1) if busy else (6.0, 0)
    stage = planned.recipe().stages[0]
    assert stage.epochs * stage.steps == pytest.approx(0.7 * 3600 / step, rel=0.1)
    assert sum("This machine was busy: a step took 6 s" in note for note in planned.notes) == notes


def test_a_step_that_is_far_too_slow_is_not_repeated(tiny_store, monkeypatch):
    """By hand: steps of 6 s by the clock and 8 s of computing of two threads, 4 s each. One says
    that it takes more than 3 s; three, after one to warm up, that it takes less than 5 s."""
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 2)
    recipe = plan_recipe(tiny_store(dims=2), "cpu", "30s").recipe()
    manifest = load_manifest(tiny_store(dims=2))
    for enough, steps in ((3.0, 1), (5.0, 4)):
        seen = {"perf_counter": itertools.count(0, 6), "process_time": itertools.count(0, 8)}
        for name, count in seen.items():
            monkeypatch.setattr(timing.time, name, lambda count=count: float(next(count)))
        found = timing.measure(recipe, manifest, timing.torch.device("cpu"), 3, enough)
        assert (found.seconds, found.rough) == (6.0, steps == 1)
        assert next(seen["perf_counter"]) == 2 * 6 * steps


def test_the_smallest_patch_is_measured_in_full(large, monkeypatch):
    """When no patch is fast enough the last one is taken, by more than its first step."""
    asked = []

    def measure(recipe, manifest, device, steps, enough=math.inf):
        asked.append((tuple(recipe.data.patch), enough))
        rough = enough < math.inf and recipe.engine.precision == "fp32"
        return Measured(seconds=50.0 if rough else 10.0, gigabytes=0.1, rough=rough)

    monkeypatch.setattr(timing, "measure", measure)
    recipe = plan_recipe(large, "cpu", "1h").recipe()
    assert (tuple(recipe.data.patch), math.inf) in asked
    steps = sum(stage.epochs * stage.steps for stage in recipe.stages)
    assert steps == pytest.approx(0.7 * 3600 / 10, rel=0.1)


def test_where_no_patch_is_fast_enough_the_smallest_is_planned(large, speed):
    """Not the largest, whose few steps would outlast the budget."""
    seen = speed(300.0)
    recipe = plan_recipe(large, "cpu", "10min").recipe()
    assert math.prod(recipe.data.patch) == min(map(math.prod, seen)) < math.prod(seen[0])
    step = 300.0 * math.prod(recipe.data.patch) * recipe.data.batch / 1e6 / 2  # bf16
    assert recipe.stages[0].epochs * recipe.stages[0].steps * step <= 600
    assert len(seen) <= 4, "patches that are surely too slow are not timed"


def test_a_step_that_does_not_fit_the_memory_is_not_planned(large, speed):
    speed(1e-6, gigabytes=9.0)
    small = plan_recipe(large, "cpu:4G", "1h").recipe().data.patch
    speed(1e-6, gigabytes=1.0)
    assert math.prod(small) < math.prod(plan_recipe(large, "cpu:4G", "1h").recipe().data.patch)


def test_a_gpu_elsewhere_is_planned_by_the_table(large):
    """By hand: patches grow with the memory as nnU-Net's planner says, and all that is assumed is
    called assumed."""
    small, big = (plan_recipe(large, f"cuda:{memory}G", "1d") for memory in (10, 80))
    first, second = small.recipe(), big.recipe()
    assert first.model.name == "plain_unet_3d" and second.model.name == "resenc_unet_3d"
    assert math.prod(first.data.patch) < math.prod(second.data.patch)
    from segfleet.preprocess.planning.plan import plan_patch

    assert first.data.patch == plan_patch((120, 260, 240), (1, 1, 1), 3, 3, memory_gb=8.0)
    assert first.optimizer.name == "sgd" and first.stages[0].schedule == "poly"
    assert first.stages[0].epochs * 250 * 0.35 == pytest.approx(0.7 * 86400, rel=0.01)
    assert "assumed" in small.reasons["stages.0.epochs"]


def test_a_step_of_small_images_is_not_assumed_to_fill_the_gpu(tiny_store):
    """A batch of a small data set is small whatever the memory: by hand, 0.05 s a step at least."""
    for memory in (10, 80):
        recipe = plan_recipe(tiny_store(dims=3), f"cuda:{memory}G", "1h").recipe()
        steps = sum(stage.epochs * stage.steps for stage in recipe.stages)
        assert steps * 0.05 == pytest.approx(0.7 * 3600, rel=0.02)


def test_a_patch_that_sees_little_is_trained_at_a_low_resolution_first(large, speed):
    """By hand: 64 x 64 x 64 is 3.5 % of 120 x 260 x 240 voxels; a quarter is 7.14 times as much,
    1.926 times along each axis. 14 % (64 x 128 x 128) is too near to a quarter, as for nnU-Net."""
    manifest = load_manifest(large)
    stage = {"name": "train", "epochs": 30, "steps": 10, "lr": 1e-3}
    for patch, stages in (((64, 64, 64), 2), ((64, 128, 128), 1), ((1, 64, 64), 1)):
        document, reasons = {"stages": [dict(stage)]}, {"stages.0.epochs": "300 steps."}
        notes = low_first(document, reasons, manifest, patch)
        assert len(document["stages"]) == stages == 1 + len(notes)
    document, reasons = {"stages": [dict(stage)]}, {"stages.0.epochs": "300 steps."}
    low_first(document, reasons, manifest, (64, 64, 64))
    first, second = document["stages"]
    assert (first["epochs"], second["epochs"]) == (10, 20)
    low, high = first["data"]["augment"]["scale_range"]
    assert (low + high) / 2 == pytest.approx(1.926, abs=0.002) and "data" not in second
    # and as a whole recipe: valid, the same epochs in all, the second stage as it would be alone
    speed(30.0)
    planned = plan_recipe(large, "cpu", "3h")
    one, two = planned.recipe().stages
    assert one.name == "low_resolution" and any("sees" in note for note in planned.notes)
    settings = resolve(planned.recipe(), 0).data.augment, resolve(planned.recipe(), 1).data.augment
    assert settings[0].scale == 1.0 and settings[1] == planned.recipe().data.augment
    assert yaml.safe_load(planned.yaml()) == planned.document
    uids = stage_uids(planned.recipe(), manifest)
    assert len(set(uids)) == 2


def test_a_plan_is_made_once(tiny_store, speed, tmp_path):
    """Steps are never of the same length twice; the run must be."""
    speed(1.0)
    store = tiny_store(dims=2)
    words = [f"data.store={store}", "seed=3"]
    first = plan.frozen_plan(words, "30s", tmp_path / "runs")
    speed(0.01)
    assert plan.frozen_plan(words, "30 s", tmp_path / "runs") == first
    other = plan.frozen_plan(words, "60s", tmp_path / "runs")
    manifest = load_manifest(store)
    uids = [stage_uids(load_recipe(*one), manifest) for one in (first, other)]
    assert uids[0] != uids[1] and load_recipe(*first).seed == 3


def test_train_auto_trains(tiny_store, tmp_path):
    words = (
        "train",
        "auto",
        f"data.store={tiny_store(dims=2)}",
        "data.split=all",
        "--budget",
        "4s",
    )
    done = segfleet(*words, "--runs", tmp_path / "runs", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    document = json.loads(done.stdout)
    again = segfleet(*words, "--runs", tmp_path / "runs", "--json")
    assert json.loads(again.stdout) == document and "nothing to do" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "auto"), "train auto: data.store is missing"),
        (("train", "hippocampus", "--budget", "1h"), "--budget: is for `segfleet train auto`"),
        (("submit", "auto"), "`segfleet plan STORE --out recipe.yaml` writes it"),
        (("plan", "STORE", "--budget", "soon"), "budget: found 'soon', expected a time such as"),
        (("plan", "STORE", "--budget", "0h"), "budget: found '0h'"),
        (
            ("plan", "STORE", "--device", "tpu"),
            "device: found 'tpu', expected cpu, cuda or cuda:80G",
        ),
        (("plan", "nowhere"), "nowhere holds no manifest.json"),
    ],
)
def test_what_cannot_be_planned(tiny_store, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [str(tiny_store(dims=2)) if word == "STORE" else word for word in words]
    done = segfleet(*words)
    assert isinstance(done.exception, InputError) and message in str(done.exception)
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.mark.parametrize(
    "words",
    [
        "plan STORE --device cuda:24G",
        "train auto data.store=nowhere",
        "predict x a.png --out o",
        "best x y",
    ],
)  # fmt: skip
def test_what_computes_in_the_command_s_process_waits_as_ranks_do(
    tiny_store, tmp_path, cold, words
):
    """OpenMP looks once, when torch is loaded, and says what it saw. A step that is timed for a
    plan with threads that spin is not the step of a rank, whose threads do not."""
    command = words.replace("STORE", str(tiny_store(dims=2))).split()
    given = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for policy in (None, "active") if words.startswith("plan") else (None,):
        more = {"OMP_WAIT_POLICY": policy} if policy else {}
        done = subprocess.run(
            [sys.executable, "-m", "segfleet.cli.main", *command],
            env={**given, **more, "OMP_DISPLAY_ENV": "TRUE"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert f"OMP_WAIT_POLICY = '{(policy or 'passive').upper()}'" in done.stderr


def test_devices_and_budgets_by_hand(monkeypatch):
    monkeypatch.setenv("SEGFLEET_DEVICE", "cpu")
    assert [parse_budget(text) for text in ("90s", "30min", "1.5h", "2d")] == [
        90,
        1800,
        5400,
        172800,
    ]
    assert parse_device("cuda:24G").memory_gb == 24 and not parse_device("cuda:24G").here
    assert parse_device(None).kind == "cpu"
    with pytest.raises(InputError, match="no GPU is here; say its memory"):
        parse_device("cuda")
