"""Damage to a store never passes unseen, and says which case it hits."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from pydantic import ValidationError

from segfleet.core.errors import InputError
from segfleet.core.files import read_json
from segfleet.pipeline.data.unpack import unpack
from segfleet.preprocess.stores import hdf5, zarr_array
from segfleet.preprocess.stores import packed as packing
from segfleet.preprocess.stores.base import formats, open_store
from segfleet.preprocess.stores.content import content_sha256
from segfleet.preprocess.stores.manifest import (
    CaseEntry,
    Manifest,
    Plan,
    load_manifest,
    save_manifest,
)
from segfleet.preprocess.stores.verify import verify


def data_file(store, name="image") -> Path:
    """Where the bytes of the first case lie."""
    case = store.manifest.cases[0]
    place = store.root / case.shard
    return (
        place.with_suffix(".h5")
        if store.manifest.format == "hdf5"
        else next((place.with_suffix(".zarr") / name).glob("c.*"))
    )


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
        # chunks and index: all of it is checked
        return [int(i) for i in np.linspace(0, path.stat().st_size - 1, 40)]
    with h5py.File(path, "r") as file:
        array = file["case-0/image"]
        chunks = [array.id.get_chunk_info(i) for i in range(array.id.get_num_chunks())]
    return [
        c.byte_offset + i
        for c in chunks[:: max(1, len(chunks) // 8)]
        for i in (0, 7, c.size // 2, c.size - 5, c.size - 1)
    ]


def test_one_flipped_byte_is_refused_naming_case_and_shard(store):
    path = data_file(store)
    whole = path.read_bytes()
    store.close()
    for at in image_bytes(store, path):
        flip(path, at)
        with pytest.raises(
            InputError,
            match=r"case 'case-0': shard data/case-0 is damaged .*[Rr]estore .*preprocess",
        ):
            read_all(store.root)
        assert [p.case for p in verify(store.root)] == ["case-0"]
        path.write_bytes(whole)
    read_all(store.root)


def test_a_flipped_byte_anywhere_never_gives_other_values(store):
    """Structures and metadata too: either the values are right or the store is refused; `verify`
    always notices."""
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
    assert problem.case == "case-1" and "of another store" in problem.found


def test_a_store_of_an_earlier_version_says_so(store):
    path = store.root / "manifest.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "version": 1}))
    with pytest.raises(InputError, match="version 1, expected 3. Preprocess .* a new folder"):
        open_store(store.root)
    path.write_text(json.dumps({**facts, "layout": 0}))
    with pytest.raises(
        InputError,
        match="made by an earlier version of segfleet. Preprocess the raw data again into a new "
        "folder",
    ):
        open_store(store.root)


MANIFESTS = {
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "list": b"[1, 2]",
    "nothing": b"",
    "zeros": bytes(100),
    "no text": b'{"a": "\xff"}',
    "nulls": b'{"sha256": null, "version": null, "layout": null}',
    "huge": b'{"version": 3, "layout": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_a_manifest_that_is_none_is_one_sentence(store, how):
    (store.root / "manifest.json").write_bytes(MANIFESTS[how])
    with pytest.raises(InputError, match="manifest.json") as said:
        open_store(store.root)
    assert len(str(said.value)) < 500


def test_no_changed_digit_of_a_manifest_goes_unseen(store):
    """Every digit, each alone: opening refuses it."""
    path = store.root / "manifest.json"
    text = path.read_text()
    places = [at for at, sign in enumerate(text) if sign.isdigit()]
    for at in places[:: max(1, len(places) // 200)]:
        digit = str((int(text[at]) + 1) % 10)
        path.write_text(text[:at] + digit + text[at + 1 :])
        with pytest.raises(InputError, match="damaged|version|earlier|later"):
            open_store(store.root)


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": (2, 1, 1)},
        {"crop": ((0, 2), (0, 1), (0, 1))},
        {"foreground": {1: (0,)}},
        {"affine": ((1.0,) * 4,) * 4},
        {"raw_spacing": (2, 1, 1)},
        {"group": "somebody"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_result_changes_the_id(store, change):
    manifest = load_manifest(store.root)
    first = manifest.cases[0].model_copy(update=change)
    saved = save_manifest(
        store.root, manifest.model_copy(update={"cases": (first, *manifest.cases[1:])})
    )
    assert load_manifest(store.root).id == saved.id != manifest.id
    fold = {"train": ("case-0",), "val": ("case-1",)}
    split = save_manifest(store.root, manifest.model_copy(update={"splits": {"a": (fold,)}}))
    assert split.id != manifest.id


def test_a_case_that_is_given_the_place_of_another_is_refused(store):
    first, second = store.manifest.cases[:2]
    swapped = first.model_copy(update={"shard": second.shard, "key": second.key})
    swapped = swapped.model_copy(update={"shape": second.shape, "raw_shape": second.raw_shape})
    with pytest.raises(InputError, match="another case or of another store"):
        store.image(swapped)


@pytest.mark.parametrize("read_before", [False, True])
def test_a_store_replaced_under_a_run_is_never_mixed_in(publish, drawn, fmt, tmp_path, read_before):
    """Whoever had opened it gets what was there, or a refusal."""
    made = []
    for name in ("ours", "later"):
        (tmp_path / name).mkdir()
        shards = {f"data/{n}": {f"case-{n}": drawn(seed=2 * len(made) + n)} for n in range(2)}
        made.append(publish(tmp_path / name, fmt, shards))
    ours, later = made
    reads = {(case.id, name): (getattr(ours, name), case)
             for case in ours.manifest.cases for name in ("image", "label", "truth")}  # fmt: skip
    right = {key: read(case) for key, (read, case) in reads.items()}
    if not read_before:
        ours.close()
    ours.root.rename(tmp_path / "aside")
    later.root.rename(ours.root)
    for key, (read, case) in reads.items():
        try:
            found = read(case)
        except InputError as error:
            assert re.search("of another store|sha256 is not that of the manifest", str(error))
        else:
            assert read_before and np.array_equal(found, right[key]), key


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a/../../b", "a//b", "a\\b", "", "a/."])
def test_no_path_of_a_manifest_leads_out_of_the_store(store, path):
    manifest = load_manifest(store.root)
    with pytest.raises(ValueError, match="leads out of its folder"):
        Manifest.model_validate({**manifest.model_dump(), "files": {path: {}}})
    case = manifest.cases[0].model_dump()
    for name in ("shard", "key"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            CaseEntry.model_validate({**case, name: path})


@pytest.mark.parametrize("how", ["short", "long", "behind", "huge", "broken", "tiny"])
def test_a_crafted_chunk_never_shows_other_memory(tmp_path, how, codec):
    """With a right checksum, which is no secret."""
    piece = np.arange(4**3, dtype=np.int16).reshape(4, 4, 4)
    other = {"short": piece[:2], "long": np.tile(piece, (2, 1, 1))}.get(how, piece)
    packed = packing.packing_of(codec, "image").pack(np.ascontiguousarray(other))
    if how == "broken":  # the header is whole
        packed = packed[:17] + bytes(b ^ 0xFF for b in packed[17:])
    packed = packed[:3] if how == "tiny" else packed
    data = packed + packing.crc32c(packed).to_bytes(4, "little")
    (tmp_path / "data").write_bytes(data)
    place = {"behind": (len(data), 64), "huge": (0, 2**40)}.get(how, (0, len(data)))
    array = packing.PackedArray(
        file=packing.OpenFile(tmp_path / "data"),
        name="image",
        lead=(),
        chunk=(4, 4, 4),
        dtype=np.dtype(np.int16),
        index=np.array(place, np.uint64).reshape(1, 1, 1, 2),
        codec=codec,
    )
    with pytest.raises(packing.DamagedShard, match="chunk"):
        array.read((0, 0, 0), [4, 4, 4])
    with pytest.raises(packing.DamagedShard, match="chunk"):
        unpack(array, (0, 0, 0), (4, 4, 4), np.empty((4, 4, 4), np.float32), 1.0)


def test_what_is_no_file_is_not_waited_for(store, capfd):
    path = data_file(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is no file"):
        read_all(store.root)
    os.mkfifo(store.root / "done.json")
    assert read_json(store.root / "done.json") is None


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"normalisation": ("zscore",) * 3}])
def test_a_store_of_another_kind_of_numbers_is_refused(store, change):
    manifest = store.manifest
    plan = manifest.plan.model_copy(update=change)
    save_manifest(store.root, manifest.model_copy(update={"plan": plan}))
    with pytest.raises(InputError, match="image: .* expected"):
        read_all(store.root)


CRAFTED = {  # a shard's array, as somebody may have made it on purpose, and what is said of it
    "another file": "a link",
    "deep": "doesn't exist",
    "huge": "another number of chunks than of checksums",
    "a group": "no attribute",
    "whole": "filters",
}


@pytest.mark.parametrize("how", CRAFTED)
def test_a_crafted_hdf5_shard_is_refused_at_once(tmp_path, how):
    """Without a file outside it opened, and without the memory it says it needs."""
    path, outside = tmp_path / "shard.h5", tmp_path / "pipe"
    os.mkfifo(outside)
    with h5py.File(path, "w", libver=hdf5.FORMAT) as file:
        case = file.create_group("case")
        if how == "another file":
            case["image"] = h5py.ExternalLink(str(outside), "/image")
        elif how == "deep":
            for _ in range(5000):
                case = case.create_group("a")
        elif how == "a group":
            case.create_group("image")
        else:
            chunks = None if how == "whole" else (1, 1, 1)
            shape = (2, 2, 2) if how == "whole" else (2**20, 2**20, 2**20)
            array = case.create_dataset("image", shape, "u1", chunks=chunks)
            array.attrs[hdf5.SUMS] = np.zeros(8, "<u4")
            if chunks:
                _set_filter(case, array)
    shard = hdf5.Shard(path)
    with memory_limit(2**30), pytest.raises(packing.DamagedShard, match=CRAFTED[how]):
        shard.shape_and_dtype("case", "image")


def _set_filter(case: h5py.Group, array: h5py.Dataset) -> None:
    """The same array again, as Blosc would have made it."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(array.chunks)
    properties.set_filter(hdf5.BLOSC, h5py.h5z.FLAG_OPTIONAL, (2, 2, 1, 1, 5, 1, 1))
    space, kind = h5py.h5s.create_simple(array.shape), h5py.h5t.py_create(array.dtype)
    sums = array.attrs[hdf5.SUMS]
    del case["image"]
    h5py.h5d.create(case.id, b"image", kind, space, properties)
    case["image"].attrs[hdf5.SUMS] = sums


