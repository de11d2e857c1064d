"""The build: whole or not at all, continued after a kill, the same bytes whoever makes it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import segfleet.preprocess.building.shard_job as shard_job
import segfleet.preprocess.checking.check as check
import segfleet.preprocess.stores.manifest as manifest_module
from segfleet.core.errors import DataError, InputError
from segfleet.core.parallel import run
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import PHANTOMS, write_msd_phantom, write_nnunet_phantom
from segfleet.preprocess.planning.plan import Overrides
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.preprocess.stores.shard_writer import ShardWriter
from segfleet.preprocess.stores.verify import verify
from segfleet.preprocess.transforms.case_transforms import (
    paste,
    preprocess_case,
    resample_axis,
    resample_probabilities,
)

FORMATS = ("zarr", "hdf5")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_msd_phantom(tmp_path_factory.mktemp("raw") / "msd", cases=6, size=(10, 20, 20))


class ProgressMessages:
    """Remembers what the build reported."""

    def __init__(self):
        self.events: list[tuple[str, int, int]] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.events.append((phase, done, total))

    def processed(self, phase: str) -> int | None:
        """Cases this run did itself; None: there was no such phase."""
        done = [event[1] for event in self.events if event[0] == phase]
        return done[-1] - done[0] if done else None


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["dsb2018", "msd", "nnunet"])
def test_layouts_in_every_format(name, format, tmp_path):
    reader = open_reader(name, PHANTOMS[name](tmp_path / "raw"))
    manifest = build(BuildRequest(name, reader.root, tmp_path / "out", format=format, workers=1))
    store = open_store(tmp_path / "out")
    assert (
        store.manifest == manifest
        and manifest.dataset == reader.dataset()
        and not verify(tmp_path / "out", chunks=True)
    )
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "shards",
        *manifest.tables,
    }
    assert [entry.id for entry in manifest.cases] == [ref.id for ref in reader.refs()]
    for ref, entry in list(zip(reader.refs(), manifest.cases, strict=True))[:3]:
        case = reader.read(ref)
        image, label, _ = preprocess_case(
            case, manifest.plan, ignore_label=manifest.dataset.ignore_label
        )
        assert np.allclose(
            store.image(entry), image.astype(np.float32) * manifest.plan.scale, atol=1e-6
        )
        assert np.array_equal(store.label(entry), label)
        assert np.array_equal(
            store.truth(entry) if entry.has_truth else store.label(entry), case.label_ZYX
        )
        assert (
            entry.has_truth == (label.shape != case.label_ZYX.shape)
            and entry.affine == case.geometry.affine
        )
        assert entry.group == case.patient and (reader.root / entry.image_file) == ref.images[0]
        assert manifest.dataset.ignore_label not in entry.foreground and set(
            entry.foreground
        ) <= set(entry.voxels)
    store.close()
    assert (
        manifest.id
        == build(
            BuildRequest(
                name,
                reader.root,
                tmp_path / "other",
                format=next(f for f in FORMATS if f != format),
                workers=1,
            )
        ).id
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_run_does_nothing(format, raw, tmp_path):
    first = build(BuildRequest("msd", raw, tmp_path / "out", format=format, workers=1))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told = ProgressMessages()
    assert (
        build(BuildRequest("msd", raw, tmp_path / "out", format=format, workers=1), progress=told)
        == first
    )
    assert (
        told.processed("compare") == 6
        and told.processed("check") is None
        and told.processed("write") is None
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_do_not_depend_on_the_number_of_workers(format, raw, tmp_path):
    one = build(
        BuildRequest("msd", raw, tmp_path / "one", format=format, workers=1, shard_bytes=50_000)
    )
    two = build(
        BuildRequest("msd", raw, tmp_path / "two", format=format, workers=2, shard_bytes=50_000)
    )
    assert len({entry.shard for entry in one.cases}) > 1 and one.id == two.id
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_size_of_shards_does_not_change_the_content(raw, tmp_path):
    one = build(BuildRequest("msd", raw, tmp_path / "one", workers=1, shard_bytes=1))
    two = build(BuildRequest("msd", raw, tmp_path / "two", workers=1))
    assert (
        one.id == two.id
        and len({e.shard for e in one.cases}) == 6
        and len({e.shard for e in two.cases}) == 1
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_byte_is_found(format, raw, tmp_path):
    manifest = build(
        BuildRequest("msd", raw, tmp_path / "out", format=format, workers=1, shard_bytes=1)
    )
    victim = max(
        (path for path in manifest.files if "00003" in path),
        key=lambda path: manifest.files[path]["bytes"],
    )
    damaged = bytearray((tmp_path / "out" / victim).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "out" / victim).write_bytes(damaged)
    problems = verify(tmp_path / "out")
    assert [(p.case, p.field) for p in problems] == [
        ("phantom_003", victim)
    ] and "sha256" in problems[0].expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_with_what_is_missing(workers, tmp_path):
    raw = write_msd_phantom(tmp_path / "raw", cases=40, size=(16, 40, 40))
    out, state = tmp_path / "out", tmp_path / "out.partial/.state/done"
    script = (
        "from segfleet.preprocess import BuildRequest, build; "
        f"build(BuildRequest('msd', {str(raw)!r}, {str(out)!r}, workers={workers}, shard_bytes=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_for(lambda: len(list(state.glob("*.json"))) >= 5 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the build was faster than the test"
    assert not out.exists()
    settle(state)
    finished = {path.name: path.stat().st_mtime_ns for path in state.glob("*.json")}
    assert 5 <= len(finished) < 40
    told = ProgressMessages()
    manifest = build(BuildRequest("msd", raw, out, workers=1, shard_bytes=1), progress=told)
    assert told.processed("check") == 0, "facts of the first pass were kept"
    assert told.processed("write") == 40 - len(finished) and ("write", 40, 40) == told.events[-1]
    assert manifest == build(BuildRequest("msd", raw, tmp_path / "fresh", workers=1, shard_bytes=1))
    assert files(out) == files(tmp_path / "fresh") and not (tmp_path / "out.partial").exists()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def settle(folder: Path) -> None:
    """Until orphaned workers have gone: they end when their parent does."""
    time.sleep(0.5)
    before = sorted(folder.iterdir())
    time.sleep(0.5)
    assert sorted(folder.iterdir()) == before, "a worker outlived its parent"


def interrupted(
    raw: Path, out: Path, monkeypatch, case: str, error: BaseException, format: str = "zarr",
    name: str = "msd"
) -> Exception:  # fmt: skip
    """Build with one case per shard and a writer that fails at `case`; what was raised."""
    real = shard_job._write_case

    def fail(writer, job, number):
        entry = real(writer, job, number)
        if job.refs[number].id == case:
            raise error
        return entry

    with monkeypatch.context() as patch, pytest.raises(Exception) as caught:
        patch.setattr(shard_job, "_write_case", fail)
        build(BuildRequest(name, raw, out, format=format, workers=1, shard_bytes=1))
    return caught.value


def test_a_changed_source_makes_only_its_shard_anew(raw, tmp_path, monkeypatch):
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    interrupted(raw, tmp_path / "out", monkeypatch, "phantom_004", OSError(errno.EIO, "broken"))
    rewrite(raw / "imagesTr/phantom_001.nii.gz")
    (raw / "imagesTr/phantom_002.nii.gz").touch()
    told = ProgressMessages()
    build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1), progress=told)
    assert told.processed("check") == 2, "both were looked at again"
    assert told.processed("write") == 2, (
        "the changed one, and the one that failed; those after it were written all the same"
    )
    assert files(tmp_path / "out") == files(build_at(raw, tmp_path / "fresh"))


def test_a_changed_plan_makes_everything_anew(raw, tmp_path, monkeypatch):
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    interrupted(raw, tmp_path / "out", monkeypatch, "phantom_004", OSError(errno.EIO, "broken"))
    (raw / "dataset.json").write_text((raw / "dataset.json").read_text().replace('"MRI"', '"CT"'))
    told = ProgressMessages()
    build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1), progress=told)
    assert told.processed("check") == told.processed("write") == 6
    assert files(tmp_path / "out") == files(build_at(raw, tmp_path / "fresh"))


def test_another_plan_alone_makes_every_shard_anew(raw, tmp_path, monkeypatch):
    """Same files, same check, same chunks: only the plan says that the voxels are others."""
    interrupted(raw, tmp_path / "out", monkeypatch, "phantom_004", OSError(errno.EIO, "broken"))
    wish, told = Overrides(normalisation="rescale_to_0_1"), ProgressMessages()
    facts = {"workers": 1, "shard_bytes": 1, "overrides": wish}
    made = build(BuildRequest("msd", raw, tmp_path / "out", **facts), progress=told)
    assert told.processed("write") == 6
    assert build(BuildRequest("msd", raw, tmp_path / "fresh", **facts)) == made
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_shards_of_an_earlier_layout_are_made_anew(raw, tmp_path, monkeypatch):
    """What a killed run of an older version left, and what it finished."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "LAYOUTS", {})
        interrupted(
            raw, out, monkeypatch, "phantom_004", OSError(errno.EIO, "broken"), format="hdf5"
        )
        build(BuildRequest("msd", raw, tmp_path / "old", format="hdf5", workers=1))
    told = ProgressMessages()
    build(BuildRequest("msd", raw, out, format="hdf5", workers=1, shard_bytes=1), progress=told)
    assert told.processed("write") == 6 and not verify(out, chunks=True)
    with pytest.raises(InputError, match="old was made by an earlier version of segfleet"):
        build(BuildRequest("msd", raw, tmp_path / "old", format="hdf5", workers=1))


