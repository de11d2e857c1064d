"""Cases in columns: what is written comes back, opening costs nothing per case, damage is seen."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from segfleet.core.errors import InputError
from segfleet.pipeline.data.sampler import PatchSampler
from segfleet.preprocess.stores import case_table, columns
from segfleet.preprocess.stores import manifest as module
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.case_entry import CaseEntry
from segfleet.preprocess.stores.case_table import CaseTable, SplitTable, split_columns
from segfleet.preprocess.stores.manifest import Manifest, load_manifest, save_manifest, upgrade


def entries(count: int, seed: int = 0, far: bool = True) -> list[CaseEntry]:
    """Volumes and pictures, with and without labels, affines and hashes."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        shape = tuple(int(n) for n in draw.integers(1, 40, 3))
        most = 2**34 if far else int(np.prod(shape))  # of flat indices
        labels = sorted(int(v) for v in draw.choice(300, int(draw.integers(0, 4)), replace=False))
        affine = tuple(map(tuple, draw.normal(size=(4, 4)).tolist())) if index % 3 else None
        found.append(
            CaseEntry(
                id=f"Fall {index} é",
                group=f"p{index // 3}" if index % 2 else "",
                shard=f"shards/{index // 5:05d}",
                key=f"case{index % 5:05d}",
                shape=shape,
                spacing=tuple(draw.uniform(0.1, 5, 3).tolist()),
                crop=((0, shape[0]), (1, 1 + shape[1]), (0, shape[2])),
                raw_shape=shape,
                raw_spacing=(1.0, 0.5, 1 / 3),
                affine=affine,
                has_truth=index % 4 == 0,
                voxels={label: int(draw.integers(1, 2**40)) for label in labels},
                foreground={
                    label: tuple(draw.integers(0, most, int(draw.integers(0, 6))).tolist())
                    for label in labels
                },
                sha256="a" * 64 if index % 2 else "",
                image_file=f"images/{index}.png",
            )
        )
    return found


def stored(root, cases, **facts) -> Manifest:
    known = json.loads((root / "manifest.json").read_text())
    made = {key: known[key] for key in ("format", "dataset", "plan")}
    return save_manifest(root, Manifest(**made, cases=tuple(cases), **facts))


def as_before(root, manifest: Manifest) -> dict:
    """The document that versions before the columns wrote."""
    document = manifest.model_dump(mode="json") | {"version": 2}
    document["fingerprint"] = {
        key: [list(row) for row in value] if key in module.MEASURED else value
        for key, value in manifest.fingerprint.items()
    }
    text = json.dumps({**document, "sha256": module._digest(document)}, indent=1)
    for path in root.glob("cases-*"):
        path.unlink()
    (root / "manifest.json").write_text(text)
    return document


def test_cases_come_back_as_they_were(store):
    cases = entries(37)
    splits = {
        "a": ({"train": tuple(c.id for c in cases[::2]), "val": ("not a case", cases[1].id)},)
    }
    measured = {"shapes": [[1, 2, 3], [1, 2, 3]], "spacings": [[0.1, 1, 1]] * 2, "kept": 0.25}
    saved = stored(store.root, cases, splits=splits, fingerprint=measured)
    found = load_manifest(store.root)
    assert list(found.cases) == cases and found.cases == tuple(cases) and found == saved
    assert found.tables and "tables" not in found.model_dump()  # where it lies is not what it is
    assert [case.model_dump() for case in found.cases] == [case.model_dump() for case in cases]
    assert found.splits == splits and found.fold("a", 0)["val"] == ("not a case", cases[1].id)
    everybody = {"train": tuple(case.id for case in cases), "val": ()}
    assert found.folds("all") == (everybody,)  # unless a split is called that
    assert found.model_copy(update={"splits": {"all": splits["a"]}}).folds("all") == splits["a"]
    assert found.fingerprint == {
        "shapes": ((1, 2, 3),) * 2,
        "spacings": ((0.1, 1, 1),) * 2,
        "kept": 0.25,
    }
    assert list(found.cases.column("group")) == [case.group for case in cases]
    assert list(found.cases.grids("affine")) == [case.affine for case in cases]
    assert list(found.cases[5:20:3]) == cases[5:20:3] and found.cases[-1] == cases[-1]
    with pytest.raises(IndexError):
        found.cases[37]
    part = found.cases.among({cases[3].id, cases[30].id, "nobody"})
    assert list(part) == [cases[3], cases[30]] and part.find(cases[30].id) == cases[30]
    assert part.find(cases[4].id) is None
    centres = [case for case in cases if any(case.foreground.values())]
    assert list(found.cases.with_foreground()) == centres
    assert list(found.cases[::2].with_foreground()) == [
        case for case in cases[::2] if any(case.foreground.values())
    ]


