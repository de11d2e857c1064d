"""Another user of the machine gets nothing of a job's private places, however open the folder above
them is. Whole commands: benchmarks/two_users.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from segfleet.core.litter import temporary_folder
from segfleet.pipeline.launch import rendezvous
from segfleet.pipeline.ranks import TIMEOUT
from segfleet.preprocess.stores.staged_copy import local_copy

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")


@pytest.fixture
def place(monkeypatch):
    """As /tmp is."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="two-users-"))
    os.chmod(folder, 0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def got_by_nobody(paths: list[Path]) -> list[str]:
    """Which of them the user nobody reads, writes or moves away."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        found = []
        for path in paths:
            with suppress(OSError):
                path.read_bytes() if path.is_file() else os.listdir(path)
                found.append(f"reads {path.name}")
            with suppress(OSError):
                os.open(path / "new" if path.is_dir() else path, os.O_WRONLY | os.O_CREAT)
                found.append(f"writes {path.name}")
            with suppress(OSError):
                os.rename(path, path.with_name(path.name + ".moved"))
                found.append(f"moves {path.name}")
        os.write(theirs, "\n".join(found).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        found = file.read().splitlines()
    os.waitpid(child, 0)
    return found


def test_another_user_gets_nothing(place, tiny_store):
    copy = local_copy(tiny_store(dims=2), str(place))
    assert copy.make(print)
    with temporary_folder() as folder:
        store = rendezvous.join(folder / "address", 0, 2, "127.0.0.1", TIMEOUT)
        private = [path for top in (folder, copy.place) for path in (top, *top.rglob("*"))]
        assert len(private) > 5 and got_by_nobody(private) == []
        del store
    public = place / "public"
    public.write_text("to see that nobody looks")
    os.chmod(public, 0o666)
    assert got_by_nobody([public]) == ["reads public", "writes public"]
