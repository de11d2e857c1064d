"""A checkpoint is complete or not there; a damaged one is named and the one before it is used."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from segfleet.pipeline import checkpoint
from segfleet.pipeline.scoring.score import averaged


def tensors(step: int) -> checkpoint.Tensors:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "a.weight": torch.randn(3, 4, 5, 5, generator=generator).to(
            memory_format=torch.channels_last
        ),
        "n": torch.tensor(step),
    }
    return {
        "weights": weights,
        "optimizer": {"a.weight.exp_avg": torch.randn(3, 4, 5, 5, generator=generator)},
    }


def test_round_trip_is_exact(tmp_path):
    path = checkpoint.save(tmp_path, 7, tensors(7), {"note": "x"})
    found = checkpoint.latest(tmp_path, pytest.fail)
    assert found.path == path and found.step == 7 and found.state["note"] == "x"
    for group, named in tensors(7).items():
        loaded = found.tensors(group)
        assert loaded.keys() == named.keys()
        assert all(
            torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
            for name, value in named.items()
        )
    assert found.tensors("ema") == {}
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


def test_all_is_on_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    """As whoever cuts the power sees it: files, their names, the folders above them, and only then
    the name that says it is whole."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(old, new):
        events.append(f"{old} -> {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    root = tmp_path / "run" / "checkpoints"
    partial = checkpoint.write(root, 7, {"weights": {"w": torch.ones(3)}}, {"epoch": 1})
    files = [path for path in partial.iterdir() if path.name != "manifest.json"]
    assert {path.name for path in files} == {"weights.safetensors", "state.json"}
    target = checkpoint.publish(partial, root, 7)
    named = events.index(f"{partial} -> {target}")
    before, after = events[:named], events[named + 1 :]
    assert {*map(str, files), str(partial), str(tmp_path), str(tmp_path / "run")} <= {*before}
    assert str(root) in after
    whole = next(
        k for k, event in enumerate(events) if event.endswith(f"> {partial}/manifest.json")
    )
    assert all(events.index(str(path)) < whole for path in files)


def test_a_damaged_one_of_the_same_step_makes_room_and_a_whole_one_stays(tmp_path):
    first = checkpoint.save(tmp_path, 7, tensors(7), {"note": "first"})
    again = checkpoint.save(tmp_path, 7, tensors(8), {"note": "again"})
    assert again == first and checkpoint.read(first).state["note"] == "first"
    (first / "left.txt").write_text("of whoever damaged it")
    (first / "state.json").write_text("{}")
    checkpoint.save(tmp_path, 7, tensors(8), {"note": "again"})
    assert checkpoint.read(first).state["note"] == "again" and not (first / "left.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path):
    path = checkpoint.save(tmp_path, 7, tensors(7), {})
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-of-mine").mkdir()
    assert checkpoint.steps(tmp_path) == [path]


def test_a_manifest_names_files_beside_it_alone(tmp_path):
    """A file elsewhere is none of the checkpoint's, though its hash be right."""
    path = checkpoint.save(tmp_path, 7, tensors(7), {})
    os.replace(path / "optimizer.safetensors", tmp_path / "optimizer.safetensors")
    document = json.loads((path / "manifest.json").read_text())
    document["files"]["../optimizer.safetensors"] = document["files"].pop("optimizer.safetensors")
    (path / "manifest.json").write_text(json.dumps(document))
    assert checkpoint.damage(path) == "../optimizer.safetensors is missing"


def test_an_old_one_that_cannot_be_removed_stops_no_training(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {})

    def refused(*_, **__):
        raise PermissionError("somebody reads it")

    monkeypatch.setattr(os, "unlink", refused)
    monkeypatch.setattr(os, "rmdir", refused)
    checkpoint.prune(tmp_path, keep=1, protect=())
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000003"]


def test_of_averaged_weights_only_the_others_are_read(tmp_path):
    """A network that is to predict takes its memory once, not again for what it does not use."""
    average = {"a.weight": tensors(7)["weights"]["a.weight"] + 1}
    checkpoint.save(tmp_path, 7, {**tensors(7), "ema": average}, {})
    found, asked = checkpoint.latest(tmp_path, pytest.fail), []
    read = checkpoint.Checkpoint.tensors

    class Seen(checkpoint.Checkpoint):
        def tensors(self, group, without=()):
            answer = read(self, group, without)
            asked.append((group, set(answer)))
            return answer

    seen = Seen(**{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
    judged = averaged(seen)
    assert torch.equal(judged["a.weight"], average["a.weight"]) and judged["n"] == 7
    assert sorted(asked) == [("ema", {"a.weight"}), ("weights", {"n"})]


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name, harm):
    checkpoint.save(tmp_path, 1, tensors(1), {})
    newest = checkpoint.save(tmp_path, 2, tensors(2), {}) / name
    raw = bytearray(newest.read_bytes())
    if harm == "flip":
        raw[len(raw) // 2] ^= 1
        newest.write_bytes(raw)
    elif harm == "cut":
        newest.write_bytes(raw[:-3])
    else:
        newest.unlink()
    said = []
    assert checkpoint.latest(tmp_path, said.append).step == 1
    assert (
        len(said) == 1
        and "step-00000002 is damaged" in said[0]
        and "using the one before it" in said[0]
    )
    assert name in said[0] or name == "manifest.json"
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load(newest.parent)


def test_when_none_is_left_it_says_so(tmp_path):
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, tensors(step), {}) / "weights.safetensors").write_bytes(
            b""
        )
    said = []
    assert checkpoint.latest(tmp_path, said.append) is None
    assert ["using the one before it" in line for line in said] == [True, False]
    assert (
        "step-00000001 is damaged" in said[1]
        and "none is left, starting from the beginning" in said[1]
    )


def test_every_flipped_byte_of_the_manifest_is_harmless_or_found(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(1), {})
    manifest = path / "manifest.json"
    good = manifest.read_bytes()
    for place in range(len(good)):
        raw = bytearray(good)
        raw[place] ^= 2
        manifest.write_bytes(raw)
        if checkpoint.damage(path) is None:
            assert chr(good[place]).isspace(), (
                f"byte {place} {good[place - 5 : place + 5]} went unnoticed"
            )


def test_leftovers_of_a_killed_save_are_not_checkpoints(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1), {})
    checkpoint.write(tmp_path, 2, tensors(2), {})  # written, never published
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000001"]
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_retention_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, tensors(step), {})
    checkpoint.prune(tmp_path, 2, {"step-00000003"})
    assert [path.name[-1] for path in checkpoint.steps(tmp_path)] == ["3", "5", "6"]


