"""What the tests of this room share."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from segfleet.pipeline.launch.job import Train
from segfleet.preprocess.stores.manifest import load_manifest, save_manifest


def write_folds(store: Path, folds: list[list[int]]) -> None:
    """Another split `kfold` of a store: the validation cases of every fold by their numbers."""
    manifest = load_manifest(store)
    ids = [case.id for case in manifest.cases]
    kfold = tuple(
        {
            "train": tuple(case for n, case in enumerate(ids) if n not in val),
            "val": tuple(ids[n] for n in val),
        }
        for val in folds
    )
    save_manifest(store, manifest.model_copy(update={"splits": {"kfold": kfold}}))


@pytest.fixture(scope="session", name="write_folds")
def write_folds_fixture():
    """`write_folds(store, [[0, 2], [1, 3]])`"""
    return write_folds


@pytest.fixture(scope="session")
def two_folds(tiny_store, tmp_path_factory):
    """A folder with `tiny.yaml`, its store of two folds, the trained runs of both in `runs`, and
    two grey pictures in `images`."""
    import torch

    from segfleet.pipeline.jobs import run_job
    from segfleet.pipeline.ranks import Ranks
    from segfleet.pipeline.recipe import load_recipe
    from segfleet.pipeline.scoring.folds import every_fold
    from segfleet.pipeline.stop import StopRequest

    folder = tmp_path_factory.mktemp("two_folds")
    shutil.copytree(tiny_store(dims=2), folder / "store")
    write_folds(folder / "store", [[0, 2, 4], [1, 3, 5]])
    recipe = {
        "name": "tiny",
        "data": {"store": str(folder / "store"), "batch": 2, "patch": [16, 16], "workers": 0},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [{"epochs": 1, "steps": 12, "lr": 2e-2}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    before = {number: signal.getsignal(number) for number in signal.valid_signals() if number < 32}
    chosen, manifest = load_recipe(str(folder / "tiny.yaml")), load_manifest(folder / "store")
    for one in every_fold(chosen, manifest):
        job = Train(recipe=one.model_dump(mode="json"), root=folder / "runs")
        run_job(job, Ranks(torch.device("cpu")), StopRequest())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, before[number])
    (folder / "images").mkdir()
    rng = np.random.default_rng(3)
    for name, shape in (("one", (30, 40)), ("two", (41, 25))):
        array = rng.integers(1, 60, shape).astype(np.uint8)
        array[5:15, 8:20] += 150
        Image.fromarray(array).save(folder / "images" / f"{name}.png")
    return folder