def with_voxels(case: CaseEntry, *voxels: int) -> CaseEntry:
    return case.model_copy(update={"foreground": {1: voxels}})


@pytest.mark.parametrize(
    "first", [(), (3,), (2**32 - 1,), (2**32,), (2**40, 5)], ids=lambda found: str(found[-1:])
)
def test_sampled_voxels_of_the_first_case_come_back_at_any_width(first):
    none, second = with_voxels(entries(1)[0]), with_voxels(entries(2)[1], 7, 9)
    for cases in ([with_voxels(none, *first), second], [with_voxels(none, *first)], [none, none]):
        table = CaseTable.of(cases)
        assert list(table) == cases
        centres = [case for case in cases if case.foreground[1]]
        assert list(table.with_foreground()) == centres
    assert CaseTable.of([none]).arrays()["sampled.voxels"].shape == (0,)


def test_tables_are_equal_to_equal_cases_and_to_nothing_else():
    cases = entries(4)
    table = CaseTable.of(cases)
    assert table == cases and table == tuple(cases) and table == CaseTable.of(cases)
    for other in (cases[:3], [*cases[:3], cases[0]], [*cases[1:], cases[0]], 4, None):
        assert table != other
    assert CaseTable.of(()) == [] and CaseTable.of(()) != ""


def test_splits_travel_to_other_processes_from_a_file_and_from_memory(store):
    """From a file by its name alone: columns are not copied."""
    cases = entries(2000)
    ids = tuple(case.id for case in cases)
    splits = {"a": ({"train": ids, "val": ids[:3]},)}
    stored(store.root, cases, splits=splits)
    found = load_manifest(store.root).splits
    travelling = pickle.dumps(found)
    assert pickle.loads(travelling) == found == splits and len(travelling) < 2000
    table = CaseTable.of(cases)
    lone = SplitTable(table, *split_columns(ids, splits))
    assert pickle.loads(pickle.dumps(lone)) == splits


def test_a_case_that_is_not_there_is_answered_with_a_few_that_are(store):
    stored(store.root, entries(9))
    with pytest.raises(
        InputError, match="one of the 9 cases .*: Fall 0 é, .*, Fall 4 é and 4 more"
    ):
        load_manifest(store.root).case("Fall")
    stored(store.root, entries(5))
    with pytest.raises(InputError, match="Fall 3 é, Fall 4 é\\."):
        load_manifest(store.root).case("Fall")


def test_channels_are_masked_where_they_are_normalised_inside_the_mask():
    plan = {"target_spacing": (1, 1, 1), "patch": (8, 8, 8), "normalisation": ("ct", "zscore")}
    assert module.Plan(**plan, nonzero_mask=True).masked == (1,)
    assert module.Plan(**plan).masked == ()


def test_a_damaged_case_is_named_with_its_file(store):
    stored(store.root, entries(3))
    manifest = load_manifest(store.root)
    (name,) = manifest.tables
    file = store.root / name
    table = manifest.cases
    table._columns["grid"].code = np.full(3, 99)
    with pytest.raises(InputError, match=re.escape(f"store: {file}: case 1 is damaged (")):
        table[1]
    alone = CaseTable.of(entries(3))
    alone._columns["grid"].code = np.full(3, 99)
    with pytest.raises(InputError, match=re.escape("store: case 1 is damaged (")):
        alone[1]


def test_the_file_is_a_safetensors_file_and_equal_cases_give_equal_bytes(store):
    """Read by the library of that format."""
    first = stored(store.root, entries(9))
    (name,) = first.tables
    digest = hashlib.sha256((store.root / name).read_bytes()).hexdigest()
    assert name == f"cases-{digest[:12]}.safetensors"
    theirs, ours = load_file(store.root / name), columns.map_columns(store.root / name)
    assert theirs.keys() == ours.keys() and len(theirs) > 20
    for key, array in theirs.items():
        np.testing.assert_array_equal(array, ours[key])
        assert array.dtype == ours[key].dtype and not ours[key].flags.writeable
    assert stored(store.root, entries(9)).tables == first.tables
    assert stored(store.root, entries(9, seed=1)).tables != first.tables
    assert len(list(store.root.glob("cases-*"))) == 1  # that of before is gone


