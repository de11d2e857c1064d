"""What all tests share."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# As make sets it: two ranks of a test cannot share the one GPU of a machine.
os.environ.setdefault("SEGFLEET_DEVICE", "cpu")
# As local ranks get it, so that ranks and commands may be forks of one warm process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
# Whole files go to the next free worker. The long ones first, and those that wait for daemons
# (SLURM, Ray) between those that compute, so that no core is idle and none is left with a long one.
LONG_FIRST = (
    "slurm/test_slurm_faults.py",
    "cli/test_train_command.py",
    "slurm/test_slurm_jobs.py",
    "pipeline/test_fake_cuda.py",
    "slurm/test_slurm_limits.py",
    "pipeline/test_engines.py",
    "sweeps/test_sweep_command.py",
    "test_readme.py",
    "slurm/test_slurm_words.py",
    "models/test_conformance.py",
    "sweeps/test_sweep_run.py",
    "pipeline/test_every_model_trains.py",
    "sweeps/test_preprocess_on_ray.py",
    "pipeline/test_train.py",
    "sweeps/test_transfer_sweep.py",
    "pipeline/test_signals.py",
    "cli/test_plugins.py",
    "preprocess/test_growth.py",
    "pipeline/test_left_behind.py",
    "sweeps/test_sweep_trial.py",
    "test_packaging.py",
    "test_gpu_benchmark.py",
    "slurm/test_slurm_accounting.py",
)


def pytest_collection_modifyitems(items):
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
    """What is imported by now stays: whoever collects garbage need not look at it again, which
    takes half a second with torch among it."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # C++ libraries count at the end what was not taken apart


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or leaves anything in the user's cache folder. All workers share one, so that
    a kernel is compiled once."""
    before, base = os.environ.get("XDG_CACHE_HOME"), tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def own_signals():
    """A command that a test runs in this process ends by ignoring what might cut it off."""
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in asking}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def warm():
    """`python -m segfleet...` starts at once, see warm.py. A test that is about the start itself
    asks for `cold`."""
    undo = start_warm()
    yield
    undo()


def pytest_xdist_setupnodes(config):
    """The workers, too, are forks of one process that has imported what all of them need."""
    config.add_cleanup(start_warm())


def start_warm():
    """What undoes it."""
    if sys.platform != "linux":
        return lambda: None
    spec = importlib.util.spec_from_file_location("warm", Path(__file__).with_name("warm.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.install()


@pytest.fixture
def cold(monkeypatch):
    """Every command in this test is a new interpreter."""
    monkeypatch.setenv("SEGFLEET_TESTS_COLD", "1")


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("Task04_Hippocampus")` is the folder of a real data set, or the test is skipped
    and says so."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("SEGFLEET_TEST_DATA", ROOT.parent / "shared" / "data")) / name
        if not folder.is_dir():
            pytest.skip(f"real data set {name} is not beside the repository")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """`tiny_store(dims=3)`: a published store of small synthetic cases, made without the raw-data
    code. Cached per set of options."""
    made: dict = {}

    def make(
        dims: int = 3,
        format: str = "zarr",
        cases: int = 6,
        classes: int = 2,
        size: int = 24,
        channels: int = 1,
    ) -> Path:
        key = (dims, format, cases, classes, size, channels)
        if key not in made:
            made[key] = write_tiny_store(tmp_path_factory.mktemp("store"), *key)
        return made[key]

    return make


def write_tiny_store(
    root: Path,
    dims: int,
    format: str,
    count: int,
    classes: int,
    size: int,
    channels: int,
    **of_plan,
) -> Path:
    import numpy as np

    from segfleet.preprocess.stores import manifest as m
    from segfleet.preprocess.stores.base import store_module

    rng = np.random.default_rng(7)
    patch = (16, 16, 16) if dims == 3 else (1, 32, 32)
    labels = {"background": 0, **{f"blob{k}": k for k in range(1, classes + 1)}}
    dataset = m.Dataset(
        name="tiny", reader="msd", dims=dims, channels=tuple("abcd"[:channels]), labels=labels
    )
    plan = m.Plan(
        target_spacing=(1.0, 1.0, 1.0),
        patch=patch,
        normalisation=("zscore",) * channels,
        **of_plan,
    )
    writer = store_module(format).Writer(
        root, "data/bundle-0000", chunk=(1, 16, 16) if dims == 2 else (16, 16, 16), dtype=plan.dtype
    )
    entries, ids = [], [f"case{k:02d}" for k in range(count)]
    for number, name in enumerate(ids):
        shape = (
            1 if dims == 2 else size + number,
            size + 2 * (number % 3) + 10 * (dims == 2),
            size + 10 * (dims == 2),
        )
        label = np.zeros(shape, np.uint8)
        for value in range(1, classes + 1):
            corner = [int(rng.integers(0, max(1, s - 9))) for s in shape]
            label[tuple(slice(c, c + 9) for c in corner)] = value
        image = label[None] * 1.5 + rng.normal(0, 0.5, (channels, *shape))
        if plan.masked:
            image[..., :12] = 0
        if plan.dtype in ("uint8", "int16"):
            image = np.clip(40 * image + 100, 0, 255)
        image = image.astype(plan.dtype)
        sha256 = writer.write(name, image, label, None)
        flat = {v: np.flatnonzero(label == v) for v in range(1, classes + 1)}
        entries.append(
            m.CaseEntry(
                id=name,
                group=name,
                shard="data/bundle-0000",
                key=name,
                shape=shape,
                spacing=(1.0, 1.0, 1.0),
                crop=tuple((0, s) for s in shape),
                raw_shape=shape,
                raw_spacing=(1.0, 1.0, 1.0),
                voxels={v: len(f) for v, f in flat.items()},
                foreground={
                    v: tuple(int(i) for i in f[:: max(1, len(f) // 50)]) for v, f in flat.items()
                },
                sha256=sha256,
            )
        )
    files = writer.publish()
    splits = {
        "kfold": ({"train": tuple(ids[:-2]), "val": tuple(ids[-2:])},),
        "all": ({"train": tuple(ids), "val": tuple(ids)},),
    }
    cases = tuple(entries)
    made = m.Manifest(
        format=format,
        dataset=dataset,
        plan=plan,
        cases=cases,
        splits=splits,
        files=files,
    )
    m.save_manifest(root, made)
    return root


@pytest.fixture(scope="session")
def tiny_recipe(tiny_store, tmp_path_factory):
    """`tiny_recipe(stages, batch, model)`: a folder that holds tiny.yaml, a recipe for a tiny
    network on a tiny store."""
    lite = {"name": "unet_lite_standard", "options": {"width": 4}}

    def write(stages: list[dict], batch: int, model: dict = lite) -> Path:
        folder = tmp_path_factory.mktemp("work")
        document = {
            "name": "tiny",
            "data": {"store": str(tiny_store(dims=2)), "batch": batch, "patch": [16, 16]},
            "model": model,
            "stages": stages,
            "save_every": 5,
        }
        (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
        return folder

    return write