def test_another_codec_makes_every_shard_anew_with_the_same_id(raw, tmp_path, monkeypatch):
    """Bare Zstandard: begun with blosc, killed, and asked for otherwise."""
    interrupted(raw, tmp_path / "out", monkeypatch, "phantom_004", OSError(errno.EIO, "broken"))
    told = ProgressMessages()
    asked = {"codec": "zstd", "workers": 1, "shard_bytes": 1}
    made = build(BuildRequest("msd", raw, tmp_path / "out", **asked), progress=told)
    assert told.processed("write") == 6 and made.codec == "zstd"
    assert open_store(build_at(raw, tmp_path / "blosc")).manifest.id == made.id
    found = [
        json.loads(path.read_text())["codecs"][0]["configuration"]["codecs"][1]["name"]
        for path in (tmp_path / "out").rglob("image/zarr.json")
    ]
    assert found == ["zstd"] * 6
    with pytest.raises(InputError, match=r"made from something else: codec zstd, now blosc"):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1))


def build_at(raw: Path, out: Path) -> Path:
    build(BuildRequest("msd", raw, out, workers=1, shard_bytes=1))
    return out


def rewrite(path: Path) -> None:
    """Another value in a background voxel: another file, the same fingerprint."""
    import nibabel as nib

    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[1, 1, 1] *= 2
    path.unlink()
    nib.save(nib.Nifti1Image(array, image.affine), path)


