"""TensorBoard's, Weights & Biases' and MLflow's files hold what the run's own files say, read back
with their own formats; nothing of them is sent or can end a training."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from segfleet.core.errors import InputError
from segfleet.pipeline.events import EventLog, read_events
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.reports import trackers
from segfleet.pipeline.reports.trackers import (
    TensorBoard,
    Trackers,
    check_trackers,
    flat,
    open_trackers,
)
from segfleet.pipeline.stop import StopRequest


def values(folder):
    """{tag: [(step, value)]} of TensorBoard's files: length (8 bytes), its checksum (4), an event,
    its checksum (4)."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
            data = data[16 + size :]
    return found


@pytest.fixture(scope="module")
def run(tiny_store, tmp_path_factory):
    """A run that validated twice, with its own score."""
    import signal

    import torch

    root = tmp_path_factory.mktemp("runs")
    recipe = {
        "name": "tiny",
        "data": {"store": str(tiny_store(dims=2)), "batch": 2, "patch": [16, 16], "workers": 0},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [{"epochs": 2, "steps": 3, "lr": 1e-2}],
        "evaluation": {"every": 1},
    }
    before = {
        n: signal.getsignal(n)
        for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    document = parse(recipe).model_dump(mode="json")
    run_job(
        Train(recipe=document, root=root),
        Ranks(torch.device("cpu")),
        StopRequest(),
    )
    for number, handler in before.items():
        signal.signal(number, handler)
    return next(path.parent for path in root.rglob("evaluation.json"))


def test_a_writer_of_the_same_second_leaves_what_is_written(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for step in (1, 2):
        board = TensorBoard(tmp_path, step)
        board.numbers({"loss": 0.5}, step)
        board.close()
    assert [step for step, _ in values(tmp_path / "tensorboard")["loss"]] == [1, 2]


def test_tensorboard_has_curves_pictures_of_the_same_cases_and_what_it_came_to(run):
    found = values(run / "tensorboard")
    events = [event for event in read_events(run) if event["event"] == "validation"]
    dice = [(step, value.simple_value) for step, value in found["validation/dice"]]
    assert dice == [(e["step"], pytest.approx(e["dice"])) for e in events] and len(dice) == 2
    pictures = {tag: steps for tag, steps in found.items() if value_is_picture(steps)}
    shown = {tag.rpartition("/")[2] for tag in pictures if tag.startswith("validation/")}
    assert shown == {"case04", "case05"}, "all that fold 0 validates on, fewer than three"
    assert all([s for s, _ in steps] == [3, 6] for tag, steps in pictures.items() if "valid" in tag)
    final = values(run / "tensorboard" / "final")
    evaluation = json.loads((run / "evaluation.json").read_text())
    summary = evaluation["summary"]
    for tag, expected in (
        ("final/mean_foreground_dice", summary["mean_foreground_dice"]),
        ("final/dice/blob1", summary["structures"]["blob1"]["dice"]["mean"]),
    ):
        ((step, value),) = final[tag]
        assert step == 6 and value.simple_value == pytest.approx(expected)
    assert {"final/best", "final/worst"} <= found.keys()
    hparams = str(final["_hparams_/session_start_info"][0][1])
    assert "stages.0.lr" in hparams and "model.name" in hparams


def value_is_picture(steps):
    return all(value.HasField("image") for _, value in steps)


def picture():
    return np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def told(names, folder, warn):
    """A stage's log, resumed once, then its outcome; what every tool must know afterwards."""
    folder.mkdir(exist_ok=True)
    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = EventLog(folder, begin, None, open_trackers(names, folder, "tiny", warn, begin))
        for step in steps:
            log.write("step", step=step, loss=1.0 / step, note="text")
        log.pictures({"validation/case a": picture()}, steps[-1])
        log.close()
    last = open_trackers(names, folder, "tiny", warn, 4)
    last.outcome({"model.name": "net", "stages.0.lr": 0.5}, {"final/dice/liver": 0.75}, 4)
    last.close()


def test_mlflow_has_the_same_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    told(("mlflow",), tmp_path / "0123456789ab", said.append)
    assert not said
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "0123456789ab" / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "segfleet"]
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.data.tags["segfleet.uid"] == "0123456789ab"
    history = client.get_metric_history(one.info.run_id, "step/loss")
    assert [(m.step, m.value) for m in history] == [(s, 1.0 / s) for s in (1, 2, 3, 3, 4)]
    assert one.data.metrics["final/dice/liver"] == 0.75
    assert one.data.params == {"model.name": "net", "stages.0.lr": "0.5"}
    images = client.list_artifacts(one.info.run_id, "images")
    pngs = [one.path for one in images if one.path.endswith(".png")]
    assert [f"step+{step}" in path for step, path in zip((3, 4), pngs, strict=True)] == [True] * 2
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def records(file):
    """What a run of Weights & Biases holds, without the heads of LevelDB's blocks, which may divide
    a word."""
    whole, at, found = file.read_bytes(), 7, b""
    while at + 7 <= len(whole):
        if at % 32768 > 32768 - 7:  # no head fits into the rest of the block
            at += 32768 - at % 32768
            continue
        length = int.from_bytes(whole[at + 4 : at + 6], "little")
        found += whole[at + 7 : at + 7 + length]
        at += 7 + length
    return found


def test_wandb_writes_offline_runs(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = []
    told(("wandb",), tmp_path / "0123456789ab", said.append)
    assert not said
    files = list((tmp_path / "0123456789ab" / "wandb").glob("offline-run-*-0123456789ab/*.wandb"))
    assert len(files) == 3, "one for each time it was opened; `wandb sync` puts them together"
    texts = (b"step/loss", b"final/dice/liver", b"stages.0.lr", b"0.75")
    end = time.monotonic() + 20  # its service still writes when a run is finished, until we end
    while missing := set(texts) - {t for t in texts if t in b"".join(map(records, files))}:
        assert time.monotonic() < end, missing
        time.sleep(0.05)
    assert list((tmp_path / "0123456789ab").rglob("media/images/**/*.png"))


class Broken:
    def __init__(self):
        self.asked = 0

    def numbers(self, values, step):
        self.asked += 1
        raise OSError("no space left on device\nmore")


def test_a_tracker_that_fails_is_told_of_once_and_ends_nothing():
    broken, heard, said = Broken(), [], []

    class Good(Broken):
        def numbers(self, values, step):
            heard.append(step)

        def close(self):
            heard.append("closed")

    both = Trackers({"wandb": lambda: broken, "mlflow": Good}, said.append)
    both.numbers({"a": 1.0}, 1)
    both.numbers({"a": 1.0}, 2)
    both.close()
    assert heard == [1, 2, "closed"] and broken.asked == 1
    assert said == ["wandb failed and is left out: no space left on device"]


def test_what_is_not_installed_is_said_before_training(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackers: wandb is not installed.*segfleet\[wandb\]"):
        check_trackers(("tensorboard", "wandb"))
    check_trackers(("tensorboard",))


def test_nested_settings_are_flat():
    assert flat({"a": [{"b": 1}], "c": [1, 2], "d": {"e": None, "f": True}}) == {
        "a.0.b": 1,
        "c": "[1, 2]",
        "d.e": "null",
        "d.f": True,
    }
