"""What is no fault of ours is one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from segfleet.core.errors import ExitCode, explain
from segfleet.core.files import make_folder


@pytest.fixture
def deep(tmp_path):
    """1,100 folders inside one another."""
    handle, made = os.open(tmp_path, os.O_RDONLY), tmp_path / "d"
    for _ in range(1100):
        os.mkdir("d", dir_fd=handle)
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    yield made
    subprocess.run(["rm", "-rf", made], check=True)


WAYS = {
    "rglob": lambda deep: list(deep.rglob("*")),
    "walk": lambda deep: list(os.walk(deep)),
    "copytree": lambda deep: shutil.copytree(deep, deep.parent / "copy"),
    "rmtree": shutil.rmtree,
    "make_folder": lambda deep: make_folder(deep.parent / ("e/" * 1100)),
}


@pytest.mark.parametrize("way", WAYS)
def test_folders_without_end_are_one_sentence(deep, way):
    try:
        WAYS[way](deep)  # newer Pythons walk some of them
    except RecursionError as error:
        message, code = explain(error)
        assert code == ExitCode.INPUT and str(deep.parent)[:80] in message
        assert "\n" not in message and len(message) < 300
    finally:
        subprocess.run(["rm", "-rf", deep.parent / "copy", deep.parent / "e"], check=True)


def test_a_recursion_of_ours_is_a_fault_of_ours():
    def again(path: Path):
        again(path)

    with pytest.raises(RecursionError) as raised:
        again(Path())
    assert explain(raised.value) is None
