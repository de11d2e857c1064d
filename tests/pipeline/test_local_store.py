"""A store copied to a disk of the node: once, whole, shared, mended; and the same result as
without."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from segfleet.core.errors import InputError
from segfleet.pipeline.data.staged_store import on_node
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.stop import Interrupted
from segfleet.preprocess.stores import staged_copy as module
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.staged_copy import local_copy
from segfleet.preprocess.stores.verify import verify
from segfleet.slurm.jobspec import make_spec
from segfleet.slurm.submission import write_job

NEVER = SimpleNamespace(asked=lambda: False)
ALL_FREE = shutil.disk_usage


@pytest.fixture
def copied(monkeypatch):
    """The files copied so far, by their source."""
    names, plain = [], module._copy

    def copy(source, *rest):
        plain(source, *rest)
        names.append(source)

    monkeypatch.setattr(module, "_copy", copy)
    return names


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_copy_is_made_once_and_found_again(tiny_store, tmp_path, copied, format):
    source = tiny_store(dims=2, format=format)
    told = []
    copy = local_copy(source, str(tmp_path))
    assert not copy.whole() and copy.make(told.append) and copy.whole()
    assert not verify(copy.root) and not copy.partial.exists()
    manifest = open_store(source).manifest
    assert len(copied) == len({**manifest.tables, **manifest.files}) and len(told) == 1
    assert local_copy(source, str(tmp_path)).make(told.append)
    assert len(copied) == len(set(copied)) and len(told) == 1


@pytest.mark.parametrize("damage", ["byte", "shorter", "gone", "manifest"])
def test_a_damaged_copy_is_mended(tiny_store, tmp_path, copied, damage):
    copy = local_copy(tiny_store(dims=2), str(tmp_path))
    copy.make(print)
    copied.clear()
    path = copy.root / (
        "manifest.json"
        if damage == "manifest"
        else next(iter(open_store(copy.root).manifest.files))
    )
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "byte" else data[:-1])
    assert not copy.whole()
    assert copy.make(print) and copy.whole() and path.read_bytes() == data
    assert len(copied) == (0 if damage == "manifest" else 1)


def test_a_killed_copy_is_gone_on_with(tiny_store, tmp_path, copied):
    source = tiny_store(dims=2)
    manifest = open_store(source).manifest
    _, *rest = (*manifest.tables, *manifest.files)
    copy = local_copy(source, str(tmp_path))
    killed = (
        "import sys; from segfleet.preprocess.stores import staged_copy as m; plain = m._copy; "
        "import os\n"
    )
    killed += "def copy(*a): plain(*a); os.kill(os.getpid(), 9)\n"
    killed += "m._copy = copy; m.local_copy(sys.argv[1], sys.argv[2]).make(print)"
    assert (
        subprocess.run([sys.executable, "-c", killed, source, tmp_path], check=False).returncode
        == -9
    )
    assert copy.partial.is_dir() and not copy.root.exists()
    (copy.partial / rest[0]).parent.mkdir(parents=True, exist_ok=True)
    (copy.partial / rest[0]).write_bytes(b"half")
    assert copy.make(print) and copy.whole() and not verify(copy.root)
    assert sorted(copied) == sorted(source / path for path in rest)


def test_without_room_one_warning_and_the_source(tiny_store, tmp_path, monkeypatch):
    source, told = tiny_store(dims=2), []
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: ALL_FREE(path)._replace(free=1000)
    )
    with on_node(open_store(source), str(tmp_path), Ranks(), NEVER, told.append) as store:
        assert store.root == source
    assert len(told) == 1 and "no room" in told[0] and str(source) in told[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_old_copies_go_only_when_unused_and_needed(tiny_store, tmp_path, monkeypatch):
    copies = [local_copy(tiny_store(dims=2, cases=cases), str(tmp_path)) for cases in (5, 6, 7)]
    for copy in copies[:2]:
        copy.make(print)
    old, young, new = copies
    for number, copy in enumerate((old, young)):
        with copy.in_use():
            os.utime(copy.place / f"{copy.key}.used", (number, number))
    size = sum(path.stat().st_size for path in old.root.rglob("*"))
    needed = sum(facts["bytes"] for facts in open_store(new.source).manifest.files.values())
    monkeypatch.setattr(
        module.shutil,
        "disk_usage",
        lambda path: ALL_FREE(path)._replace(free=needed + module.SPARE - size // 2),
    )
    told = []
    with old.in_use(), young.in_use():
        assert not new.make(told.append) and len(told) == 1 and old.whole() and young.whole()
    with old.in_use():
        assert new.make(told.append) and old.whole() and not young.root.exists()


def test_a_damaged_source_is_named(tiny_store, tmp_path):
    source = tmp_path / "store"
    shutil.copytree(tiny_store(dims=2), source)
    path = source / next(iter(open_store(source).manifest.files))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=f"{path} is damaged"):
        local_copy(source, str(tmp_path)).make(print)


def test_bad_places_are_named(tiny_store, tmp_path, monkeypatch):
    source = tiny_store(dims=2)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    monkeypatch.delenv("NOWHERE", raising=False)
    for place, word in (
        ("$NOWHERE/x", "NOWHERE is not set on"),
        ("here", "absolute"),
        (f"{tmp_path}/file", "file is a file"),
        (f"{tmp_path}/link", "link is a link to no folder"),
    ):
        with pytest.raises(InputError, match=word):
            local_copy(source, place)


def test_variables_are_the_nodes(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH_OF_JOB", str(tmp_path))
    assert local_copy(tiny_store(dims=2), "${SCRATCH_OF_JOB}/a").place.parent == tmp_path / "a"


def test_a_stop_ends_the_waiting_for_another_copier(tiny_store, tmp_path):
    source = tiny_store(dims=2)
    copy = local_copy(source, str(tmp_path))
    asked = SimpleNamespace(asked=lambda: True)
    with open(copy.place / f"{copy.key}.making", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(Interrupted),
            on_node(open_store(source), str(tmp_path), Ranks(), asked, print),
        ):
            pass


def test_two_ranks_copy_once_and_train_the_same(tiny_store, tmp_path):
    recipe = {
        "name": "tiny", "data": {"store": str(tiny_store(dims=2)), "batch": 4, "patch": [16, 16]},
        "save_every": 5,
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [{"epochs": 1, "steps": 4, "lr": 1e-2}],
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    made = {}
    for runs, more in (("plain", []), ("near", ["--stage-to", "$SCRATCH"])):
        command = [
            sys.executable,
            "-m",
            "segfleet.cli.main",
            "train",
            "tiny.yaml",
            "--ranks",
            "2",
            "--runs",
            runs,
            "--json",
            *more,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCRATCH": str(tmp_path / "scratch")}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        run = Path(json.loads(done.stdout)["run"])
        made[runs] = run.name, run, done.stderr.count("store copied to")
    assert [copies for _, _, copies in made.values()] == [0, 1]
    assert len({uid for uid, _, _ in made.values()}) == 1
    plain, near = (
        load_file(next(run.glob("checkpoints/*/weights.safetensors")))
        for _, run, _ in (made["plain"], made["near"])
    )
    assert all(torch.equal(plain[name], near[name]) for name in plain)


def test_a_submitted_job_carries_the_variable_itself(tmp_path):
    spec = make_spec({"stage_to": "$TMPDIR/stores"}, None, places=())
    folder = write_job(tmp_path / "run", Train(recipe={}, root=tmp_path), spec)
    assert json.loads((folder / "job.json").read_text())["stage_to"] == "$TMPDIR/stores"
    with pytest.raises(InputError, match="stage_to: found 'here'"):
        make_spec({"stage_to": "here"}, None, places=())


def test_a_folder_that_others_could_read_or_replace_is_refused(tiny_store, tmp_path):
    store, place = tiny_store(dims=2), tmp_path / f"segfleet-{os.getuid()}"

    def refused(words):
        with pytest.raises(InputError, match=words):
            local_copy(store, str(tmp_path))

    place.mkdir(mode=0o755)
    os.chmod(place, 0o755)
    refused("open to others .mode 755, expected 700")
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    refused("is a link or a file")
    place.unlink()
    os.chmod(tmp_path, 0o777)
    refused("can replace folders in it")
    assert not place.exists(), "an empty folder where nothing may be put"
    os.chmod(tmp_path, 0o1777)
    assert local_copy(store, str(tmp_path)).place == place
    if os.getuid() == 0:
        os.chown(place, 65534, 65534)
        refused("belongs to user 65534")
        os.chown(place, 0, 0)