def test_a_full_disk_is_one_message_and_keeps_what_is_finished(raw, tmp_path, monkeypatch):
    writes = []
    real = ShardWriter.write

    def full(self, key, image, label, truth):
        writes.append(key)
        if len(writes) > 3:
            real(self, key, image, label, truth)
            self.abandon()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.partial))
        return real(self, key, image, label, truth)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        message = (
            r"no space left in .*: the remaining 3 case\(s\) need about .* MiB, .* are free. Free "
            r"some and run"
        )
        with pytest.raises(InputError, match=message):
            build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1))
    shards = sorted(path.name for path in (tmp_path / "out.partial/shards").iterdir())
    assert shards == ["00000.zarr", "00001.zarr", "00002.zarr"], "nothing of the shard that failed"
    told = ProgressMessages()
    build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1), progress=told)
    assert told.processed("write") == 3 and not verify(tmp_path / "out", chunks=True)


@contextmanager
def crashing(monkeypatch, *cases):
    """Inside, preprocessing of these cases fails by a fault of ours."""
    real = shard_job.preprocess_case

    def crash(case, *args, **options):
        if case.id in cases:
            raise ZeroDivisionError("in the middle")
        return real(case, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "preprocess_case", crash)
        yield


def test_a_crash_names_the_case(raw, tmp_path, monkeypatch):
    with (
        crashing(monkeypatch, "phantom_002"),
        pytest.raises(RuntimeError, match="case 'phantom_002': ZeroDivisionError: in the middle"),
    ):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_all_failures_are_told_once_the_others_are_written(workers, raw, tmp_path, monkeypatch):
    """Two cases that fail, one a user's fault, one ours; then two of the user's."""
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    if workers == 1:
        with (
            crashing(monkeypatch, "phantom_001", "phantom_003"),
            pytest.raises(
                RuntimeError,
                match="2 shards could not be written.*\nphantom_001: .*ZeroDiv.*\nphantom_003: ",
            ),
        ):
            build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1))
        assert len(list((tmp_path / "out.partial/shards").iterdir())) == 4
    paths = [raw / f"imagesTr/phantom_00{number}.nii.gz" for number in (1, 3)]

    def vanish(phase, done, total):
        if phase == "write" and done <= 4:
            [path.unlink(missing_ok=True) for path in paths]

    whole = [path.read_bytes() for path in paths]
    with pytest.raises(
        InputError,
        match=r"2 shards could not be written.*\nphantom_001: .*No such file.*\nphantom_003: .*No "
        r"such file",
    ):
        build(
            BuildRequest("msd", raw, tmp_path / "out", workers=workers, shard_bytes=1),
            progress=vanish,
        )
    for path, data in zip(paths, whole, strict=True):
        path.write_bytes(data)
    told = ProgressMessages()
    build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1), progress=told)
    assert told.processed("write") == 2 and not verify(tmp_path / "out", chunks=True)