def test_saver_publishes_at_a_boundary_and_raises_what_went_wrong(tmp_path):
    saver = checkpoint.Saver(tmp_path)
    assert saver.poll() is None
    saver.save(4, tensors(4), {})
    assert saver.wait().name == "step-00000004" and saver.wait() is None
    (tmp_path / "file").write_text("")
    saver = checkpoint.Saver(tmp_path / "file" / "no")
    saver.save(5, tensors(5), {})
    with pytest.raises(OSError):
        saver.wait()


class Device:
    """A GPU's streams as a log. The tensors are on the CPU."""

    def __init__(self):
        self.log: list[str] = []

    def current_stream(self, device):
        return self

    def Stream(self, device):
        stream = Device()
        stream.log = self.log
        stream.name = "side"
        return stream

    name = "training"

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the copies")

    @contextmanager
    def stream(self, side):
        self.log.append("on side")
        yield
        self.log.append("on training")

    def record_event(self):
        self.log.append("recorded")
        return self

    def synchronize(self):
        self.log.append(f"{threading.current_thread().name} waits for the copies")


@pytest.fixture
def device(monkeypatch):
    made = Device()
    for name in ("current_stream", "Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(checkpoint, "on_gpu", lambda value: value.ndim > 0)
    monkeypatch.setattr(checkpoint, "pinned", lambda size, dtype: torch.empty(size, dtype=dtype))
    return made


def test_tensors_on_a_gpu_are_fetched_beside_training_and_waited_for_by_the_thread(
    device, tmp_path
):
    saver, buffers = checkpoint.Saver(tmp_path), []
    for step in (1, 2):
        device.log.clear()
        more = {"b": torch.arange(6).view(2, 3)}
        saver.save(step, {"weights": tensors(step)["weights"] | more}, {})
        path = saver.wait()
        found = checkpoint.load(path).tensors("weights")
        assert torch.equal(found["b"], more["b"]) and found["n"] == step
        assert torch.equal(found["a.weight"], tensors(step)["weights"]["a.weight"])
        assert device.log == [
            "side waits for training",
            "on side",
            "recorded",
            "on training",
            "training waits for the copies",
            f"save-{step} waits for the copies",
        ]
        buffers.append({dtype: one.data_ptr() for dtype, one in saver.staging.buffers.items()})
    assert buffers[0].keys() == {torch.float32, torch.int64}, "one for each type"
    assert buffers[0] == buffers[1], "kept"


def test_what_lies_on_the_host_beside_a_gpu_does_not_follow_training(device):
    count = torch.tensor(3)  # of the double, what has no axis is on the host
    kept, _ = checkpoint.Staging().copies({"weights": {"n": count, "w": torch.ones(2)}})
    count.add_(1)
    assert kept["weights"]["n"] == 3


def test_a_buffer_grows_with_what_is_saved(device):
    staging = checkpoint.Staging()
    for size in (3, 7, 5):
        kept, _ = staging.copies({"weights": {"a": torch.full((size,), 1.0 * size)}})
        assert torch.equal(kept["weights"]["a"], torch.full((size,), 1.0 * size))
    assert staging.buffers[torch.float32].numel() == 7


def test_a_save_begins_when_the_one_before_has_left_the_buffers(device, tmp_path, monkeypatch):
    order, written = [], checkpoint.write
    monkeypatch.setattr(
        checkpoint,
        "write",
        lambda *args: (time.sleep(0.2), order.append("written"), written(*args))[-1],
    )
    saver = checkpoint.Saver(tmp_path)
    taken = saver.staging.copies
    monkeypatch.setattr(
        saver.staging, "copies", lambda given: (order.append("copied"), taken(given))[-1]
    )
    for step in (1, 2):
        saver.save(step, tensors(step), {})
    saver.wait()
    assert order == ["copied", "written"] * 2
    for step in (1, 2):
        found = checkpoint.load(tmp_path / checkpoint.folder_name(step)).tensors("weights")
        assert torch.equal(found["a.weight"], tensors(step)["weights"]["a.weight"])


def test_what_is_saved_is_what_training_had_then(tmp_path):
    live = tensors(3)
    kept = tensors(3)["weights"]["a.weight"]
    saver = checkpoint.Saver(tmp_path)
    saver.save(3, live, {})
    live["weights"]["a.weight"].zero_()
    assert torch.equal(checkpoint.load(saver.wait()).tensors("weights")["a.weight"], kept)


def test_what_lies_on_the_host_and_nobody_changes_is_saved_as_it_is(tmp_path):
    live, settled = torch.zeros(3), checkpoint.HostCopies({"b": torch.ones(2)})
    kept, _ = checkpoint.Staging().copies({"weights": {"a": live}, "optimizer": settled})
    assert kept["optimizer"] is settled and kept["weights"]["a"] is not live
    saver = checkpoint.Saver(tmp_path)
    saver.save(1, {"weights": {"a": live}, "optimizer": settled}, {})
    assert torch.equal(checkpoint.load(saver.wait()).tensors("optimizer")["b"], torch.ones(2))


def test_copies_do_not_follow_training():
    live = {"weights": {"w": torch.zeros(3)}}
    kept = checkpoint.copies(live)
    live["weights"]["w"] += 1
    assert not kept["weights"]["w"].any()


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_older_checkpoint_and_no_litter(small_disk: Path):
    checkpoint.save(small_disk, 1, tensors(1), {})
    big = {"weights": {"w": torch.zeros(1_000_000)}}
    with pytest.raises(OSError) as caught:
        checkpoint.save(small_disk, 2, big, {})
    assert caught.value.errno == 28
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(small_disk, pytest.fail).step == 1


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_every_file_is_as_open_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        made = checkpoint.write(tmp_path, 1, {"weights": {"a": torch.ones(2)}}, {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask) and "weights.safetensors" in modes
