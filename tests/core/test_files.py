"""Files are there whole or not at all, also when many processes write the same one."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from segfleet.core import files, lock
from segfleet.core.errors import explain
from segfleet.core.progress import EventFollower

WRITERS = """
import sys, os, socket
from pathlib import Path
os.getpid = lambda: 7  # as in containers that share a disk: each has a process 7
socket.gethostname = lambda: "node"
from segfleet.core.files import write_atomically
for turn in range(100):
    write_atomically(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_said_with_the_file_that_was_to_be_written(tmp_path, monkeypatch, number):
    """The kernel names no file: whoever writes may have many."""

    def full(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "sync_file", full)
    with pytest.raises(OSError) as error:
        files.write_json(tmp_path / "scores.json", {})
    words, code = explain(error.value)
    assert str(tmp_path / "scores.json") in words and code == 2
    assert not list(tmp_path.iterdir())


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


def test_paths_are_absolute_as_their_user_sees_them(tmp_path, monkeypatch):
    """/home/me is a link to /net/vol/me, which only this machine has."""
    (tmp_path / "net/vol/me/proj").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/me").symlink_to(tmp_path / "net/vol/me")
    home = tmp_path / "home/me"
    monkeypatch.chdir(home / "proj")
    monkeypatch.setenv("PWD", str(home / "proj"))
    for given, found in [
        ("runs", home / "proj/runs"),
        (".", home / "proj"),
        ("./a//b/", home / "proj/a/b"),
        ("../store", home / "store"),
        (str(home / "store"), home / "store"),
        ("../../other", tmp_path / "net/vol/other"),  # as the system finds it, not as `cd` would
    ]:
        assert files.absolute(given) == found, given
    for stale in (str(tmp_path), "home", "/nowhere", ""):  # left by a program that changed folders
        monkeypatch.setenv("PWD", stale)
        assert files.absolute("runs") == tmp_path / "net/vol/me/proj/runs"


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


def test_a_document_vouches_for_itself(tmp_path, capsys):
    path = tmp_path / "document.json"
    files.write_json(path, {"dice": 0.5, "sharp": "ü"})
    assert files.read_json(path) == {"dice": 0.5, "sharp": "ü"}
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert files.read_json(path) is None
    assert f"{path} is damaged" in capsys.readouterr().err
    path.write_text('{"no": "hash"}')
    assert files.read_json(path) == {"no": "hash"}
    assert files.read_json(tmp_path / "none.json") is None
    assert not capsys.readouterr().err
    path.write_text("[1]")
    assert files.read_json(path) is None and files.read_json(path, list) == [1]


def test_the_hash_of_a_document_is_that_of_its_plain_json():
    plain = b'{"a":1,"b":[2,null]}'
    assert files.digest_of({"b": [2, None], "a": 1}) == hashlib.sha256(plain).hexdigest()


def test_a_private_file_gets_the_rights_of_its_folder(tmp_path):
    path = tmp_path / "weights"
    path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        files.share_as_others(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["weights"]


def test_a_new_file_is_open_to_whom_the_folders_acl_names(tmp_path):
    """One that a library made private, too."""
    colleague, nobody = 4711, 2**32 - 1
    entries = [(1, 7, nobody), (2, 7, colleague), (4, 5, nobody), (16, 7, nobody), (32, 0, nobody)]
    default = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", default)
    except OSError:
        pytest.skip("a file system without access control lists")
    (tmp_path / "weights").touch(mode=0o600)
    files.share_as_others(tmp_path / "weights")
    files.write_atomically(tmp_path / "facts", b"bytes")
    for name in ("weights", "facts"):
        found = os.getxattr(tmp_path / name, "system.posix_acl_access")
        rights = {tag: rights for tag, rights, _ in struct.iter_unpack("<HHI", found[4:])}
        assert (rights[2] & rights[16], rights[32]) == (6, 0), name


def synced(monkeypatch) -> list[str]:
    """The names of what is synced from here on, in order, among the renames."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old, new):
        done.append(f"-> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(files.os, "replace", renamed)
    return done


def test_synced_renamed_and_the_folder_synced(tmp_path, monkeypatch):
    done = synced(monkeypatch)
    files.write_atomically(tmp_path / "file", "content")
    assert [name.endswith(".partial") for name in done] == [True, False, False]
    assert done[1:] == ["-> file", tmp_path.name]


def test_every_new_folder_is_synced_in_its_parent(tmp_path, monkeypatch):
    done = synced(monkeypatch)
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and done == [tmp_path.name, "a"]


def test_file_facts(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert files.file_facts(path) == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_not_waited_for(tmp_path, capsys, make):
    path = tmp_path / "events.jsonl"
    make(path)
    with pytest.raises(ValueError, match="no file"):
        files.read_file(path)
    assert files.read_json(path) is None
    assert "damaged and is left out" in capsys.readouterr().err
    assert EventFollower(tmp_path).new() == []
    assert lock.holder(path) is None and not lock.is_locked(path)
