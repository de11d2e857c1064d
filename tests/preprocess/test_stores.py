"""One suite for every store format: what is read is what was written."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import zarr

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts
from segfleet.pipeline.data.unpack import unpack
from segfleet.preprocess.stores.base import formats, open_store
from segfleet.preprocess.stores.content import content_sha256
from segfleet.preprocess.stores.manifest import save_manifest
from segfleet.preprocess.stores.packed import CODECS, PackedArray
from segfleet.preprocess.stores.shard_reader import to_float32

CHUNK, SHAPE = (4, 8, 16), (9, 21, 34)  # as in the fixtures


def box(*ranges):
    return tuple(slice(a, b) for a, b in ranges)


def test_formats_are_the_two():
    assert formats() == ["hdf5", "zarr"]


def test_round_trip(store, drawn):
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
def test_boxes_may_reach_outside(store, name, drawn):
    image, label, _ = drawn()
    margin = 50
    padded = np.pad(image.astype(np.float32), ((0, 0), *((margin, margin),) * 3))
    padded_label = np.pad(label, margin)
    shifted = tuple(slice(s.start + margin, s.stop + margin) for s in BOXES[name])
    case = store.manifest.cases[0]
    np.testing.assert_array_equal(store.image(case, BOXES[name]), padded[(slice(None), *shifted)])
    np.testing.assert_array_equal(store.label(case, BOXES[name]), padded_label[shifted])


def test_random_boxes(store, drawn):
    image, label, _ = drawn(seed=1)
    padded, padded_label = (
        np.pad(image.astype(np.float32), ((0, 0), *((20, 20),) * 3)),
        np.pad(label, 20),
    )
    draw, case = np.random.default_rng(5), store.manifest.cases[1]
    for _ in range(60):
        start = draw.integers(-15, 30, 3)
        place = tuple(
            slice(int(a), int(min(a + n, 34)))
            for a, n in zip(start, draw.integers(1, 25, 3), strict=True)
        )
        place = tuple(s if s.stop > s.start else slice(s.start, s.start + 1) for s in place)
        inside = tuple(
            slice(min(s.start + 20, m + 39), min(s.stop + 20, m + 40))
            for s, m in zip(place, SHAPE, strict=True)
        )
        sizes = tuple(s.stop - s.start for s in inside)
        place = tuple(
            slice(s.start - 20, s.start - 20 + n) for s, n in zip(inside, sizes, strict=True)
        )
        np.testing.assert_array_equal(store.image(case, place), padded[(slice(None), *inside)])
        np.testing.assert_array_equal(store.label(case, place), padded_label[inside])


@pytest.mark.parametrize(
    "dtype, scale",
    [("uint8", 1 / 255), ("int16", 0.25), ("uint16", 1.0), ("float32", 1.0), ("float16", 1.0)],
)
def test_stored_types_become_float32(tmp_path, fmt, dtype, scale, drawn, publish):
    image, label, _ = drawn(dtype=dtype)
    store = publish(tmp_path, fmt, {"s": {"c": (image, label, None)}}, scale=scale)
    expected = image.astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(store.image(store.manifest.cases[0]), expected)
    np.testing.assert_array_equal(
        store.image(store.manifest.cases[0], box((-1, 4), (0, 8), (0, 8)))[:, 1:],
        expected[:, :4, :8, :8],
    )


def test_every_finite_half_is_converted_exactly():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    found = to_float32(halves, 1.0)
    assert found.tobytes() == halves.astype(np.float32).tobytes()  # bit for bit: -0 too


def test_truth_that_was_not_stored_is_named(tmp_path, fmt, drawn, publish):
    image, label, _ = drawn()
    store = publish(tmp_path, fmt, {"s": {"c": (image, label, None)}})
    with pytest.raises(InputError, match="'c' has no label on its raw grid"):
        store.truth(store.manifest.cases[0])


def bundle(drawn, count=120):
    """2D images of many sizes."""
    sizes = [(1, 5 + i % 37, 9 + i % 23) for i in range(count)]
    return {
        f"image-{i}": drawn(size, dtype="uint8", channels=3, seed=i) for i, size in enumerate(sizes)
    }


def test_a_bundle_of_images_is_a_few_files(tmp_path, fmt, drawn, publish):
    members = bundle(drawn)
    store = publish(tmp_path, fmt, {"data/bundle-0": members}, chunk=(1, 16, 16), scale=1 / 255)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == (3 if fmt == "hdf5" else 9)  # the manifest and its columns are two
    assert len(files) - 2 == len(store.manifest.files)
    for case in store.manifest.cases:
        image, label, _ = members[case.id]
        np.testing.assert_array_equal(
            store.image(case), image.astype(np.float32) * np.float32(1 / 255)
        )
        taller = np.pad(label, ((0, 0), (0, 60), (0, 0)))
        np.testing.assert_array_equal(
            store.label(case, box((0, 1), (2, 60), (0, 9))), taller[:, 2:60, :9]
        )
    truth = store.manifest.cases[70]
    np.testing.assert_array_equal(store.truth(truth), members[truth.id][2])


def test_small_volumes_of_several_depths_share_a_bundle(tmp_path, fmt, drawn, publish):
    members = {f"c{i}": drawn((3 + i, 11 - i, 6 + 5 * i), seed=i) for i in range(5)}
    store = publish(tmp_path, fmt, {"b": members})
    for case in store.manifest.cases:
        np.testing.assert_array_equal(store.image(case), members[case.id][0].astype(np.float32))
        np.testing.assert_array_equal(store.truth(case), members[case.id][2])


def test_both_formats_and_codecs_hold_the_same_content(tmp_path, drawn, publish):
    members = {"a": drawn(), "b": drawn((4, 6, 7), seed=3)}
    stores = [
        publish(tmp_path / fmt / codec, fmt, {"s": members}, codec=codec)
        for fmt in formats()
        for codec in CODECS
    ]
    assert len({store.manifest.id for store in stores}) == 1
    for first, *others in zip(*(store.manifest.cases for store in stores), strict=True):
        assert all(one == first for one in others)
        for store in stores:
            image, label = store.stored(first)
            assert content_sha256(image, label) == first.sha256
            assert image.tobytes() == members[first.id][0].tobytes()


def test_content_hash_tells_type_shape_and_values_apart(drawn):
    image, label, _ = drawn()
    changed = image.copy()
    changed[0, 0, 0, 0] += 1
    others = [
        (changed, label),
        (image, label + 1),
        (image.view(np.int16), label),
        (image.reshape(1, 18, 21, 34), label),
    ]
    assert len({content_sha256(image, label), *(content_sha256(*other) for other in others)}) == 5
    assert content_sha256(image.transpose(0, 3, 2, 1), label) != content_sha256(image, label)
    assert content_sha256(np.asfortranarray(image), label) == content_sha256(image, label)
    assert content_sha256(image.astype(">f2"), label) == content_sha256(image, label)


@pytest.mark.parametrize("fmt", ["zarr"])
def test_zarr_python_reads_the_same(store, drawn, codec):
    for seed, case in enumerate(store.manifest.cases):
        image, label, truth = drawn(seed=seed)
        group = zarr.open_group(store.root / f"{case.shard}.zarr", mode="r", zarr_format=3)
        np.testing.assert_array_equal(group["image"][:], image)
        np.testing.assert_array_equal(group["label"][:], label)
        np.testing.assert_array_equal(group["truth"][:], truth)
        assert (
            group["image"].dtype == image.dtype
            and group["image"].chunks == (2, *CHUNK)
            and group["image"].shards == (2, 12, 24, 48)
            and type(group["image"].compressors[0]).__name__ == f"{codec.title()}Codec"
        )


@pytest.mark.parametrize("fmt", ["zarr"])
def test_zarr_python_reads_a_bundle_as_slices(tmp_path, fmt, drawn, publish):
    members = bundle(drawn, 40)
    publish(tmp_path, fmt, {"b": members}, chunk=(1, 16, 16))
    group = zarr.open_group(tmp_path / "b.zarr", mode="r")
    image, label, truth = (group[name][:] for name in ("image", "label", "truth"))
    for key, place in group.attrs["cases"].items():
        start, z, y, x = place["image"]
        np.testing.assert_array_equal(image[:, start : start + z, :y, :x], members[key][0])
        np.testing.assert_array_equal(label[start : start + z, :y, :x], members[key][1])
        start, z, y, x = place["truth"]
        np.testing.assert_array_equal(truth[start : start + z, :y, :x], members[key][2])


def test_zarr_python_describes_a_shard_and_reads_it_by_one_file(tmp_path, drawn, publish):
    """Consolidated metadata: what zarr-python says of the arrays is what it finds beside them."""
    store = publish(tmp_path, "zarr", {"a": {"one": drawn()}})
    group = zarr.open_group(tmp_path / "a.zarr", mode="r", use_consolidated=True)
    alone = zarr.open_group(tmp_path / "a.zarr", mode="r", use_consolidated=False)
    assert sorted(group.array_keys()) == ["image", "label", "truth"]
    for name in group.array_keys():
        assert group[name].metadata == alone[name].metadata
    assert group["image"].metadata.dimension_names == ("c", "z", "y", "x")
    whole = store.image(store.manifest.cases[0])
    for name in group.array_keys():  # an older store has no consolidated metadata, a newer needs
        (tmp_path / "a.zarr" / name / "zarr.json").unlink()  # no others
    again = open_store(tmp_path)
    np.testing.assert_array_equal(again.image(again.manifest.cases[0]), whole)


def other_codecs(kind: str) -> dict:
    chunk = (2, *CHUNK)
    return {
        "zstd": {"chunks": chunk, "compressors": zarr.codecs.ZstdCodec(level=3)},
        "gzip in shards": {
            "chunks": chunk,
            "shards": (2, 8, 16, 32),  # several of them, in folders
            "compressors": zarr.codecs.GzipCodec(),
        },
        "bare": {"chunks": (1, 3, 5, 7), "compressors": None},
    }[kind]


@pytest.mark.parametrize("kind", ["zstd", "gzip in shards", "bare"])
def test_other_codecs_are_read_by_zarr_python(tmp_path, drawn, publish, kind):
    """Rewritten by another tool, the same voxels: whole cases, boxes, through the loader's pass."""
    store = publish(tmp_path, "zarr", {"a": {"one": drawn()}})
    case, folder = store.manifest.cases[0], tmp_path / "a.zarr" / "image"
    boxes = [None, BOXES["inside"], BOXES["around"], BOXES["outside beyond"]]
    expected = [store.image(case, one) for one in boxes]
    array = zarr.open_array(folder, mode="r")[...]
    shutil.rmtree(folder)
    options = {**other_codecs(kind), "shape": array.shape, "dtype": array.dtype}
    zarr.create_array(folder, **options)[...] = array
    text = json.loads((tmp_path / "a.zarr/zarr.json").read_text())
    (tmp_path / "a.zarr/zarr.json").write_text(
        json.dumps({**text, "consolidated_metadata": None})  # which would say how it was
    )
    files = {path: facts for path, facts in store.manifest.files.items() if "/image/" not in path}
    files["a.zarr/zarr.json"] = file_facts(tmp_path / "a.zarr/zarr.json")
    save_manifest(tmp_path, store.manifest.model_copy(update={"files": files}))
    again = open_store(tmp_path)
    for fill in (PackedArray.fill, unpack):
        again.fill = fill
        for one, there in zip(boxes, expected, strict=True):
            np.testing.assert_array_equal(again.image(case, one), there)
        assert content_sha256(*again.stored(case)) == case.sha256
    chunk = next(path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(b"no chunk")
    with pytest.raises(InputError, match=r"case 'one': shard a is damaged \(image: "):
        open_store(tmp_path).image(case)


OTHERS = """
import sys, google_crc32c, h5py, hdf5plugin, numpy as np
with h5py.File(sys.argv[1], "r") as file:
    for name, array in file["case-0"].items():
        np.save(f"{sys.argv[2]}/{name}.npy", array[:])
        assert list(array._filters) == [str(getattr(hdf5plugin, sys.argv[3]).filter_id)]
        chunks = [array.id.get_chunk_info(i).chunk_offset for i in range(array.id.get_num_chunks())]
        sums = [google_crc32c.value(array.id.read_direct_chunk(at)[1]) for at in chunks]
        assert sums and sorted(sums) == sorted(value for value in array.attrs["crc32c"] if value)
"""


@pytest.mark.parametrize("fmt", ["hdf5"])
def test_h5py_reads_the_same(store, drawn, tmp_path, codec):
    """With plugins, which segfleet itself does without: a process in which it is loaded writes its
    name into new files."""
    if importlib.util.find_spec("hdf5plugin") is None:
        pytest.skip("hdf5plugin is not installed")
    subprocess.run(
        [sys.executable, "-c", OTHERS, store.root / "data/case-0.h5", tmp_path, codec.title()],
        check=True,
    )
    for name, expected in zip(("image", "label", "truth"), drawn(), strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    with h5py.File(store.root / "data/case-0.h5", "r"):  # with locks
        np.testing.assert_array_equal(
            open_store(store.root).label(store.manifest.cases[0]), drawn()[1]
        )


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
    # kept alive, so that no new one can have the identity of an old one
    inherited = list(store.handles.open.values())
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
def test_few_shards_stay_open(tmp_path, fmt, drawn, publish):
    image, label, _ = drawn()
    store = publish(tmp_path, fmt, {f"s{i}": {f"c{i}": (image, label, None)} for i in range(8)})
    store.handles.limit = 3

    def handles():
        return sum(
            "/s" in os.readlink(f"/proc/self/fd/{n}")
            for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")
        )

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
        return np.array_equal(
            store.image(store.manifest.cases[i % 2], place), whole[i % 2][(slice(None), *place)]
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


def test_a_case_is_found_by_its_id_also_in_a_copy_with_other_cases(store):
    manifest = store.manifest
    first, *rest = manifest.cases
    assert manifest.case(first.id) == first and manifest.case(rest[0].id) == rest[0]
    fewer = manifest.model_copy(update={"cases": tuple(rest)})
    with pytest.raises(InputError, match=f"found '{first.id}', expected one of"):
        fewer.case(first.id)
    assert fewer.case(rest[0].id) == rest[0] and manifest.case(first.id) == first
    assert manifest == manifest.model_copy()