def test_a_worker_that_dies_names_its_cases():
    with pytest.raises(RuntimeError, match="a worker process died .* one of: bad"):
        list(run(os._exit, [3, 3], weights=[10, 10], names=["bad", "also"], workers=2, budget=15))


def test_work_stays_within_the_memory_budget(tmp_path):
    """Two workers, but the budget lets one item run at a time: no two lifetimes overlap."""
    spans = [
        span
        for _, span in run(
            nap, [0.2] * 4, weights=[10] * 4, names=list("abcd"), workers=2, budget=15
        )
    ]
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert sorted(
        i for i, _ in run(nap, [0.0] * 3, weights=[99] * 3, names=list("abc"), workers=2, budget=1)
    ) == [0, 1, 2]


def nap(seconds: float) -> tuple[float, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def test_another_build_into_the_same_place_is_refused(raw, tmp_path):
    claim = tmp_path / "out.partial/.state/claim"
    claim.parent.mkdir(parents=True)
    with open(claim, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            InputError, match="another process is preprocessing into .*out. Wait for it"
        ):
            build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    build(BuildRequest("msd", raw, tmp_path / "out", workers=1))


def test_places_that_are_taken_are_refused(raw, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="neither an empty folder nor a store"):
        build(BuildRequest("msd", raw, tmp_path, workers=1))
    with pytest.raises(InputError, match="neither an empty folder nor a store|own folder"):
        build(BuildRequest("msd", raw, raw, workers=1))
    with pytest.raises(InputError, match="format: found 'zip', expected one of: hdf5, zarr"):
        build(BuildRequest("msd", raw, tmp_path / "out", format="zip"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    build(BuildRequest("msd", raw, tmp_path / "empty", workers=1))


def test_a_finished_store_is_never_changed_and_says_what_differs(raw, tmp_path):
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    before = files(tmp_path / "out")
    with pytest.raises(
        InputError, match="format zarr, now hdf5; split seed 12345, now 7. .*choose another --out"
    ):
        build(BuildRequest("msd", raw, tmp_path / "out", format="hdf5", workers=1, split_seed=7))
    text = (raw / "dataset.json").read_text()
    (raw / "dataset.json").write_text(text.replace('"MRI"', '"CT"'))
    with pytest.raises(InputError, match="the description of the data set"):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    (raw / "dataset.json").write_text(text)
    rewrite(raw / "imagesTr/phantom_001.nii.gz")
    with pytest.raises(InputError, match=r"raw files of 1 case\(s\): phantom_001"):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    assert files(tmp_path / "out") == before


def test_other_patients_or_splits_are_told(tmp_path):
    raw = PHANTOMS["cvc_clinicdb"](tmp_path / "cvc", cases=11)
    table = raw / "CVC-ClinicDB/metadata.csv"
    text = table.read_text()
    table.unlink()
    images = raw / "CVC-ClinicDB/Original"
    # one patient for another reason
    (images / "2.tif").write_bytes((images / "1.tif").read_bytes())
    assert (
        "kfold" not in build(BuildRequest("cvc_clinicdb", raw, tmp_path / "out", workers=1)).splits
    )
    table.write_text(text)
    with pytest.raises(
        InputError,
        match=r"something else: patients of 8 case\(s\): 4, 5, 6, 7, 8 .... Published .* another "
        r"--out",
    ):
        build(BuildRequest("cvc_clinicdb", raw, tmp_path / "out", workers=1))
    assert build(BuildRequest("cvc_clinicdb", raw, tmp_path / "new", workers=1)) == build(
        BuildRequest("cvc_clinicdb", raw, tmp_path / "new", workers=1)
    )
    raw = write_nnunet_phantom(tmp_path / "nnunet", cases=4)
    build(BuildRequest("nnunet", raw, tmp_path / "other", workers=1))
    ids = [ref.id for ref in open_reader("nnunet", raw).refs()]
    (raw / "splits_final.json").write_text(json.dumps([{"train": ids[:2], "val": ids[2:]}]))
    with pytest.raises(InputError, match="something else: split nnunet: new. "):
        build(BuildRequest("nnunet", raw, tmp_path / "other", workers=1))


def test_an_older_store_does_not_say_who_was_joined(tmp_path):
    """Its joined patients are no difference; a divided one is."""
    raw = PHANTOMS["cvc_clinicdb"](tmp_path / "cvc", cases=6)
    images = raw / "CVC-ClinicDB/Original"
    (images / "6.tif").write_bytes((images / "1.tif").read_bytes())
    made = build(BuildRequest("cvc_clinicdb", raw, tmp_path / "out", workers=1))
    assert set(made.joined.values()) == {"sequence2"} and {entry.group for entry in made.cases} == {
        "sequence1"
    }
    old = manifest_module.save_manifest(tmp_path / "out", made.model_copy(update={"joined": None}))
    assert build(BuildRequest("cvc_clinicdb", raw, tmp_path / "out", workers=1)).joined is None
    moved = [entry.model_copy(update={"group": "sequence0"}) for entry in old.cases[:2]]
    manifest_module.save_manifest(
        tmp_path / "out", old.model_copy(update={"cases": (*moved, *old.cases[2:])})
    )
    with pytest.raises(InputError, match=r"patients of 3 case\(s\): 1, 2, 3\."):
        build(BuildRequest("cvc_clinicdb", raw, tmp_path / "out", workers=1))


def test_a_resumed_build_has_the_patients_of_today(tmp_path, monkeypatch):
    raw = PHANTOMS["cvc_clinicdb"](tmp_path / "raw", cases=8)
    table = raw / "CVC-ClinicDB/metadata.csv"
    text = table.read_text()
    table.unlink()
    interrupted(
        raw, tmp_path / "out", monkeypatch, "4", OSError(errno.EIO, "broken"), name="cvc_clinicdb"
    )
    table.write_text(text)
    told = ProgressMessages()
    manifest = build(BuildRequest("cvc_clinicdb", raw, tmp_path / "out", workers=1), progress=told)
    assert told.processed("check") == 0 and len(manifest.splits["kfold"]) == 3
    assert manifest == build(BuildRequest("cvc_clinicdb", raw, tmp_path / "fresh", workers=1))


def test_splits_that_come_along_are_in_the_manifest(tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=4)
    ids = [ref.id for ref in open_reader("nnunet", root).refs()]
    (root / "splits_final.json").write_text(json.dumps([{"train": ids[:2], "val": ids[2:]}]))
    manifest = build(BuildRequest("nnunet", root, tmp_path / "out", workers=1))
    assert (
        manifest.fold("nnunet", 0) == {"train": tuple(ids[:2]), "val": tuple(ids[2:])}
        and len(manifest.splits["kfold"]) == 2
    )
    assert manifest.plan.normalisation == ("ct", "zscore") and manifest.dataset.regions


def test_a_perfect_prediction_scores_almost_one_on_the_raw_grid(raw, tmp_path):
    """What resampling costs: the stored label, brought back as probabilities, against the raw
    one."""
    manifest = build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    store = open_store(tmp_path / "out")
    for entry in manifest.cases:
        onehot = np.stack(
            [store.label(entry) == value for value in manifest.dataset.labels.values()]
        ).astype(np.float32)
        box = tuple(stop - start for start, stop in entry.crop)
        back = (
            resample_probabilities(onehot, box, resample_axis(entry.raw_spacing, manifest.plan))
            .argmax(0)
            .astype(np.uint8)
        )
        found, truth = paste(back, entry.crop, entry.raw_shape), store.truth(entry)
        for value in (1, 2):
            a, b = found == value, truth == value
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9
    store.close()


def test_hippocampus_as_a_store(shared_data, tmp_path):
    manifest = build(
        BuildRequest("msd", shared_data("Task04_Hippocampus"), tmp_path / "out", workers=1)
    )
    assert (
        len(manifest.cases) == 208
        and manifest.plan.patch == (40, 56, 40)
        and manifest.plan.target_spacing == (1.0, 1.0, 1.0)
    )
    assert [len(fold["val"]) for fold in manifest.splits["kfold"]] in (
        [42, 42, 42, 41, 41],
        *permuted([42, 42, 42, 41, 41]),
    )
    store = open_store(tmp_path / "out")
    images = [store.image(entry) for entry in manifest.cases[::20]]
    assert all(abs(image.mean()) < 0.01 and abs(image.std() - 1) < 0.01 for image in images)
    store.close()


def permuted(sizes: list[int]) -> list[list[int]]:
    from itertools import permutations

    return [list(p) for p in permutations(sizes)]


def test_nuclei_as_a_store(shared_data, tmp_path):
    raw, source = tmp_path / "raw", shared_data("dsb2018") / "stage1_train"
    for folder in sorted(source.iterdir())[:40]:
        shutil.copytree(folder, raw / "stage1_train" / folder.name)
    manifest = build(BuildRequest("dsb2018", raw, tmp_path / "out", format="hdf5", workers=1))
    assert (
        len(manifest.cases) == 40 and manifest.plan.dtype == "uint8" and manifest.plan.patch[0] == 1
    )
    assert not any(entry.has_truth for entry in manifest.cases) and not verify(
        tmp_path / "out", chunks=True
    )


def test_up_to_date_looks_at_the_store(raw, tmp_path):
    made = build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    path = tmp_path / "out" / next(iter(made.files))
    facts, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for quick in (False, True):  # it is newer than the manifest
        with pytest.raises(DataError, match="sha256"):
            build(BuildRequest("msd", raw, tmp_path / "out", workers=1), quick=quick)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1), quick=True) == made
    )  # what quick misses
    path.write_bytes(data[:-1])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(DataError, match="bytes"):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1), quick=True)


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("cases-*.safetensors", flip, "is damaged"),
        ("manifest.json", empty, "is damaged"),
        ("manifest.json", pipe, "is no regular file"),
        ("shards/*.zarr/zarr.json", empty, "expected"),
    ],
)
def test_of_a_damaged_store_preprocess_says_to_move_it_away(raw, tmp_path, file, damage, said):
    """ "Preprocess the raw data again" alone would lead round in a circle."""
    request = BuildRequest("msd", raw, tmp_path / "out", workers=1)
    build(request)
    damage(next((tmp_path / "out").glob(file)))
    with pytest.raises(InputError, match=f"(?s){said}.*move the store's folder away") as error:
        build(request)
    assert "or choose another --out" in str(error.value)
    if file == "manifest.json":
        with pytest.raises(InputError, match=f"manifest.json {said}"):
            load_manifest(str(tmp_path / "out"))  # as a recipe has it
    shutil.move(tmp_path / "out", tmp_path / "away")
    build(request)


