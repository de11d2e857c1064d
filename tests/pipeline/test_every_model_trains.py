"""Every registered network goes the ordinary way: one epoch of training, the score of whole cases,
the report."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from segfleet.models.registry import ModelSpec, spec
from segfleet.pipeline import events
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.parts import build_network
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.pipeline.run import stage_folders
from segfleet.pipeline.stop import StopRequest
from segfleet.pipeline.task import make_task
from segfleet.preprocess.stores.base import open_store
from tests.networks import each_network


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stop():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def recipe_for(chosen: ModelSpec, store) -> Recipe:
    """One epoch of two steps of the small twin."""
    return parse(
        {
            "name": chosen.name,
            "data": {"store": str(store), "batch": 2, "patch": list(chosen.small_input)},
            "model": {"name": chosen.name, "options": dict(chosen.reduced)},
            "optimizer": {"weight_decay": 0.0},
            "stages": [{"epochs": 1, "steps": 2, "lr": 1e-3}],
            "evaluation": {"overlap": 0.0},
        }
    )


def store_for(chosen: ModelSpec, tiny_store):
    """Images with the channels of the published set-up and as many structures as it has, or one
    less where one output is the background."""
    dims, classes = len(chosen.small_input), max(1, chosen.num_classes - 1)
    return tiny_store(
        dims=dims,
        cases=4,
        classes=classes,
        size=16 if dims == 3 else 24,
        channels=chosen.in_channels,
    )


@pytest.mark.parametrize("name", each_network())
def test_trains_one_epoch_and_is_scored(name, tiny_store, tmp_path, stop):
    chosen = spec(name)
    recipe = recipe_for(chosen, store_for(chosen, tiny_store))
    manifest = open_store(recipe.data.store).manifest
    run_job(
        Train(recipe=recipe.model_dump(mode="json"), root=tmp_path),
        Ranks(torch.device("cpu")),
        stop,
    )

    folder = stage_folders(tmp_path, recipe, manifest)[-1]
    steps = [event for event in events.read_events(folder.path) if event["event"] == "step"]
    assert steps[-1]["step"] == 2 and all(math.isfinite(event["loss"]) for event in steps)
    assert folder.done()["skipped"] == 0

    task = make_task(manifest.dataset)
    before, after = build_network(recipe, manifest, task), folder.final().tensors("weights")
    moved = [not torch.equal(value, after[name]) for name, value in before.named_parameters()]
    assert sum(moved) > 0.9 * len(moved), (
        "nearly every parameter is changed by two updates; some gates open later"
    )

    scores = json.loads((folder.path / "evaluation.json").read_text())
    assert {case["id"] for case in scores["cases"]} == set(manifest.fold("kfold", 0)["val"])
    assert list(scores["summary"]["structures"]) == list(task.names)
    assert 0 <= scores["summary"]["mean_foreground_dice"] <= 1
    assert (folder.path / "report.html").stat().st_size > 1000


def test_command_line_trains_on_two_ranks(tiny_store, tmp_path):
    chosen = spec("asc_seg")
    recipe = recipe_for(chosen, store_for(chosen, tiny_store)).model_dump(mode="json")
    recipe["data"]["batch"] = 4
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [
        "train",
        str(tmp_path / "recipe.yaml"),
        "loss.deep_supervision=[1, 1, 1, 1]",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
    ]
    command = [sys.executable, "-m", "segfleet.cli.main", *words, "--ranks", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0 <= told["mean_foreground_dice"] <= 1
    log = list(events.read_events(told["stages"][-1]))
    assert [event["ranks"] for event in log if event["event"] == "stage_start"] == [2]
    assert [event["step"] for event in log if event["event"] == "step"] == [2]