def test_opening_costs_nothing_per_case(store):
    """Counted: calls of functions, of ours and of libraries, at 200 and at 2,000 cases."""
    calls = []
    for count in (200, 2000):
        cases = entries(count)
        ids = tuple(case.id for case in cases)
        files = {f"shards/{i:05d}.h5": {"bytes": i, "sha256": "0" * 64} for i in range(count)}
        stored(store.root, cases, splits={"a": ({"train": ids, "val": ids},)}, files=files)
        number = 0

        def count_one(frame, event, argument):
            nonlocal number
            number += event in ("call", "c_call")

        sys.setprofile(count_one)
        load_manifest(store.root)
        sys.setprofile(None)
        calls.append(number)
    assert calls[1] < 1.05 * calls[0] < 5000, calls


def test_a_loader_process_gets_numbers_not_cases(store):
    cases = entries(2000, far=False)
    stored(store.root, cases)
    opened = open_store(store.root)
    ids = {case.id for case in cases[::2]}
    sampler = PatchSampler(
        cases=opened.manifest.cases.among(ids), patch=(1, 8, 8), batch=4, foreground=0.5, seed=3
    )
    sent = pickle.dumps((opened, sampler))
    assert len(sent) < 4 * len(ids) + 6000
    other, theirs = pickle.loads(sent)
    assert other.manifest.cases == opened.manifest.cases and theirs.cases == sampler.cases
    # one mapping for all that a process was given
    assert other.manifest.cases._arrays is theirs.cases._arrays
    assert [theirs.draw(0, 0, i, 9).start for i in range(36)] == [
        sampler.draw(0, 0, i, 9).start for i in range(36)
    ]
    plain = PatchSampler(cases=tuple(cases[::2]), patch=(1, 8, 8), batch=4, foreground=0.5, seed=3)
    for i in range(36):  # the same voxels as of cases in memory
        assert plain.draw(0, 0, i, 9) == sampler.draw(0, 0, i, 9)
    (path,) = store.root.glob("cases-*")
    path.write_bytes(path.read_bytes() + b"x")
    case_table.mapped.cache_clear()
    with pytest.raises(InputError, match="is not what it was when the store was opened"):
        pickle.loads(sent)


def test_no_changed_bit_of_the_columns_goes_unseen(store):
    (path,) = store.root.glob("cases-*")
    whole = path.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 60).astype(int):
        data = bytearray(whole)
        data[at] ^= 0x04
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged .its sha256 is not that of the manifest"):
            load_manifest(store.root)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="damaged"):
        load_manifest(store.root)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read .No such file"):
        load_manifest(store.root)


@pytest.mark.parametrize("name", ["shard", "key"])
def test_a_forged_table_leads_no_reader_out_of_the_store(store, name, monkeypatch):
    """Whoever writes a table can also write its hash: every path is looked at when it is used."""
    forged = entries(1)[0].model_copy(update={name: "../../etc"})
    with pytest.raises(InputError, match="leads out of its folder"):
        stored(store.root, [forged])
    monkeypatch.setattr(module, "content_id", lambda manifest: "0" * 32)
    stored(store.root, [forged])
    with pytest.raises(InputError, match="leads out of its folder"):
        load_manifest(store.root).cases[0]
    stored(store.root, entries(1), files={"ok": {}})
    known = json.loads((store.root / "manifest.json").read_text())
    known.pop("sha256")
    known["tables"] = {f"../{key}": facts for key, facts in known["tables"].items()}
    text = json.dumps({**known, "sha256": module._digest(known)})
    (store.root / "manifest.json").write_text(text)
    with pytest.raises((InputError, ValueError), match="leads out of its folder"):
        load_manifest(store.root)