def test_a_resumed_build_finds_a_damaged_shard(raw, tmp_path, monkeypatch):
    straight = build(BuildRequest("msd", raw, tmp_path / "straight", workers=1, shard_bytes=1))
    with monkeypatch.context() as patch:
        patch.setattr("segfleet.preprocess.building.build.save_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1))
    path = tmp_path / "out.partial" / next(iter(straight.files))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)  # of the same size
    assert build(BuildRequest("msd", raw, tmp_path / "out", workers=1, shard_bytes=1)) == straight
    assert verify(tmp_path / "out") == []


def test_what_a_killed_build_left_goes_also_where_nothing_is_to_do(raw, tmp_path, monkeypatch):
    request = BuildRequest("msd", raw, tmp_path / "out", workers=1)
    build(request)
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    left = tmp_path / f"tmp/segfleet-{gone.pid}-abcdefgh"
    left.mkdir(parents=True)
    build(request)
    assert not left.exists()


def test_a_failed_check_keeps_the_facts_of_sound_cases(tmp_path, monkeypatch):
    """The next check of the same folder opens what was mended, whichever command asks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = PHANTOMS["msd"](tmp_path / "raw", cases=8, size=(8, 16, 16))
    broken = raw / "imagesTr/phantom_003.nii.gz"
    sound = broken.read_bytes()
    broken.write_bytes(sound[:100])
    opened = []
    original = check.check_case
    monkeypatch.setattr(check, "check_case", lambda *a: opened.append(a[-1].id) or original(*a))
    for count in (8, 1):
        opened.clear()
        with pytest.raises(DataError, match="phantom_003: file"):
            build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
        assert len(opened) == count
        assert {path.name for path in tmp_path.iterdir()} == {"raw", "cache"}
    (kept,) = (tmp_path / "cache").rglob("*.jsonl")
    assert kept.stat().st_mode & 0o077 == 0, "facts of patients are the user's alone"
    label = raw / "labelsTr/phantom_005.nii.gz"
    os.utime(label, ns=(1, 1))
    opened.clear()
    broken.write_bytes(sound)
    manifest = build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    assert opened == ["phantom_003", "phantom_005"] and len(manifest.cases) == 8
    assert not list((tmp_path / "cache").rglob("*.jsonl")), "forgotten when all is sound"
    fresh = build(BuildRequest("msd", raw, tmp_path / "fresh", workers=1))
    assert fresh.id == manifest.id and fresh.fingerprint == manifest.fingerprint


def test_facts_are_kept_only_where_they_can_be(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = PHANTOMS["msd"](tmp_path / "raw", cases=3, size=(8, 16, 16))
    (raw / "imagesTr/phantom_001.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="phantom_001: file"):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1))


@pytest.mark.parametrize("place", [".", ".."])
def test_a_folder_without_a_name_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = PHANTOMS["msd"](tmp_path / "raw", cases=1)
    with pytest.raises(InputError, match="expected the name of a folder that is made anew"):
        build(BuildRequest("msd", raw, place, workers=1))


def test_somebody_s_partial_folder_is_left_alone(tmp_path):
    raw = PHANTOMS["msd"](tmp_path / "raw", cases=1)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out.partial is there, .* none of ours"):
        build(BuildRequest("msd", raw, tmp_path / "out", workers=1))
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "mine"
