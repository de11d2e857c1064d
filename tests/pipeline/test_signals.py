"""A real signal in the middle of every phase of a run: nothing is lost, nothing is done twice, and
the end is the same to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segfleet.pipeline import checkpoint, events, run
from segfleet.pipeline.data import loader
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.parts import Objective
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.scoring import evaluate, score
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.training.window import Diverged
from segfleet.preprocess.stores.base import open_store

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PHASES = {  # where, and at which call
    "loading": (loader.Patches, "_sample", 7),
    "forward": (Objective, "forward", 5),
    "validation": (score, "evaluate_cases", 2),
    "a case of a validation": (evaluate, "raw_label", 3),  # the first of two, after two
    "a case of the last validation": (evaluate, "raw_label", 7),
    "checkpoint writing": (checkpoint, "write", 3),
    "checkpoint publishing": (checkpoint, "publish", 2),
    "stage change": (run.StageFolder, "finish", 1),
    "the last save": (checkpoint, "write", 5),
    "the last stage's end": (run.StageFolder, "finish", 2),
    "scoring": (score, "evaluate_cases", 5),  # after four validations
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the undisturbed run, too: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def restored():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def job(tiny_store):
    recipe = {
        "name": "signals",
        "data": {"store": str(tiny_store(dims=2)), "batch": 2},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [
            {"name": "base", "epochs": 2, "steps": 3, "lr": 1e-2, "warmup": 2},
            {"name": "tune", "epochs": 2, "steps": 2, "lr": 1e-3, "inherit": "weights+optimizer"},
        ],
        "save_every": 2,
        "evaluation": {"every": 1},
    }
    return Train(recipe=parse(recipe).model_dump(mode="json"), root=Path())


def go(job, root) -> list[run.StageFolder]:
    run_job(job.model_copy(update={"root": root}), Ranks(torch.device("cpu")), StopRequest())
    recipe = parse(job.recipe)
    return run.stage_folders(root, recipe, open_store(recipe.data.store).manifest)


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory):
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield result(go(job, tmp_path_factory.mktemp("straight")))
    for number, handler in before.items():
        signal.signal(number, handler)


def result(folders):
    """Everything a run leaves that must not depend on what disturbed it."""
    tensors = {}
    for folder in folders:
        for path in (folder.checkpoints / folder.done()["checkpoint"]).glob("*.safetensors"):
            tensors |= {
                f"{folder.path.name} {path.stem} {name}": value
                for name, value in load_file(path).items()
            }
    validations = [
        {key: value for key, value in event.items() if key != "time"}
        for folder in folders
        for event in events.read_events(folder.path)
        if event["event"] == "validation"
    ]
    scores = json.loads((folders[-1].path / "evaluation.json").read_text())
    return {
        "tensors": tensors,
        "validations": validations,
        "best": [folder.done()["best"] for folder in folders],
        "cases": scores["cases"],
    }


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_changes_nothing(job, straight, tmp_path, monkeypatch, phase):
    place, name, number = PHASES[phase]
    real, calls = getattr(place, name), []

    def disturbed(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), NUMBERS[1 + len(phase) % 3])
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, disturbed)
        with pytest.raises(
            Interrupted, match="run the same command again|Run the same command again"
        ):
            go(job, tmp_path)
    assert len(calls) >= number
    begun = sorted(tmp_path.rglob("events.jsonl"), key=lambda path: len(path.parts))
    stopped = [
        event["at_step"]
        for path in begun
        for event in events.read_events(path.parent)
        if event["event"] == "stopped"
    ]
    folders = go(job, tmp_path)
    resumed = [
        event["from_step"]
        for path in begun
        for event in events.read_events(path.parent)
        if event["event"] == "resumed"
    ]
    assert resumed == [step for step in stopped if step]  # not a step lost
    found = result(folders)
    assert found["tensors"].keys() == straight["tensors"].keys()
    assert all(
        torch.equal(value, straight["tensors"][key]) for key, value in found["tensors"].items()
    )
    assert {key: found[key] for key in ("validations", "best", "cases")} == {
        key: straight[key] for key in ("validations", "best", "cases")
    }


def test_a_stop_file_is_named_and_stops_one_run_only(job, straight, tmp_path):
    recipe = parse(job.recipe)
    leaf = run.stage_folders(tmp_path, recipe, open_store(recipe.data.store).manifest)[-1].path
    leaf.mkdir(parents=True)
    (leaf / "stop").touch()
    with pytest.raises(
        Interrupted,
        match=rf"again to go on\. It was asked to by the file {leaf / 'stop'}, which is removed "
        rf"now",
    ):
        go(job, tmp_path)
    # the same command went on to the end
    assert result(go(job, tmp_path))["tensors"].keys() == straight["tensors"].keys()


def test_a_stop_file_outlives_a_stop_it_did_not_cause(tmp_path):
    stop = StopRequest(tmp_path / "stop")
    os.kill(os.getpid(), signal.SIGTERM)
    (tmp_path / "stop").touch()
    # SLURM would start the job again
    assert stop.asked() and stop.obeyed() is None and (tmp_path / "stop").exists()
    stop = StopRequest(tmp_path / "stop")
    # seen by another rank first
    assert stop.obeyed() == str(tmp_path / "stop") and not (tmp_path / "stop").exists()


@pytest.mark.parametrize("every", [1, 0], ids=["validation", "scoring"])
def test_a_network_that_diverged_is_said_in_a_sentence(job, tmp_path, every):
    recipe = {**job.recipe, "evaluation": {"every": every}}
    recipe["stages"] = [{**job.recipe["stages"][0], "lr": 1e30, "warmup": 0}]
    with pytest.raises(
        Diverged,
        match=r"case 'case0\d': .* not finite .*: the training diverged\. Lower stages\.lr",
    ):
        go(Train(recipe=recipe, root=tmp_path), tmp_path)
