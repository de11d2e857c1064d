"""Ray's folder on every node is its user's alone, although Ray opens its own to everybody."""

from __future__ import annotations

import os

import pytest

from segfleet.core.errors import InputError
from segfleet.slurm.ray_nodes import INSIDE, LONGEST, private_folder, short_folder


def test_the_heads_folder_is_made_on_another_node_and_goes_with_its_ray(tmp_path):
    folder = tmp_path / "sf-x"
    before = os.umask(0)
    try:
        with private_folder(folder):
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "ray").mkdir()
    finally:
        os.umask(before)
    assert not folder.exists()


def test_a_node_that_is_the_heads_machine_leaves_its_folder(tmp_path):
    folder = tmp_path / "sf-x"
    folder.mkdir(mode=0o700)
    with private_folder(folder):
        pass
    assert folder.is_dir()


@pytest.mark.parametrize("how", ["open", "a link", "a file", "no place"])
def test_a_folder_that_somebody_else_may_enter_is_refused(tmp_path, how):
    folder = tmp_path / "sf-x"
    if how == "open":
        folder.mkdir()
        folder.chmod(0o755)
    elif how == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    elif how == "a file":
        folder.touch(mode=0o600)
    else:
        folder = tmp_path / "nothing" / "sf-x"
    before = list(tmp_path.iterdir())
    with pytest.raises(InputError, match="sf-x"), private_folder(folder):
        pytest.fail("it was used")
    assert list(tmp_path.iterdir()) == before


def test_the_longest_folder_leaves_room_for_the_names_of_sockets(tmp_path, monkeypatch):
    session = "session_2026-11-30_08-42-45_619030_4194304"  # the highest number of a process
    path = f"{'x' * LONGEST}/sf-12345678/{INSIDE}/{session}/sockets/plasma_store"
    assert len(path) <= 107
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * LONGEST)))
    assert len(short_folder()) <= LONGEST
