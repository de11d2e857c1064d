"""Progress: one bar or a few lines per phase, and what each of them stands for."""

from __future__ import annotations

import json

from segfleet.cli.output import PlainProgress, duration
from segfleet.cli.train import TrainingProgress
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.run import StageFolder


def test_lines_come_every_ten_seconds_and_at_the_end_of_a_phase(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    on_progress = PlainProgress("training")
    for seconds in range(26):
        clock[0] = float(seconds)
        on_progress(2 * seconds, 100, f"training, epoch {seconds // 10 + 1}/5")
    clock[0] = 27.0
    for done in range(5):
        on_progress(done, 4, "scoring")
    assert capsys.readouterr().err.splitlines() == [
        "training, epoch 2/5: 20/100, 2.0/s, 40 s left",
        "training, epoch 3/5: 40/100, 2.0/s, 30 s left",
        "scoring: 4/4, 4000000000.0/s",
    ]


def test_a_resume_that_goes_back_is_no_negative_rate(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    on_progress = PlainProgress("training")
    for seconds, done in ((0, 60), (2, 50), (12, 70), (20, 100)):
        clock[0] = float(seconds)
        on_progress(done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "training: 70/100, 2.0/s, 15 s left",
        "training: 100/100, 2.8/s",
    ]


def test_durations():
    assert [duration(s) for s in (3.2, 89, 100, 5399, 11100)] == [
        "3 s",
        "89 s",
        "2 min",
        "1 h 30 min",
        "3 h 05 min",
    ]


def test_every_phase_has_its_own_name_and_total(tmp_path):
    recipe = parse(
        {
            "name": "x",
            "model": {"name": "unext"},
            "stages": [{"epochs": 3, "lr": 1.0}, {"epochs": 2, "lr": 1.0}],
        }
    )
    folders = [
        StageFolder(path=tmp_path / "a", index=0),
        StageFolder(path=tmp_path / "a" / "b", index=1),
    ]
    folders[1].path.mkdir(parents=True)
    note = folders[1].path / "scoring.json"
    note.write_text('{"phase": "scoring", "done": 5, "total": 6}')  # left by a killed process
    seen = []
    follow = TrainingProgress(folders, recipe, [30, 20], lambda *now: seen.append(now))

    def event(folder, **facts):
        with open(folder.path / "events.jsonl", "a") as file:
            file.write(json.dumps(facts) + "\n")
        follow.poll()

    follow.poll()
    assert seen == []
    event(folders[0], event="stage_start", step=0, steps=30)
    event(folders[0], event="step", step=10, epoch=0, loss=0.5)
    note.write_text('{"phase": "validation", "done": 1, "total": 4}')
    follow.poll()
    note.unlink()
    event(folders[0], event="validation", step=10, dice=0.5)
    event(folders[1], event="step", step=10, epoch=1, loss=0.25)
    note.write_text('{"phase": "scoring", "done": 2, "total": 6}')
    follow.poll()
    assert seen == [
        (0, 30, "training stage 1/2"),
        (10, 30, "training stage 1/2, epoch 1/3, loss 0.500"),
        (1, 4, "validation"),
        (10, 30, "training stage 1/2, epoch 1/3, loss 0.500"),
        (10, 20, "training stage 2/2, epoch 2/2, loss 0.250"),
        (2, 6, "scoring"),
    ]
