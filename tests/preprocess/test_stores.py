"""One suite for every store format: what is read is what was written, and damage never passes unseen."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from segfleet.preprocess.chunks import LARGEST, SMALLEST, chunk_of
from segfleet.preprocess.digest import content_sha256
from segfleet.preprocess.manifest import CaseEntry, Dataset, Manifest, Plan, load_manifest, save_manifest
from segfleet.preprocess.problems import InputError
from segfleet.preprocess.shard_reader import to_float32
from segfleet.preprocess.stores.base import formats, open_store, store_module
from segfleet.preprocess.verify import verify

CHUNK = (4, 8, 16)
SHAPE = (9, 21, 34)  # no multiple of the chunk


def drawn(shape=SHAPE, dtype="float16", channels=2, seed=0):
    """Image, label and truth of a case, with a region of zeros larger than a chunk."""
    draw = np.random.default_rng(seed)
    image = draw.normal(0, 1, (channels, *shape)) if dtype.startswith("float") else draw.integers(0, 200, (channels, *shape))
    image = image.astype(dtype)
    image[..., shape[1] // 2 :, :] = 0
    label = np.repeat(draw.integers(0, 3, (shape[0], shape[1], 1)), shape[2], axis=2).astype(np.uint8)
    label[..., : shape[1] // 2, :] = 0
    truth = draw.integers(0, 2, (shape[0] + 2, shape[1] + 3, shape[2] + 1)).astype(np.uint8)
    return image, label, truth


def publish(root: Path, fmt: str, shards: dict[str, dict], *, chunk=CHUNK, scale=1.0):
    """A store of `shards`: shard -> case -> (image, label, truth or None)."""
    files, cases = {}, []
    dtype = next(iter(next(iter(shards.values())).values()))[0].dtype.name
    for shard, members in shards.items():
        writer = store_module(fmt).Writer(root, shard, chunk=chunk, dtype=dtype)
        for name, (image, label, truth) in members.items():
            writer.write(name, image, label, truth)
            raw = label.shape if truth is None else truth.shape
            facts = {"spacing": (1, 1, 1), "raw_spacing": (1, 1, 1), "crop": ((0, 1),) * 3, "shape": label.shape, "raw_shape": raw}
            sha256 = content_sha256(image, label)
            cases.append(CaseEntry(id=name, group=name, shard=shard, key=name, has_truth=truth is not None, sha256=sha256, **facts))
        files |= writer.publish()
    dataset = Dataset(name="drawn", reader="none", dims=3, channels=("a", "b"), labels={"background": 0, "x": 1, "y": 2})
    plan = Plan(target_spacing=(1, 1, 1), patch=(8, 16, 16), normalisation=("none",) * 2, dtype=dtype, scale=scale)
    save_manifest(root, Manifest(format=fmt, id="drawn", dataset=dataset, plan=plan, cases=tuple(cases), files=files))
    return open_store(root)


@pytest.fixture(params=sorted(formats()))
def fmt(request):
    return request.param


@pytest.fixture
def store(tmp_path, fmt):
    return publish(tmp_path, fmt, {"data/case-0": {"case-0": drawn()}, "data/case-1": {"case-1": drawn(seed=1)}})


def box(*ranges):
    return tuple(slice(a, b) for a, b in ranges)


def test_formats_are_the_two():
    assert formats() == ["hdf5", "zarr"]


def test_round_trip(store):
    for seed, case in enumerate(store.manifest.cases):
        image, label, truth = drawn(seed=seed)
        read = store.image(case)
        assert read.dtype == np.float32 and read.flags.c_contiguous
        np.testing.assert_array_equal(read, image.astype(np.float32))
        np.testing.assert_array_equal(store.label(case), label)
        np.testing.assert_array_equal(store.truth(case), truth)
        assert store.label(case).dtype == store.truth(case).dtype == np.uint8
        assert content_sha256(*store.stored(case)) == case.sha256


BOXES = {
    "inside": box((1, 6), (3, 20), (5, 30)),
    "one chunk": box((4, 8), (8, 16), (16, 32)),
    "one voxel": box((8, 9), (20, 21), (33, 34)),
    "before": box((-3, 5), (-1, 9), (-7, 20)),
    "beyond": box((5, 14), (10, 40), (30, 50)),
    "around": box((-2, 12), (-5, 30), (-6, 45)),
    "outside before": box((-9, -2), (0, 4), (0, 4)),
    "outside beyond": box((0, 4), (21, 25), (0, 4)),
    "empty": box((2, 2), (0, 4), (0, 4)),
    "zeros": box((0, 9), (12, 20), (3, 33)),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxes_may_reach_outside(store, name):
    image, label, _ = drawn()
    margin = 50
    padded = np.pad(image.astype(np.float32), ((0, 0), *((margin, margin),) * 3))
    padded_label = np.pad(label, margin)
    shifted = tuple(slice(s.start + margin, s.stop + margin) for s in BOXES[name])
    case = store.manifest.cases[0]
    np.testing.assert_array_equal(store.image(case, BOXES[name]), padded[(slice(None), *shifted)])
    np.testing.assert_array_equal(store.label(case, BOXES[name]), padded_label[shifted])


def test_random_boxes(store):
    image, label, _ = drawn(seed=1)
    padded, padded_label = np.pad(image.astype(np.float32), ((0, 0), *((20, 20),) * 3)), np.pad(label, 20)
    draw, case = np.random.default_rng(5), store.manifest.cases[1]
    for _ in range(60):
        start = draw.integers(-15, 30, 3)
        place = tuple(slice(int(a), int(min(a + n, 34))) for a, n in zip(start, draw.integers(1, 25, 3), strict=True))
        place = tuple(s if s.stop > s.start else slice(s.start, s.start + 1) for s in place)
        inside = tuple(slice(min(s.start + 20, m + 39), min(s.stop + 20, m + 40)) for s, m in zip(place, SHAPE, strict=True))
        sizes = tuple(s.stop - s.start for s in inside)
        place = tuple(slice(s.start - 20, s.start - 20 + n) for s, n in zip(inside, sizes, strict=True))
        np.testing.assert_array_equal(store.image(case, place), padded[(slice(None), *inside)])
        np.testing.assert_array_equal(store.label(case, place), padded_label[inside])


@pytest.mark.parametrize("dtype, scale", [("uint8", 1 / 255), ("int16", 0.25), ("uint16", 1.0), ("float32", 1.0), ("float16", 1.0)])
def test_stored_types_become_float32(tmp_path, fmt, dtype, scale):
    image, label, _ = drawn(dtype=dtype)
    store = publish(tmp_path, fmt, {"s": {"c": (image, label, None)}}, scale=scale)
    expected = image.astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(store.image(store.manifest.cases[0]), expected)
    np.testing.assert_array_equal(store.image(store.manifest.cases[0], box((-1, 4), (0, 8), (0, 8)))[:, 1:], expected[:, :4, :8, :8])


def test_every_finite_half_is_converted_exactly():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    found = to_float32(halves, 1.0)
    assert found.tobytes() == halves.astype(np.float32).tobytes()  # bit for bit: -0 too


def test_values_that_are_not_finite_are_refused(tmp_path, fmt):
    image, label, _ = drawn()
    image[0, 1, 2, 3] = np.inf
    with pytest.raises(InputError, match="case-7.*nan or beyond float16"):
        store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16").write("case-7", image, label, None)
    assert not list(tmp_path.iterdir())


def test_a_wrong_type_or_shape_is_the_programmers_mistake(tmp_path, fmt):
    image, label, _ = drawn()
    for wrong in ((image.astype(np.float32), label), (image, label.astype(int)), (image, label[1:]), (image[0], label)):
        writer = store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16")
        with pytest.raises(TypeError, match="expected"):
            writer.write("c", *wrong, None)
    assert not list(tmp_path.iterdir())


def test_truth_that_was_not_stored_is_named(tmp_path, fmt):
    image, label, _ = drawn()
    store = publish(tmp_path, fmt, {"s": {"c": (image, label, None)}})
    with pytest.raises(InputError, match="'c' has no label on its raw grid"):
        store.truth(store.manifest.cases[0])


def bundle(count=120):
    """2D images of many sizes."""
    sizes = [(1, 5 + i % 37, 9 + i % 23) for i in range(count)]
    return {f"image-{i}": drawn(size, dtype="uint8", channels=3, seed=i) for i, size in enumerate(sizes)}


def test_a_bundle_of_images_is_a_few_files(tmp_path, fmt):
    members = bundle()
    store = publish(tmp_path, fmt, {"data/bundle-0": members}, chunk=(1, 16, 16), scale=1 / 255)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == (2 if fmt == "hdf5" else 8)  # the manifest is one
    assert len(files) - 1 == len(store.manifest.files)
    for case in store.manifest.cases:
        image, label, _ = members[case.id]
        np.testing.assert_array_equal(store.image(case), image.astype(np.float32) * np.float32(1 / 255))
        taller = np.pad(label, ((0, 0), (0, 60), (0, 0)))
        np.testing.assert_array_equal(store.label(case, box((0, 1), (2, 60), (0, 9))), taller[:, 2:60, :9])
    truth = store.manifest.cases[70]
    np.testing.assert_array_equal(store.truth(truth), members[truth.id][2])


def test_small_volumes_of_several_depths_share_a_bundle(tmp_path, fmt):
    members = {f"c{i}": drawn((3 + i, 11 - i, 6 + 5 * i), seed=i) for i in range(5)}
    store = publish(tmp_path, fmt, {"b": members})
    for case in store.manifest.cases:
        np.testing.assert_array_equal(store.image(case), members[case.id][0].astype(np.float32))
        np.testing.assert_array_equal(store.truth(case), members[case.id][2])


def test_both_formats_hold_the_same_content(tmp_path):
    members = {"a": drawn(), "b": drawn((4, 6, 7), seed=3)}
    stores = [publish(tmp_path / fmt, fmt, {"s": members}) for fmt in formats()]
    for one, other in zip(*(store.manifest.cases for store in stores), strict=True):
        assert one == other
        first, second = (store.stored(one) for store in stores)
        assert content_sha256(*first) == content_sha256(*second) == one.sha256
        assert first[0].tobytes() == second[0].tobytes() == members[one.id][0].tobytes()


def test_content_hash_tells_type_shape_and_values_apart():
    image, label, _ = drawn()
    changed = image.copy()
    changed[0, 0, 0, 0] += 1
    others = [(changed, label), (image, label + 1), (image.view(np.int16), label), (image.reshape(1, 18, 21, 34), label)]
    assert len({content_sha256(image, label), *(content_sha256(*other) for other in others)}) == 5
    assert content_sha256(image.transpose(0, 3, 2, 1), label) != content_sha256(image, label)
    assert content_sha256(np.asfortranarray(image), label) == content_sha256(image, label)
    assert content_sha256(image.astype(">f2"), label) == content_sha256(image, label)


@pytest.mark.parametrize("fmt", ["zarr"])
def test_zarr_python_reads_the_same(store):
    for seed, case in enumerate(store.manifest.cases):
        image, label, truth = drawn(seed=seed)
        group = zarr.open_group(store.root / f"{case.shard}.zarr", mode="r", zarr_format=3)
        np.testing.assert_array_equal(group["image"][:], image)
        np.testing.assert_array_equal(group["label"][:], label)
        np.testing.assert_array_equal(group["truth"][:], truth)
        assert group["image"].dtype == image.dtype and group["image"].chunks == (2, *CHUNK) and group["image"].shards == (2, 12, 24, 48)


@pytest.mark.parametrize("fmt", ["zarr"])
def test_zarr_python_reads_a_bundle_as_slices(tmp_path, fmt):
    members = bundle(40)
    publish(tmp_path, fmt, {"b": members}, chunk=(1, 16, 16))
    group = zarr.open_group(tmp_path / "b.zarr", mode="r")
    image, label, truth = (group[name][:] for name in ("image", "label", "truth"))
    for key, place in group.attrs["cases"].items():
        start, z, y, x = place["image"]
        np.testing.assert_array_equal(image[:, start : start + z, :y, :x], members[key][0])
        np.testing.assert_array_equal(label[start : start + z, :y, :x], members[key][1])
        start, z, y, x = place["truth"]
        np.testing.assert_array_equal(truth[start : start + z, :y, :x], members[key][2])


@pytest.mark.parametrize("fmt", ["hdf5"])
def test_h5py_reads_the_same(store):
    image, label, truth = drawn()
    with h5py.File(store.root / "data/case-0.h5", "r") as file:
        for name, expected in {"image": image, "label": label, "truth": truth}.items():
            found = file["case-0"][name]
            np.testing.assert_array_equal(found[:], expected)
            assert found.fletcher32 and found.compression == (None if name == "image" else "gzip")
        np.testing.assert_array_equal(store.label(store.manifest.cases[0]), label)  # while another has the file open


def data_file(store, name="image") -> Path:
    """Where the bytes of the first case lie."""
    case = store.manifest.cases[0]
    place = store.root / case.shard
    return place.with_suffix(".h5") if store.manifest.format == "hdf5" else next((place.with_suffix(".zarr") / name).glob("c.*"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def read_all(root: Path) -> None:
    store = open_store(root)
    for case in store.manifest.cases:
        assert content_sha256(*store.stored(case)) == case.sha256, "damage passed unseen"
        store.truth(case)


def image_bytes(store, path: Path) -> list[int]:
    """Offsets of stored voxels, spread over the file."""
    if store.manifest.format == "zarr":
        return [int(i) for i in np.linspace(0, path.stat().st_size - 1, 40)]  # chunks and index: all of it is checked
    with h5py.File(path, "r") as file:
        array = file["case-0/image"]
        chunks = [array.id.get_chunk_info(i) for i in range(array.id.get_num_chunks())]
    return [c.byte_offset + i for c in chunks[:: max(1, len(chunks) // 8)] for i in (0, 7, c.size // 2, c.size - 5, c.size - 1)]


def test_one_flipped_byte_is_refused_naming_case_and_shard(store):
    path = data_file(store)
    whole = path.read_bytes()
    store.close()
    for at in image_bytes(store, path):
        flip(path, at)
        with pytest.raises(InputError, match=r"case 'case-0': shard data/case-0 is damaged .*[Rr]estore .*preprocess"):
            read_all(store.root)
        assert [p.case for p in verify(store.root)] == ["case-0"]
        path.write_bytes(whole)
    read_all(store.root)


def test_a_flipped_byte_anywhere_never_gives_other_values(store):
    """Structures and metadata too: either the values are right or the store is refused; `verify` always notices."""
    paths = [p for p in sorted(store.root.rglob("*")) if p.is_file() and "case-0" in p.as_posix()]
    store.close()
    draw = np.random.default_rng(2)
    refused = 0
    for path in paths:
        whole = path.read_bytes()
        for at in draw.integers(0, len(whole), 60 // len(paths)):
            flip(path, int(at))
            try:
                read_all(store.root)
            except InputError as error:
                assert "case-0" in str(error)
                refused += 1
            assert len(verify(store.root)) == 1
            path.write_bytes(whole)
    assert refused > 30 // len(formats())


def test_a_file_cut_short_is_refused(store):
    path = data_file(store)
    store.close()
    for keep in (path.stat().st_size - 1, path.stat().st_size // 2, 3, 0):
        with open(path, "r+b") as file:
            file.truncate(keep)
        with pytest.raises(InputError, match="case-0.*damaged"):
            read_all(store.root)


def test_a_missing_file_is_named(store):
    path = data_file(store)
    store.close()
    path.unlink()
    with pytest.raises(InputError, match="'case-0': shard data/case-0 is missing.*preprocess"):
        read_all(store.root)
    assert [p.found for p in verify(store.root)] == ["No such file or directory"]


def test_another_shape_than_the_manifests_is_refused(store):
    entry = store.manifest.cases[0].model_copy(update={"shape": (9, 21, 35)})
    with pytest.raises(InputError, match="damaged.*the manifest says"):
        store.image(entry)
    with pytest.raises(InputError, match="damaged"):
        store.image(store.manifest.cases[0].model_copy(update={"key": "nobody"}))


def test_verify_finds_content_that_is_not_the_manifests(store):
    assert verify(store.root) == verify(store.root, chunks=True) == []
    manifest = load_manifest(store.root)
    changed = manifest.cases[1].model_copy(update={"sha256": "0" * 64})
    save_manifest(store.root, manifest.model_copy(update={"cases": (manifest.cases[0], changed)}))
    assert verify(store.root) == []
    (problem,) = verify(store.root, chunks=True)
    assert problem.case == "case-1" and problem.expected.endswith("0000")


def total(store, queue=None):
    value = float(sum(store.image(case).sum(dtype=np.float64) for case in store.manifest.cases))
    if queue is None:
        return value
    queue.put((value, len(store.handles.open), os.getpid()))
    return None


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_their_own_handles(store, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    expected = total(store)
    held = dict(store.handles.open)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=total, args=(store, queue))
    child.start()
    value, count, pid = queue.get(timeout=60)
    child.join(60)
    assert (value, count, child.exitcode) == (expected, 2, 0) and pid != os.getpid()
    assert dict(store.handles.open) == held and total(store) == expected


def test_a_fork_does_not_use_inherited_handles(store):
    total(store)
    inherited = list(store.handles.open.values())  # kept alive, so that no new one can have the identity of an old one
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        total(store)
        own = not any(shard is old for shard in store.handles.open.values() for old in inherited)
        os.write(writing, b"own" if own and store.handles.process == os.getpid() else b"old")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 3) == b"own"
    os.close(reading), os.close(writing)


def test_pickling_drops_handles(store):
    expected = total(store)
    copy = pickle.loads(pickle.dumps(store))
    assert len(store.handles.open) == 2 and not copy.handles.open
    assert total(copy) == expected


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_few_shards_stay_open(tmp_path, fmt):
    image, label, _ = drawn()
    store = publish(tmp_path, fmt, {f"s{i}": {f"c{i}": (image, label, None)} for i in range(8)})
    store.handles.limit = 3

    def handles():
        return sum("/s" in os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}"))

    before = handles()
    for _ in range(3):
        for case in store.manifest.cases:
            np.testing.assert_array_equal(store.label(case), label)
    assert len(store.handles.open) == 3 and handles() - before <= 6
    store.close()
    assert handles() == before


def test_threads_share_a_store(store):
    store.handles.limit = 1
    whole = [store.image(case) for case in store.manifest.cases]

    def read(i):
        place = box((i % 5, 9), (i % 11, 20), (i % 7, 30))
        return np.array_equal(store.image(store.manifest.cases[i % 2], place), whole[i % 2][(slice(None), *place)])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


def test_nothing_is_there_before_publish_and_publish_is_idempotent(tmp_path, fmt):
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


def test_an_abandoned_writer_leaves_nothing(tmp_path, fmt):
    image, label, truth = drawn()
    writer = store_module(fmt).Writer(tmp_path, "s", chunk=CHUNK, dtype="float16")
    writer.write("c", image, label, truth)
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_cleared(tmp_path, fmt):
    image, label, truth = drawn()
    code = (
        "import os, sys, numpy as np; from pathlib import Path; from segfleet.preprocess.stores.base import store_module\n"
        "w = store_module(sys.argv[1]).Writer(Path(sys.argv[2]), 's', chunk=(4, 8, 16), dtype='float16')\n"
        "w.write('c', np.ones((2, 9, 9, 9), 'float16'), np.ones((9, 9, 9), 'uint8'), None); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, fmt, str(tmp_path)], timeout=60).returncode == 9
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
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def incompressible(shape=(16, 64, 64)):
    draw = np.random.default_rng(0)
    return draw.integers(0, 2**15, (1, *shape)).astype(np.int16), draw.integers(0, 255, shape).astype(np.uint8)


def test_a_full_disk_leaves_nothing(small_disk, fmt):
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
    store = publish(small_disk, fmt, {"data/s": {"c": (image, label, None)}}, chunk=(8, 64, 64))  # there is room for a smaller one
    np.testing.assert_array_equal(store.label(store.manifest.cases[0]), label)
    store.close()


@pytest.mark.parametrize("free", [0, 4096, 20000])
def test_a_disk_that_is_full_at_the_start(small_disk, fmt, free):
    (small_disk / "data").mkdir()
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192 - free))
    (small_disk / "rest").write_bytes(bytes(8192))
    image, label = incompressible()
    with pytest.raises(OSError) as caught:
        store_module(fmt).Writer(small_disk, "data/s", chunk=(8, 64, 64), dtype="int16").write("c", image, label, None)
    assert caught.value.errno == errno.ENOSPC
    assert list((small_disk / "data").iterdir()) == []


@pytest.mark.parametrize(
    "patch, shape, voxel_bytes, expected",
    [
        ((64, 96, 96), (128, 256, 256), 2, (32, 32, 64)),
        ((128, 128, 128), (200, 400, 400), 2, (64, 64, 64)),
        ((128, 128, 128), (155, 240, 240), 8, (64, 64, 64)),
        ((1, 512, 512), (1, 1000, 800), 3, (1, 256, 256)),
        ((1, 256, 256), (1, 256, 320), 1, (1, 256, 256)),
        ((40, 56, 40), (36, 50, 35), 2, (36, 50, 35)),
        ((8, 8, 8), (6, 5, 4), 2, (6, 5, 4)),
        ((1, 1024, 1024), (40, 2000, 2000), 12, (1, 256, 512)),
    ],
)
def test_chunks_follow_the_patch(patch, shape, voxel_bytes, expected):
    chunk = chunk_of(patch, shape, voxel_bytes)
    held = int(np.prod(chunk)) * voxel_bytes
    assert chunk == expected
    assert held <= LARGEST and (held >= SMALLEST or all(c >= min(p, s) for c, p, s in zip(chunk, patch, shape, strict=True)))