@contextmanager
def memory_limit(size: int):
    """So many bytes more than this process has now."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "change",
    [{"shape": [2**20] * 3}, {"shape": [2**62] * 3}, {"inner": [0, 4, 4]}, {"shape": [1.5] * 3},
     {"shape": [-4, 4, 4]}, {"shape": ["a", 4, 4]}, {"inner": None}, {"data_type": "a"},
     {"data_type": "object"}],
)  # fmt: skip
def test_a_crafted_zarr_array_is_refused_at_once(tmp_path, change):
    writer = zarr_array.ArrayWriter(
        tmp_path / "label",
        chunk=(4, 4, 4),
        dtype=np.dtype("u1"),
        packing=packing.packing_of("blosc", "label"),
    )
    writer.append(np.ones((4, 4, 4), np.uint8))
    writer.finish()
    facts = json.loads((tmp_path / "label" / "zarr.json").read_text())
    zarr_array.open_array(tmp_path / "label", facts)
    if "inner" in change:
        facts["codecs"][0]["configuration"]["chunk_shape"] = change["inner"]
    else:
        facts |= change
    with memory_limit(2**30), pytest.raises(packing.DamagedShard):
        zarr_array.open_array(tmp_path / "label", facts)


@pytest.mark.parametrize(
    "settings",
    [
        {"transpose": [0, 0, 1]},
        {"transpose": [0, 1, 10**400]},
        {"target_spacing": [1, float("inf"), 1]},
        {"target_spacing": [1, -1, 1]},
        {"patch": [0, 8, 8]},
        {"patch": [10**400, 8, 8]},
        {"size": [1, 2**40, 8]},
    ],
)
def test_a_plan_that_no_grid_can_follow_is_refused(settings):
    good = {"target_spacing": [1, 0, 1], "patch": [1, 8, 8], "normalisation": ["zscore"]}
    assert Plan.model_validate(good).transpose == (0, 1, 2)
    with pytest.raises(ValidationError, match=next(iter(settings))):
        Plan.model_validate(good | settings)
