"""Mended copies and 2.5D slices: what is changed, what is not, and that the raw folder stays as it
was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segfleet.core.errors import DataError, InputError
from segfleet.core.making import MARK, making
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.checking.repair import repair
from segfleet.preprocess.checking.slices import stacks, write_slices
from segfleet.preprocess.files.grids import laid
from segfleet.preprocess.files.writer import write_label
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader


def digest(root: Path) -> str:
    return hashlib.sha256(
        b"".join(str(p).encode() + p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file())
    ).hexdigest()


def change(path: Path, edit=lambda a: a, affine=None) -> None:
    image = nib.load(path)
    array, where = (
        edit(np.asarray(image.dataobj).copy()),
        image.affine if affine is None else affine,
    )
    path.unlink()
    nib.save(nib.Nifti1Image(array, where), path)


@pytest.fixture
def binary(tmp_path) -> Path:
    """A Decathlon folder with one label, saved as 0 and 255 in the first case, and with a shifted
    affine in the second."""
    root = PHANTOMS["msd"](tmp_path / "raw", cases=3, size=(8, 16, 16))
    document = json.loads((root / "dataset.json").read_text())
    document["labels"] = {"0": "background", "1": "blob"}
    (root / "dataset.json").write_text(json.dumps(document))
    paths = sorted((root / "labelsTr").iterdir())
    for path in paths:
        change(path, lambda a: (a > 0).astype(np.uint8))
    change(paths[0], lambda a: a * 255)
    change(paths[1], affine=nib.load(paths[1]).affine + np.diag([0.3, 0, 0, 0]))
    return root


def test_masks_of_255_and_copied_geometry_are_mended_in_a_copy(binary, tmp_path):
    before, reader = digest(binary), open_reader("msd", binary)
    assert len(survey(reader, workers=1).problems) == 2
    assert [c["case"] for c in repair(reader, tmp_path / "unasked")] == ["phantom_000"]
    done = repair(reader, tmp_path / "out", same_voxels=True)
    assert [(change["case"], change["field"]) for change in done] == [
        ("phantom_000", "label values"),
        ("phantom_001", "label spacing"),
    ]
    assert done[0]["was"] == "255" and done[0]["now"] == "1"
    assert (
        digest(binary) == before
        and not survey(open_reader("msd", tmp_path / "out"), workers=1).problems
    )
    third = "labelsTr/phantom_002.nii.gz"
    assert (tmp_path / "out" / third).samefile(binary / third), "what needs nothing is linked"
    one, other = (
        nib.load(folder / "labelsTr/phantom_000.nii.gz") for folder in (binary, tmp_path / "out")
    )
    assert np.array_equal(
        np.asarray(one.dataobj) > 0, np.asarray(other.dataobj) == 1
    ) and np.allclose(one.affine, other.affine)
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "out", "unasked"}


def test_labels_are_renumbered_as_told(tmp_path):
    root = PHANTOMS["msd"](tmp_path / "raw", cases=2, size=(8, 16, 16))
    path = root / "labelsTr/phantom_001.nii.gz"
    change(path, lambda a: np.where(a == 2, 4, a).astype(np.uint8))
    reader = open_reader("msd", root)
    assert repair(reader, tmp_path / "nothing") == [] and not (tmp_path / "nothing").exists(), (
        "4 could mean anything"
    )
    (done,) = repair(reader, tmp_path / "out", {4: 2})
    assert done == {"case": "phantom_001", "field": "label values", "was": "4", "now": "2"}
    assert not survey(open_reader("msd", tmp_path / "out"), workers=1).problems


def test_renumbering_exchanges_values(tmp_path):
    root = PHANTOMS["msd"](tmp_path / "raw", cases=1, size=(8, 16, 16))
    before = open_reader("msd", root).label(open_reader("msd", root).refs()[0])[0]
    repair(open_reader("msd", root), tmp_path / "out", {1: 2, 2: 1})
    reader = open_reader("msd", tmp_path / "out")
    after = reader.label(reader.refs()[0])[0]
    assert np.array_equal(after == 1, before == 2) and np.array_equal(after == 2, before == 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
def test_labels_that_are_no_integers_are_left_alone(value, binary, tmp_path):
    """Beside one that can be mended. The values 0 and nan must not make nan the one declared
    class."""
    alone, mixed = (binary / f"labelsTr/phantom_00{i}.nii.gz" for i in (1, 2))
    change(alone, lambda a: np.where(a > 0, value, 0).astype(np.float32))
    change(mixed, lambda a: np.where(a.cumsum().reshape(a.shape) == 3, value, a.astype(np.float32)))
    assert {done["case"] for done in repair(open_reader("msd", binary), tmp_path / "out")} == {
        "phantom_000"
    }
    assert all(path.samefile(tmp_path / "out/labelsTr" / path.name) for path in (alone, mixed))
    problems = survey(open_reader("msd", tmp_path / "out"), workers=1).problems
    assert {p.case for p in problems if "no integers" in p.found} == {"phantom_001", "phantom_002"}


@pytest.mark.parametrize("value", [-1, 300])
def test_values_that_would_wrap_are_left_alone(value, binary, tmp_path):
    path = binary / "labelsTr/phantom_001.nii.gz"  # whose geometry could be mended
    change(path, lambda a: np.where(a.cumsum().reshape(a.shape) == 3, value, a.astype(np.int16)))
    assert {done["case"] for done in repair(open_reader("msd", binary), tmp_path / "out")} == {
        "phantom_000"
    }
    remap = {value: 1} if value > 0 else {}
    assert (
        "phantom_001"
        in {done["case"] for done in repair(open_reader("msd", binary), tmp_path / "told", remap)}
    ) == bool(remap)


def test_labels_behind_links_and_leftovers_are_no_obstacle(binary, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in (0, 2):  # one that is mended, one that is not
        path = binary / f"labelsTr/phantom_00{number}.nii.gz"
        path.rename(elsewhere / path.name)
        path.symlink_to(Path("../../elsewhere") / path.name)
    (binary / "lost").symlink_to("nowhere")
    (tmp_path / "deep/out.partial/labelsTr").mkdir(parents=True)
    before = digest(elsewhere)
    with pytest.raises(InputError, match=r"out\.partial is there, .* and is none of ours"):
        repair(open_reader("msd", binary), tmp_path / "deep/out")
    (tmp_path / "deep/out.partial" / MARK).touch()  # as a killed run of ours leaves it
    assert len(repair(open_reader("msd", binary), tmp_path / "deep/out", same_voxels=True)) == 2
    assert (
        digest(elsewhere) == before
        and not survey(open_reader("msd", tmp_path / "deep/out"), workers=1).problems
    )
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_label_outside_the_raw_folder_is_left_alone(binary, tmp_path):
    path = binary / "labelsTr/phantom_000.nii.gz"
    (tmp_path / "beside").mkdir()
    path.rename(tmp_path / "beside" / path.name)
    text = (binary / "dataset.json").read_text()
    (binary / "dataset.json").write_text(
        text.replace(f"./labelsTr/{path.name}", f"../beside/{path.name}")
    )
    assert "../beside" in (binary / "dataset.json").read_text()
    before = digest(tmp_path / "beside")
    done = repair(open_reader("msd", binary), tmp_path / "out", same_voxels=True)
    assert [c["case"] for c in done] == ["phantom_001"]
    assert digest(tmp_path / "beside") == before


def test_a_sidecar_is_not_written_through_a_link(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.json").write_text("{}")
    (tmp_path / "a.json").hardlink_to(tmp_path / "raw/a.json")
    write_label(
        tmp_path / "a.tif",
        np.zeros((2, 3, 4), np.uint8),
        Geometry(shape=(2, 3, 4), spacing=(3.0, 1.0, 1.0)),
    )
    assert (tmp_path / "raw/a.json").read_text() == "{}" and json.loads(
        (tmp_path / "a.json").read_text()
    ) == {"spacing": [3, 1, 1]}


def corner(shape_xyz) -> np.ndarray:
    """A label whose every turn and mirror image differs."""
    label = np.zeros(shape_xyz, np.uint8)
    label[2:5, 3:10, 1:4], label[2:7, 3:5, 1:3], label[4, 8, 5] = 1, 1, 2
    return label


TURNS = {  # how another program stores the same label: axes of the file, which of them backwards
    "x mirrored": ((0, 1, 2), (0,)),
    "y mirrored": ((0, 1, 2), (1,)),
    "z mirrored": ((0, 1, 2), (2,)),
    "turned": ((1, 0, 2), (0,)),
    "over and over": ((2, 0, 1), (0, 2)),
}


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("turn", TURNS)
def test_labels_are_turned_with_their_headers(turn, oblique, tmp_path):
    """nibabel says where every voxel lies: the mended label must be where it was in the world."""
    shape, (axes, backwards) = (12, 12, 12), TURNS[turn]
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    if oblique:
        c, s = np.cos(0.3), np.sin(0.3)
        affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = (-10, 20, 30)
    root, label = tmp_path / "raw", corner(shape)
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    image = label.astype(np.int16) * 100 + np.arange(12, dtype=np.int16)
    nib.save(nib.Nifti1Image(image, affine), root / "imagesTr/a_0000.nii.gz")
    ornt = np.array([[axes.index(a), -1 if axes.index(a) in backwards else 1] for a in range(3)])
    stored = nib.Nifti1Image(label, affine).as_reoriented(ornt)
    assert not np.array_equal(np.asarray(stored.dataobj), label)
    nib.save(stored, root / "labelsTr/a.nii.gz")
    facts = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}}
    facts |= {"numTraining": 1, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(facts))
    (problem,) = survey(open_reader("nnunet", root), workers=1).problems
    assert "check --fix` lays" in problem.mend
    (done,) = repair(open_reader("nnunet", root), tmp_path / "out")
    mended = nib.load(tmp_path / "out/labelsTr/a.nii.gz")
    assert np.array_equal(np.asarray(mended.dataobj), label) and "laid onto" in done["now"]
    assert np.allclose(mended.affine, affine, atol=1e-5)
    assert not survey(open_reader("nnunet", tmp_path / "out"), workers=1).problems


def shifted_label(label: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """The same label in a box that begins `shift` voxels further along x."""
    affine = np.eye(4)
    affine[0, 3] = shift
    box = np.zeros_like(label)
    box[: len(label) - shift] = label[shift:]
    return box, affine


def test_a_label_cut_out_elsewhere_is_shifted_or_left(tmp_path):
    label, grid = corner((12, 12, 12)), Geometry(shape=(12, 12, 12), affine=np.eye(4).tolist())
    for shift, whole in ((2, True), (3, False)):
        box, affine = shifted_label(label, shift)
        own = Geometry(shape=grid.shape, affine=affine.tolist())
        placed = laid(np.ascontiguousarray(box.T), own, grid)
        expected = label.copy()
        expected[:shift] = 0
        assert np.array_equal(placed.T, expected) and whole == np.array_equal(expected, label)
        back = laid(np.ascontiguousarray(label.T), grid, own)
        assert (back is not None) == whole, "labelled voxels are never cut off"
    for bad in (0.3, 0.06):
        own = Geometry(shape=grid.shape, affine=(np.eye(4) + np.eye(4, k=3) * bad).tolist())
        assert laid(label, own, grid) is None, "between voxels"
    slow = Geometry(shape=grid.shape, affine=np.diag([1.02, 1, 1, 1]).tolist())
    assert laid(label, slow, grid) is None, "a fifth of a voxel off at the far end"


def test_two_at_once_do_not_mix(binary, tmp_path):
    with making(tmp_path / "out") as partial:
        (partial / "mine").touch()
        for other in (
            lambda: repair(open_reader("msd", binary), tmp_path / "out"),
            lambda: write_slices(
                open_reader("lits", PHANTOMS["lits"](tmp_path / "lits", cases=1)), tmp_path / "out"
            ),
        ):
            with pytest.raises(InputError, match="another process is writing"):
                other()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_places_that_are_taken_are_refused(binary, tmp_path):
    (tmp_path / "mine").mkdir()
    for place, message in (
        (tmp_path / "mine", "exists"),
        (binary / "new", "lies in the raw folder"),
    ):
        with pytest.raises(InputError, match=f"to: .* {message}. Choose a new folder"):
            repair(open_reader("msd", binary), place)


def test_the_command_mends_then_checks(binary, tmp_path):
    command = [
        sys.executable,
        "-m",
        "segfleet.cli.main",
        "datasets",
        "msd",
        "check",
        str(binary),
        "--fix",
        "--same-voxels",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (
        document["root"] == f"{binary}-mended"
        and len(document["mended"]) == 2
        and document["problems"] == []
    )
    (binary / "labelsTr/phantom_002.nii.gz").unlink()
    done = subprocess.run(
        [*command[:-1], "--to", str(tmp_path / "other")], capture_output=True, text=True, timeout=60
    )
    assert (
        done.returncode == 2
        and "2 label(s) repaired in the copy" in done.stdout.replace("\n", " ")
        and "phantom_002" in done.stderr
    )


def test_slices_keep_every_annotated_one(tmp_path):
    image = (
        np.arange(6, dtype=np.float32)[:, None, None] * 100 * np.ones((6, 4, 5), np.float32) - 250
    )
    label = np.zeros((6, 4, 5), np.uint8)
    label[0, 1, 1], label[2, 0, 0] = 1, 2
    found = list(stacks(image, label, -200, 200))
    assert [z for z, _, _ in found] == [0, 1, 2], "the empty one between them too"
    assert found[0][1].shape == (4, 5, 3) and found[0][1].dtype == np.float32
    assert [v for _, triple, _ in found for v in triple[0, 0]] == pytest.approx(
        [-1, -1, -0.75, -1, -0.75, -0.25, -0.75, -0.25, 0.25]
    )
    assert np.array_equal(found[2][2], label[2]) and list(stacks(image, label * 0, -200, 200)) == []
    label[5] = 1
    assert list(stacks(image, label, -200, 200))[-1][1][0, 0].tolist() == pytest.approx(
        [0.75, 1, 1]
    )


def test_volumes_become_slices_become_a_store(tmp_path):
    raw = PHANTOMS["lits"](tmp_path / "raw", cases=4)
    reader = open_reader("lits", raw)
    count = write_slices(reader, tmp_path / "slices", crop=24)
    labels = {ref.id: reader.label(ref)[0] for ref in reader.refs()}
    spans = {case: np.flatnonzero(label.any(axis=(1, 2))) for case, label in labels.items()}
    assert count == sum(z[-1] - z[0] + 1 for z in spans.values())
    manifest = build(
        BuildRequest(
            "npy",
            tmp_path / "slices",
            tmp_path / "store",
            workers=1,
            options={"regions": "any-tumour"},
        )
    )
    assert (
        len(manifest.cases) == count
        and {entry.group for entry in manifest.cases} == {*labels}
        and manifest.dataset.dims == 2
    )
    assert manifest.plan.normalisation == ("none",) * 3 and manifest.cases[0].raw_shape == (
        1,
        24,
        24,
    )
    assert manifest.dataset.regions == {"any": (1, 2), "tumour": (2,)}
    total = sum(entry.voxels.get(2, 0) for entry in manifest.cases)
    assert total == sum(int((label[:, 4:-4, 4:-4] == 2).sum()) for label in labels.values())
    with pytest.raises(InputError, match="Choose a new folder for the slices"):
        write_slices(reader, tmp_path / "slices")
    with pytest.raises(InputError, match="crop: found 99, but case 'volume-0' has 32 x 32"):
        write_slices(reader, tmp_path / "other", crop=99)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("*.partial"))
    with pytest.raises(InputError, match="2D with 3 channel"):
        write_slices(open_reader("npy", tmp_path / "slices"), tmp_path / "again")


def test_slices_of_flipped_volumes_lie_alike(tmp_path):
    raw = PHANTOMS["lits"](tmp_path / "raw", cases=1)
    path = raw / "Training Batch 1" / "volume-0.nii"
    write_slices(open_reader("lits", raw), tmp_path / "one")
    for name in (path, path.with_name("segmentation-0.nii")):
        affine = nib.load(name).affine @ np.diag([-1, 1, 1, 1])
        change(name, lambda a: a[::-1].copy(), affine)
    write_slices(open_reader("lits", raw), tmp_path / "two")
    for one in sorted((tmp_path / "one").rglob("*.npy")):
        assert np.array_equal(
            np.load(one), np.load(tmp_path / "two" / one.relative_to(tmp_path / "one"))
        )


def deeper(path: Path) -> None:
    change(path, lambda a: np.concatenate([a, a[..., :3]], axis=-1))


FAULTS = {  # what is done to a segmentation -> the field that is named
    "three slices more": (deeper, "label shape"),
    "narrower": (lambda path: change(path, lambda a: a[:-2]), "label shape"),
    "undeclared": (
        lambda path: change(path, lambda a: np.where(a > 0, 258, a.astype(np.int16))),
        "label values",
    ),
    "fractional": (lambda path: change(path, lambda a: a * np.float32(0.5)), "label"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_sliced_of_a_broken_data_set(fault, tmp_path):
    reader, (hurt, field) = (
        open_reader("lits", PHANTOMS["lits"](tmp_path / "raw", cases=3)),
        FAULTS[fault],
    )
    hurt(reader.refs()[1].labels[0])
    with pytest.raises(DataError) as caught:
        write_slices(reader, tmp_path / "slices")
    assert [(p.case, p.field) for p in caught.value.problems] == [
        ("volume-1", field)
    ] and caught.value.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]
