"""A shard is there completely or not at all, and only with values a network can train on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from segfleet.core.errors import InputError
from segfleet.preprocess.stores.base import store_module

CHUNK = (4, 8, 16)


def test_values_that_are_not_finite_are_refused(tmp_path, fmt, drawn):
    image, label, _ = drawn()
    image[0, 1, 2, 3] = np.inf
    with pytest.raises(InputError, match="case-7.*nan or beyond float16"):
        store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16").write(
            "case-7", image, label, None
        )
    assert not list(tmp_path.iterdir())


def test_every_file_is_synced_before_the_shard_is_named(tmp_path, fmt, drawn, monkeypatch):
    """A power cut after the rename finds whole files under the shard's name."""
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        events.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(old, new):
        events.append(f"{old} -> {new}")
        replace(old, new)

    writer = store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16")
    writer.write("c", *drawn())
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files = writer.publish()
    at = events.index(f"{writer.partial} -> {writer.final}")
    before = {path.replace(str(writer.partial), str(writer.final), 1) for path in events[:at]}
    assert {str(tmp_path / path) for path in files} <= before
    assert str(tmp_path) in events[at:]


def test_a_wrong_type_or_shape_is_the_programmers_mistake(tmp_path, fmt, drawn):
    image, label, _ = drawn()
    for wrong in (
        (image.astype(np.float32), label),
        (image, label.astype(int)),
        (image, label[1:]),
        (image[0], label),
    ):
        writer = store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16")
        with pytest.raises(TypeError, match="expected"):
            writer.write("c", *wrong, None)
    assert not list(tmp_path.iterdir())


def test_nothing_is_there_before_publish_and_publish_is_idempotent(tmp_path, fmt, drawn, publish):
    image, label, truth = drawn()
    writer = store_module(fmt).Writer(tmp_path, "data/s", chunk=CHUNK, dtype="float16")
    writer.write("c", image, label, truth)
    assert [p.name.endswith(".partial") for p in (tmp_path / "data").iterdir()] == [True]
    files = writer.publish()
    assert writer.publish() == files and files
    assert not list(tmp_path.rglob("*.partial"))
    for path, facts in files.items():
        assert (tmp_path / path).stat().st_size == facts["bytes"]
    writer.abandon()
    assert all((tmp_path / path).is_file() for path in files)
    again = store_module(fmt).Writer(tmp_path, "data/s", chunk=CHUNK, dtype="float16")
    again.write("c", image, label, truth)
    assert again.publish() == files  # in the place of the first, byte for byte
    assert not list(tmp_path.rglob("*.partial"))


def test_an_abandoned_writer_leaves_nothing(tmp_path, fmt, drawn):
    image, label, truth = drawn()
    writer = store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16")
    writer.write("c", image, label, truth)
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_cleared(tmp_path, fmt, drawn, publish):
    image, label, truth = drawn()
    code = (
        "import os, sys, numpy as np; from pathlib import Path; from "
        "segfleet.preprocess.stores.base import store_module\n"
        "w = store_module(sys.argv[1]).Writer(Path(sys.argv[2]), 's', chunk=(4, 8, 16), "
        "dtype='float16')\n"
        "w.write('c', np.ones((2, 9, 9, 9), 'float16'), np.ones((9, 9, 9), 'uint8'), None); "
        "os._exit(9)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, fmt, str(tmp_path)], timeout=60).returncode == 9
    )
    assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
    store = publish(tmp_path, fmt, {"s": {"c": (image, label, truth)}})
    np.testing.assert_array_equal(store.label(store.manifest.cases[0]), label)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def incompressible(shape=(16, 64, 64)):
    draw = np.random.default_rng(0)
    return draw.integers(0, 2**15, (1, *shape)).astype(np.int16), draw.integers(
        0, 255, shape
    ).astype(np.uint8)


def test_a_full_disk_leaves_nothing(small_disk, fmt, publish):
    """196 KB a case until the disk is full."""
    image, label = incompressible()
    writer = store_module(fmt).Writer(small_disk, "data/s", chunk=(8, 64, 64), dtype="int16")
    with pytest.raises(OSError) as caught:
        for i in range(20):
            writer.write(f"c{i}", image, label, None)
        writer.publish()
    assert caught.value.errno == errno.ENOSPC
    assert list((small_disk / "data").iterdir()) == []
    assert shutil.disk_usage(small_disk).free > 1.9e6
    # there is room for a smaller one
    store = publish(small_disk, fmt, {"data/s": {"c": (image, label, None)}}, chunk=(8, 64, 64))
    np.testing.assert_array_equal(store.label(store.manifest.cases[0]), label)
    store.close()


@pytest.mark.parametrize("free", [0, 4096, 20000])
def test_a_disk_that_is_full_at_the_start(small_disk, fmt, free):
    (small_disk / "data").mkdir()
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192 - free))
    (small_disk / "rest").write_bytes(bytes(8192))
    image, label = incompressible()
    with pytest.raises(OSError) as caught:
        store_module(fmt).Writer(small_disk, "data/s", chunk=(8, 64, 64), dtype="int16").write(
            "c", image, label, None
        )
    assert caught.value.errno == errno.ENOSPC
    assert list((small_disk / "data").iterdir()) == []
