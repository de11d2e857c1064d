"""A power cut at any moment of a save leaves what was there before or what came after, whole, and
never less than what was said to be saved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.pipeline import checkpoint
from segfleet.pipeline.inference import inputs
from segfleet.pipeline.inference.collect import collect
from segfleet.pipeline.run import StageFolder
from segfleet.pipeline.scoring import scored
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.writer import write_label
from segfleet.preprocess.stores.base import open_store


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem + "_of_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


crash = loaded(Path(__file__).with_name("power_cut.py"))


def saved(step: int) -> dict:
    return {"weights": {"w": torch.full((64,), float(step))}}


def test_the_recorder_sees_what_is_not_synced(tmp_path):
    """A write and rename without a sync, as most programs save, must not pass."""
    root = tmp_path / "root"
    root.mkdir()
    with crash.Recorder(root) as recorder:
        (root / "a.partial").write_bytes(b"whole")
        crash.os.replace(root / "a.partial", root / "a")
    found = {(left / "a").read_bytes() if (left / "a").exists() else None
             for left in recorder.survivors(tmp_path / "left")}  # fmt: skip
    assert found == {None, b"wh"}


def test_a_checkpoint(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    checkpoint.save(root / "checkpoints", 1, saved(1), {})
    acknowledged = []
    with crash.Recorder(root) as recorder:
        for step in (2, 3, 4):
            checkpoint.save(root / "checkpoints", step, saved(step), {})
            acknowledged.append((len(recorder.moments), step))
            checkpoint.prune(root / "checkpoints", 2)
    for count, left in enumerate(recorder.survivors(tmp_path / "left")):
        warned: list[str] = []
        found = checkpoint.latest(left / "checkpoints", warned.append)
        assert found is not None and warned == [], (count, warned)
        assert torch.equal(found.tensors("weights")["w"], saved(found.step)["weights"]["w"])
    for moment, step in acknowledged:  # the harshest: nothing that was not synced
        for trees in recorder.moments[moment:]:
            names = {name.split("/")[1] for name in trees[0] if name.startswith("checkpoints/step")}
            assert names and max(names) >= checkpoint.folder_name(step)


@pytest.mark.parametrize("name", ["done.json", "evaluation.json"])
def test_a_document_is_the_old_or_the_new_one(tmp_path, name, capsys):
    root = tmp_path / "root"
    root.mkdir()

    def write(value: float) -> None:
        if name == "done.json":
            best = {"dice": {"value": value, "step": 1}}
            StageFolder(path=root, index=0).finish("step-00000001", steps=1, best=best, skipped=0)
        else:
            scored.write_evaluation(root, {"summary": {"mean_foreground_dice": value}})

    write(0.25)
    with crash.Recorder(root) as recorder:
        write(0.5)
    found = {json.dumps(read_json(left / name)) for left in recorder.survivors(tmp_path / "left")}
    assert len(found) == 2 and all(number in "".join(found) for number in ("0.25", "0.5"))
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_store_is_whole_or_none(tmp_path, format):
    write_tiny_store = loaded(Path(__file__).parents[1] / "conftest.py").write_tiny_store
    root = tmp_path / "root"
    root.mkdir()
    with crash.Recorder(root) as recorder:
        write_tiny_store(root / "store", 2, format, 2, 1, 24, 1)
    whole = 0
    for left in recorder.survivors(tmp_path / "left"):
        if not (left / "store" / "manifest.json").exists():
            continue
        try:
            store = open_store(left / "store")
        except InputError:
            pytest.fail(f"{left}: a manifest that vouches for nothing")
        for case in store.manifest.cases:
            store.stored(case), store.truth(case) if case.has_truth else None
        whole += 1
    assert whole


def test_a_prediction_is_vouched_for_only_when_it_is_there(tmp_path):
    root, image = tmp_path / "root", tmp_path / "case.nii.gz"
    root.mkdir()
    identity = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    geometry = Geometry(shape=(4, 8, 8), affine=identity)
    write_label(image, np.zeros((4, 8, 8), np.uint8), geometry)
    (one,) = collect([image], 1, "")
    inputs.prepare_folder(root, [one], "run")
    facts = {"image": one.content(), "made_by": "run"}
    with crash.Recorder(root) as recorder:
        for value in (1, 2):
            inputs.forget(root, one)
            write_label(root / one.output, np.full((4, 8, 8), value, np.uint8), geometry)
            inputs.vouch(root, one, facts)
    vouched = set()
    for left in recorder.survivors(tmp_path / "left"):
        try:
            if inputs.is_made(left, one, facts):
                vouched.add((left / one.output).read_bytes())
        except InputError as error:  # said, and nobody takes it for whole
            assert "not as it was written" in str(error) or "no note says" in str(error)
    assert len(vouched) == 2


def test_write_json_says_so_only_when_it_is_on_disk(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with crash.Recorder(root) as recorder:
        write_json(root / "a.json", {"x": 1})
    assert json.loads(recorder.moments[-1][0]["a.json"])["x"] == 1
