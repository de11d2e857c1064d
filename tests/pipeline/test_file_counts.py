"""How many files and folders a run and a store leave: clusters count them, a million for a group is
usual."""

from __future__ import annotations

import signal

import pytest
import torch

from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.run import RECIPE
from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import PHANTOMS

STAGE, SCORED = 16, 36  # inodes of a stage; of one that is scored and has a report, beside that


@pytest.fixture
def handlers():
    """The signal handlers a job sets for its process do not outlive the test."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def inodes(folder, but=None) -> int:
    """Files and folders in a folder, one of them left out."""
    return sum(but is None or but not in (path, *path.parents) for path in folder.rglob("*"))


@pytest.mark.slow
def test_a_run_of_two_stages_and_so_a_sweep_leave_few_files(tiny_store, tmp_path, handlers):
    """Trained for longer than it takes to prune checkpoints, scored, reported."""
    document = {
        "name": "tiny",
        "data": {"store": str(tiny_store(dims=2)), "batch": 2, "patch": [16, 16], "workers": 0},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [
            {"name": "base", "epochs": 8, "steps": 1, "lr": 2e-2},
            {"name": "tune", "epochs": 2, "steps": 1, "lr": 2e-2, "inherit": "weights"},
        ],
        "save_every": 1,
    }
    recipe = recipes.parse(document, "tiny").model_dump(mode="json")
    run_job(
        Train(recipe=recipe, root=tmp_path),
        Ranks(torch.device("cpu")),
        StopRequest(),
    )
    (leaf,) = (path.parent for path in tmp_path.rglob(RECIPE))
    first, last = inodes(leaf.parent, leaf), inodes(leaf)
    assert first <= STAGE and last <= STAGE + SCORED, (first, last)
    # a hundred points of ten common beginnings, by these numbers: far from any quota. What the
    # sweep adds is counted in tests/sweeps/test_sweep_threads.py
    assert 10 * (first + 1) + 100 * (last + 1) < 6000


@pytest.mark.parametrize(("format", "each"), [("zarr", 8), ("hdf5", 1)])
def test_a_store_has_files_of_its_bytes_not_of_its_cases(tmp_path, format, each):
    """Three of the store, `each` of a shard of 16 MiB, however many cases are in it."""
    for cases in (8, 32):
        raw = PHANTOMS["folder"](tmp_path / f"raw{cases}", cases=cases)
        out = tmp_path / f"store{cases}"
        build(BuildRequest("folder", raw, out, format=format, workers=1))
        assert inodes(out) <= 3 + each
    few = -(-sum(path.stat().st_size for path in (out / "shards").rglob("*")) // 8)
    build(
        BuildRequest("folder", raw, tmp_path / "parts", format=format, workers=1, shard_bytes=few)
    )
    shards = len(list((tmp_path / "parts" / "shards").iterdir()))
    assert 1 < shards < cases and inodes(tmp_path / "parts") <= 3 + each * shards
