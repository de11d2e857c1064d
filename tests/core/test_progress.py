"""Events followed as they are written."""

from __future__ import annotations

import json

from segfleet.core.files import write_atomically
from segfleet.core.progress import EVENTS, EventFollower


def steps(follower):
    return [event["step"] for event in follower.new()]


def step(number: int) -> str:
    return json.dumps({"event": "x", "step": number}) + "\n"


def test_every_event_once_and_whole_lines_alone(tmp_path):
    follower, path = EventFollower(tmp_path), tmp_path / EVENTS
    assert follower.new() == []
    with open(path, "w") as file:
        for text, found in [
            (step(1) + '{"event": "x", "st', [1]),
            ('ep": 2}\n', [2]),
            ("", []),
            ("half\n[1]\n{}\n" + step(3), [3]),
        ]:
            file.write(text)
            file.flush()
            assert steps(follower) == found


def test_a_resumed_stage_begins_anew(tmp_path):
    follower, path = EventFollower(tmp_path), tmp_path / EVENTS
    path.write_text(step(1) + step(2))
    assert steps(follower) == [1, 2]
    write_atomically(path, step(1) + step(9) + step(10))  # longer than it was
    assert steps(follower) == [1, 9, 10]
