"""Files are there whole or not at all, also when many processes write the same one."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from segfleet.core import files

WRITERS = """
import sys, os, socket
from pathlib import Path
os.getpid = lambda: 7  # as in containers that share a disk: each has a process 7
socket.gethostname = lambda: "node"
from segfleet.core.files import write_atomically
for turn in range(100):
    write_atomically(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


def test_many_writers_with_one_process_number(tmp_path):
    path = tmp_path / "index.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITERS, str(path), letter], stderr=subprocess.PIPE)
        for letter in "abc"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 5000 and len(set(text)) == 1
            seen.add(text[0])
    assert [writer.communicate()[1] for writer in writers] == [b""] * 3
    assert seen and [found.name for found in tmp_path.iterdir()] == ["index.json"]


def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomically(path, "old")

    def full(handle):
        assert path.read_text() == "old", "written in place"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_names_and_rights(tmp_path):
    path = tmp_path / ("n" * 240 + ".json")
    first, second = files.temporary_name(path), files.temporary_name(path)
    assert first != second and first.parent == tmp_path and first.name.startswith(".n")
    assert socket.gethostname().partition(".")[0][:16] in first.name
    assert len(os.fsencode(first.name)) < 255
    old = os.umask(0o027)
    try:
        files.write_atomically(path, b"bytes")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"bytes" and stat.S_IMODE(path.stat().st_mode) == 0o640