def test_a_forged_header_reads_no_other_memory(tmp_path):
    good = {"a": np.arange(8, dtype="<u4")}
    columns.write_columns(tmp_path / "good", good)
    np.testing.assert_array_equal(columns.map_columns(tmp_path / "good")["a"], good["a"])
    for offsets, shape in (([0, 64], [16]), ([-8, 24], [8]), ([0, 32], [9]), ([16, 0], [-4])):
        header = json.dumps({"a": {"dtype": "U32", "shape": shape, "data_offsets": offsets}})
        text = header.encode()
        (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
        with pytest.raises(ValueError, match="outside the file"):
            columns.map_columns(tmp_path / "bad")
    (tmp_path / "bad").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="longer than the file"):
        columns.map_columns(tmp_path / "bad")


def test_an_older_store_is_read_and_upgraded_with_its_id(store):
    """What an older version wrote, a setting less included: read as it is, rewritten on demand."""
    cases = entries(11)
    ids = tuple(case.id for case in cases)
    splits = {"a": ({"train": ids[2:], "val": ids[:2]},)}
    saved = stored(store.root, cases, splits=splits, fingerprint={"shapes": [[1, 2, 3]] * 11})
    document = as_before(store.root, saved)
    old = load_manifest(store.root)
    assert old.version == 2 and old.id == saved.id and list(old.cases) == cases
    assert upgrade(store.root) and not upgrade(store.root)
    new = load_manifest(store.root)
    assert new.version == 3 and new.id == saved.id and list(new.cases) == cases
    assert new.splits == splits and new.fingerprint["shapes"] == ((1, 2, 3),) * 11
    # the hash, by hand, of what was written before `masks` was a setting of the plan
    del document["plan"]["masks"]
    facts = [
        {k: v for k, v in case.items() if k not in module.PLACE}
        for case in sorted(document["cases"], key=lambda case: case["id"])
    ]
    whole = [document["dataset"], document["plan"], document["splits"], facts]
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    document["id"] = module.hashlib.sha256(text.encode()).hexdigest()[:32]
    sealed = {**document, "sha256": module._digest(document)}
    (store.root / "manifest.json").write_text(json.dumps(sealed))
    assert load_manifest(store.root).id == document["id"] != saved.id
    assert upgrade(store.root) and load_manifest(store.root).id == document["id"]


def test_what_an_older_manifest_leaves_out_is_what_its_version_did():
    """Written out: another default would read every such store otherwise."""
    plan = module.Plan(target_spacing=(1, 1, 1), patch=(1, 8, 8), normalisation=("ct",))
    assert plan.model_dump(exclude={"target_spacing", "patch", "normalisation"}) == {
        "transpose": (0, 1, 2),
        "batch": 2,
        "patch_2d": None,
        "batch_2d": 2,
        "intensity": (),
        "nonzero_mask": False,
        "anisotropic_axis": None,
        "median_shape": (1, 1, 1),
        "dtype": "float16",
        "scale": 1.0,
        "size": None,
        "interpolation": "cubic",
        "masks": "linear",
    }
    needed = {"id", "group", "shard", "key", "shape", "spacing", "crop", "raw_shape", "raw_spacing"}
    case = {key: value for key, value in entries(1)[0].model_dump().items() if key in needed}
    assert CaseEntry(**case).model_dump(exclude=needed) == {
        "affine": None,
        "has_truth": False,
        "voxels": {},
        "foreground": {},
        "sha256": "",
        "source_sha256": "",
        "image_sha256": "",
        "image_file": "",
    }
    dataset = module.Dataset(name="d", reader="msd", dims=3, channels=("CT",), labels={"b": 0})
    assert dataset.model_dump(exclude={"name", "reader", "dims", "channels", "labels"}) == {
        "ignore_label": None,
        "regions": {},
        "region_order": (),
        "file_ending": ".nii.gz",
        "licence": "",
    }
    manifest = Manifest(format="zarr", dataset=dataset, plan=plan, cases=())
    assert (manifest.split_seed, manifest.joined, manifest.splits) == (0, None, {})
    assert (manifest.version, manifest.layout, manifest.codec) == (3, 1, "blosc")
    assert Manifest(format="hdf5", dataset=dataset, plan=plan, cases=()).layout == 2


def test_the_id_is_the_hash_of_the_plain_document(store):
    manifest = stored(store.root, entries(12))
    assert manifest.id == module._id_as_written(manifest.model_dump(mode="json"))
    assert CaseTable.of(manifest.cases) is manifest.cases


def test_a_case_that_is_drawn_again_is_not_made_again(tiny_store):
    cases = open_store(tiny_store(dims=3)).manifest.cases
    assert cases[1] is cases[1] and cases[1] == list(cases)[1]
