"""Half-written files of killed processes go with the next one that writes there, and nothing else
does."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from segfleet.core import partial
from segfleet.core.files import write_atomically
from segfleet.core.partial import remove_partial, temporary_name

DAYS = 48 * 3600


@pytest.fixture
def left(tmp_path):
    """`left(world="")`: a half-written done.json, a half-written folder beside it, both by a
    process that was killed; in another `world` than this one if that is said."""

    def make(world: str = ""):
        program = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from segfleet.core import partial\n"
            "if sys.argv[2]: partial._world = lambda: sys.argv[2]\n"
            "file, folder = (partial.temporary_name(Path(sys.argv[1]) / n) for n in ('done.json', "
            "'s'))\nfile.write_text('half'); folder.mkdir(); (folder / 'x').touch()\n"
            "print(file, folder, sep='\\n', flush=True); os.kill(os.getpid(), 9)\n"
        )
        words = [sys.executable, "-c", program, str(tmp_path), world]
        found = subprocess.run(words, capture_output=True, text=True).stdout.split("\n")
        return [path for path in tmp_path.iterdir() if str(path) in found]

    return make


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, left):
    ours = temporary_name(tmp_path / "recipe.json")
    ours.write_text("half")
    for name in (
        ".hidden",
        "kept.partial",
        ".x.partial",
        ".x.elsewhere-1-0123456789abcdef.partial",
    ):
        (tmp_path / name).write_text("theirs")
    kept = set(tmp_path.iterdir())
    assert len(left()) == 2
    write_atomically(tmp_path / "other.json", "{}")
    assert set(tmp_path.iterdir()) == {*kept, tmp_path / "other.json"}


def test_a_long_folder_is_read_once(tmp_path, left, monkeypatch):
    write_atomically(tmp_path / "other.json", "{}")
    monkeypatch.setattr(partial, "remove_partial", lambda folder: pytest.fail("looked again"))
    write_atomically(tmp_path / "other.json", "{}")


@pytest.mark.parametrize("world", ["0123abcd", "00000000"])
def test_numbers_of_another_world_say_nothing(tmp_path, left, world):
    """Perhaps of a container with this machine's name: it lives there."""
    found = left(world)
    remove_partial(tmp_path)
    assert set(tmp_path.iterdir()) == set(found) and len(found) == 2
    os.utime(found[0], (time.time() - DAYS,) * 2)
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == found[1:]
    remove_partial(tmp_path, alone=True)
    assert list(tmp_path.iterdir()) == []


def test_where_the_system_names_no_world_young_ones_stay(tmp_path, left, monkeypatch):
    found = left("00000000")
    monkeypatch.setattr(partial, "_world", lambda: "")
    remove_partial(tmp_path)
    assert set(tmp_path.iterdir()) == set(found)


def test_names_without_a_world_are_those_of_earlier_versions(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    old = tmp_path / f".done.json.{partial._host()}-{gone.pid}-0123abcd.partial"
    old.touch()
    remove_partial(tmp_path)
    assert old.exists()
    remove_partial(tmp_path, alone=True)
    assert not old.exists()


@pytest.mark.parametrize("name", ["a" * 255, "\u6f22" * 84, "\u00e9" * 127])
def test_the_longest_name_can_be_written(tmp_path, name):
    write_atomically(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"
