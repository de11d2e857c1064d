"""Events of long stages: few lines, and where a stage stands without reading them all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from segfleet.core import progress
from segfleet.pipeline import events
from segfleet.pipeline.events import EventLog, read_events, recent_events
from segfleet.slurm.status import status

RECIPE = {
    "name": "tiny",
    "data": {"store": "s"},
    "model": {"name": "m"},
    "stages": [{"epochs": 1, "lr": 1e-2}],
}


def stage_log(folder, count: int) -> None:
    """A stage that was begun, resumed twice, and stands after `count` reports."""
    lines = [{"event": "stage_start", "time": 0.0, "stage": 0, "steps": 10 * count + 500}]
    for index in range(count):
        if index in (5, 9):
            lines.append({"event": "resumed", "time": index + 0.5, "from_step": 10 * index})
        facts = {"step": 10 * index + 10, "loss": 1 / (index + 1), "samples_per_second": 8.0}
        lines.append({"event": "step", "time": float(index + 1), **facts})
        if index % 25 == 0:
            lines.append({"event": "validation", "time": index + 1.1, "step": 1, "dice": 0.5})
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_status_decodes_a_few_lines_however_long_a_stage_is(tmp_path, monkeypatch):
    """Counted: events decoded, for 8 runs of 100 and of 3,000 reports."""
    decoded, plain = [], progress.parse_event
    monkeypatch.setattr(events, "parse_event", lambda line: decoded.append(line) or plain(line))
    counts = []
    for count in (100, 3000):
        for run in range(8):
            stage_log(tmp_path / str(count) / f"run{run}", count)
        decoded.clear()
        rows = status(tmp_path / str(count))
        counts.append(len(decoded))
        assert len(rows) == 8 and all(row.restarts == 2 for row in rows)
        # by hand: 10 steps a second, 500 to go
        assert {(row.step, row.steps, row.remaining_seconds) for row in rows} == {
            (10 * count, 10 * count + 500, 50)
        }
        assert rows[0].loss == pytest.approx(1 / count)
    assert counts == [8 * 5] * 2


def test_what_is_read_backwards_is_what_all_events_say(tmp_path):
    """Lines cut off, damaged or with a case called like an event, anywhere."""
    draw = np.random.default_rng(4)
    for _ in range(200):
        text = ""
        for index in range(int(draw.integers(0, 12))):
            kind = ("stage_start", "resumed", "step", "non_finite")[draw.integers(4)]
            event = {"event": kind, "time": index, "steps": 7, "step": index, "loss": 0.5}
            event["cases"] = ['{"event": "step"', 'a\n{"event": "resumed"}']
            line = json.dumps(event)
            text += line[: draw.integers(len(line))] if draw.random() < 0.2 else line
            text += "\n" if draw.random() < 0.95 else ""
        (tmp_path / "events.jsonl").write_text(text)
        found = list(read_events(tmp_path))
        of = {kind: [e for e in found if e["event"] == kind] for kind in ("stage_start", "step")}
        begun, resumed, steps = recent_events(tmp_path)
        assert begun == (of["stage_start"] or [None])[-1] and steps == of["step"][-2:]
        assert resumed == sum(event["event"] == "resumed" for event in found)
    (tmp_path / "events.jsonl").unlink()
    assert recent_events(tmp_path) == (None, 0, [])


def test_events_of_long_stages_thin_out(tmp_path):
    """300,000 steps, told every ten: every event is heard, few lines are kept, none that stands
    before something else is missing."""
    heard = []
    log = EventLog(tmp_path, 0, heard.append)
    for step in range(10, 300_001, 10):
        log.write("step", step=step, loss=0.1)
        if step in (19_990, 150_010):
            log.write("validation", step=step, dice=0.5)
    log.write("finished", stage=0, at_step=step)
    log.close()
    kept = [event["step"] for event in read_events(tmp_path) if event["event"] == "step"]
    assert len(heard) == 30_003 and len(kept) < 6000
    assert kept[:2000] == list(range(10, 20_001, 10)) and kept[-1] == 300_000
    assert 150_010 in kept and kept == sorted(set(kept))
    gaps = np.diff(kept)
    assert (gaps <= np.maximum(10, np.asarray(kept[1:]) // 1000)).all()
    assert (tmp_path / "events.jsonl").stat().st_size < 2**20
    reopened = EventLog(tmp_path, 200_000, None)
    reopened.write("step", step=200_010, loss=0.1)
    reopened.close()  # what waits is not lost
    assert list(read_events(tmp_path))[-1]["step"] == 200_010
