"""What is peculiar to each data set, against an independent reading of the same files; and the real
packs beside the repository."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from segfleet.core.errors import DataError, InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.files.images import ImageError, peek, read_file
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.planning.splits import published
from segfleet.preprocess.readers.base import open_reader, source_sha256
from segfleet.preprocess.readers.cvc_clinicdb import LAST_FRAMES
from segfleet.preprocess.readers.pairs import paired
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.verify import verify


def opened(name: str, root: Path, cases: int = 8, **options):
    return open_reader(name, PHANTOMS[name](root, cases=cases), **options)


def grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))


def test_busi_joins_masks_and_may_drop_normals(tmp_path):
    reader = opened("busi", tmp_path / "raw", 24)
    refs = reader.refs()
    kinds = [ref.id.partition(" ")[0] for ref in refs]
    assert [kinds.count(kind) for kind in ("benign", "malignant", "normal")] == [12, 8, 4]
    assert [ref.id for ref in refs if len(ref.labels) == 3] == ["benign (8)", "malignant (8)"]
    assert [ref.id for ref in refs[:3]] == ["benign (1)", "benign (2)", "benign (3)"], (
        "natural order"
    )
    modes = {Image.open(path).mode for ref in refs for path in ref.labels}
    assert modes == {"1", "L", "RGB", "RGBA"}
    for ref in refs:
        union = np.any([grey(path) > 127 for path in ref.labels], axis=0)
        assert np.array_equal(reader.label(ref)[0][0], union) and union.any() == (
            not ref.id.startswith("normal")
        )
    assert not [w for w in survey(reader, workers=1).warnings if w.case != "splits"], (
        "empty normals are usual"
    )
    lesions = open_reader("busi", reader.root, normals="drop")
    assert len(lesions.refs()) == 20 and lesions.dataset().name == "busi-lesions"
    with pytest.raises(InputError, match="option normals: found 'no', expected one of: keep, drop"):
        open_reader("busi", reader.root, normals="no")


def test_cvc_frames_are_grouped_by_sequence(tmp_path):
    reader = opened("cvc_clinicdb", tmp_path / "raw", 11)
    assert [ref.group for ref in reader.refs()] == [f"sequence{1 + i // 3}" for i in range(11)]
    assert [ref.id for ref in reader.refs()][:3] == ["1", "2", "3"] and reader.refs()[-1].id == "11"
    (reader.root / "CVC-ClinicDB/metadata.csv").unlink()
    without = open_reader("cvc_clinicdb", reader.root)
    assert {ref.group for ref in without.refs()} == {"sequence1"}
    assert [without.sequence(frame) for frame in ("25", "26", "612", "613", "x")] == [
        "sequence1",
        "sequence2",
        "sequence29",
        "",
        "",
    ]
    assert len(LAST_FRAMES) == 29 and list(LAST_FRAMES) == sorted(LAST_FRAMES)


def test_kvasir_masks_are_jpeg_and_ring(tmp_path):
    reader = opened("kvasir_seg", tmp_path / "raw")
    for ref in reader.refs():
        raw = grey(ref.labels[0])
        assert len(np.unique(raw)) > 2, "compression left other values"
        assert np.array_equal(reader.label(ref)[0][0], raw > 127)
    assert [len(side) for side in reader.splits()["official"][0].values()] == [7, 1]


def test_kvasir_lists_may_have_endings_and_name_what_is_there(tmp_path):
    reader = opened("kvasir_seg", tmp_path / "raw")
    official = reader.splits()["official"]
    for side in ("train", "val"):
        path = reader.folder / f"{side}.txt"
        path.write_text("\n".join(f"images/{name}.jpg" for name in path.read_text().split()))
    again = open_reader("kvasir_seg", reader.root)
    assert again.splits()["official"] == official and not again.problems()
    (reader.folder / "val.txt").write_text("nobody.jpg other")
    (problem,) = open_reader("kvasir_seg", reader.root).problems()
    assert (problem.case, problem.found, problem.expected) == (
        "train.txt, val.txt",
        "nobody, other",
        "cases of images",
    )
    assert "official" not in open_reader("kvasir_seg", reader.root).splits()
    (reader.folder / "val.txt").write_text(official[0]["train"][0])
    assert [p.expected for p in open_reader("kvasir_seg", reader.root).problems()] == [
        "no case in both train and val"
    ]


def test_an_empty_jpeg_mask_stays_empty(tmp_path):
    reader = opened("kvasir_seg", tmp_path / "raw")
    noise = np.random.default_rng(0).integers(0, 20, (48, 48)).astype(np.uint8)
    Image.fromarray(noise).save(reader.refs()[0].labels[0])
    assert not reader.label(reader.refs()[0])[0].any()


def test_glas_masks_are_numbers_of_glands(tmp_path):
    reader = opened("glas", tmp_path / "raw", 12)
    refs = reader.refs()
    for ref in refs:
        numbers = np.asarray(Image.open(ref.labels[0]))
        assert 0 < numbers.max() < 10 and np.array_equal(reader.label(ref)[0][0], numbers > 0)
    assert {ref.id: ref.group for ref in refs}["train_3"] == "patient2"
    splits = reader.splits()
    assert [len(splits[name][0]["val"]) for name in ("official", "official-a", "official-b")] == [
        6,
        4,
        2,
    ]
    assert splits["official"][0]["train"] == tuple(f"train_{i}" for i in range(1, 7))
    (warning,) = [w for w in survey(reader, workers=1).warnings if w.case == "splits"]
    assert "official (2)" in warning.found, "patients are on both sides by design"


@pytest.mark.parametrize("name", ["isic2017", "isic2018"])
def test_isic_parts(name, tmp_path):
    reader = opened(name, tmp_path / "raw", 12)
    refs = reader.refs()
    assert len(refs) == 12 and all(
        ref.images[0].suffix == ".jpg" and "segmentation" in ref.labels[0].name.lower()
        for ref in refs
    )
    assert [len(side) for side in reader.splits()["official"][0].values()] == [6, 3]
    assert reader.splits()["official-test"][0]["val"] == tuple(ref.id for ref in refs[9:])
    drawn = reader.splits()["80-20-seed41"][0]
    assert sorted(drawn["train"] + drawn["val"]) == sorted(ref.id for ref in refs[:6]), (
        "of the training part only"
    )
    shutil.rmtree(reader.root / reader.parts["test"][1])
    fewer = open_reader(name, reader.root)
    assert len(fewer.refs()) == 9 and "official-test" not in fewer.splits() and not fewer.problems()
    shutil.rmtree(reader.root / reader.parts["training"][1])
    assert (
        len(
            [
                p
                for p in survey(open_reader(name, reader.root), workers=1).problems
                if p.found == "no file"
            ]
        )
        == 6
    )


def test_superpixels_are_no_images(tmp_path):
    reader = opened("isic2017", tmp_path / "raw", 8)
    assert len(list(reader.root.rglob("*_superpixels.png"))) == 8 and list(
        reader.root.rglob("*_Segmentation.png")
    )
    assert len(reader.refs()) == 8 and not survey(reader, workers=1).problems


def test_ph2_ids_have_gaps_and_colours_are_ignored(tmp_path):
    reader = opened("ph2", tmp_path / "raw")
    refs = reader.refs()
    assert all(
        ref.labels[0].parent.name == f"{ref.id}_lesion" and len(ref.labels) == 1 for ref in refs
    )
    assert np.array_equal(reader.label(refs[0])[0][0], grey(refs[0].labels[0]) > 0)


def test_lits_batches(tmp_path):
    reader = opened("lits", tmp_path / "raw", 12)
    refs = reader.refs()
    assert [ref.id for ref in refs] == [f"volume-{i}" for i in range(12)], (
        "natural order, and no test volume"
    )
    assert len({ref.images[0].parent for ref in refs}) == 2 and {
        nib.load(r.images[0]).get_data_dtype().name for r in refs
    } == {
        "int16",
        "float32",
    }
    batch = refs[0].images[0].parent
    for path in sorted(batch.glob("[vs]*.nii")):
        nib.save(nib.load(path), path.with_suffix(".nii.gz"))
        path.unlink()
    assert [ref.id for ref in open_reader("lits", reader.root).refs()] == [ref.id for ref in refs]
    assert not survey(open_reader("lits", reader.root), workers=1).problems
    regions = open_reader("lits", reader.root, regions="liver-tumour").dataset()
    assert (
        regions.regions == {"liver": (1, 2), "tumour": (2,)}
        and regions.region_order == (1, 2)
        and not reader.dataset().regions
    )


def test_a_second_segmentation_is_told_and_does_not_win(tmp_path):
    reader = opened("lits", tmp_path / "raw", 6)
    last = reader.refs()[-1]
    other = next(
        ref.images[0].parent
        for ref in reader.refs()
        if ref.images[0].parent != last.images[0].parent
    )
    assert other < last.images[0].parent
    shutil.copy(reader.refs()[0].labels[0], other / last.labels[0].name)
    again = open_reader("lits", reader.root)
    assert again.refs() == reader.refs(), "the one beside the volume"
    (problem,) = again.problems()
    assert (problem.case, problem.field) == (last.id, "label")
    assert (
        problem.found
        == "2 masks: Training Batch 1/segmentation-5.nii, Training Batch 2/segmentation-5.nii"
    )


def test_acdc_reads_the_frames_of_info_cfg(tmp_path):
    reader = opened("acdc", tmp_path / "raw", 16)
    refs = reader.refs()
    assert [ref.id for ref in refs if ref.group == "patient003"] == [
        "patient003_frame04",
        "patient003_frame11",
    ]
    assert {ref.group for ref in refs} == {f"patient{n:03d}" for n in (*range(1, 7), 101, 102)}
    official, twenty = reader.splits()["official"][0], reader.splits()["evaluated-20"][0]
    assert {case[:10] for case in official["val"]} == {"patient101", "patient102"} and len(
        official["train"]
    ) == 12
    assert {case[:10] for case in twenty["val"]} == {"patient002", "patient003"} and len(
        twenty["train"]
    ) == 8
    folds = reader.splits()["nnunet"]
    assert len(folds) == 5 and sorted(case for fold in folds for case in fold["val"]) == sorted(
        official["train"]
    )
    for path in (reader.root / "testing").rglob("*_gt.nii.gz"):
        path.unlink()
    older = open_reader("acdc", reader.root)
    assert (
        len(older.refs()) == 12
        and "official" not in older.splits()
        and not survey(older, workers=1).problems
    )


def test_acdc_as_transunet_divides_it(tmp_path):
    """70, 10 and 20 patients, disjoint; two volumes of each."""
    for number in range(1, 101):
        folder = tmp_path / f"training/patient{number:03d}"
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text("ED: 1\nES: 12\n")
    splits = open_reader("acdc", tmp_path).splits()
    (fold,), (test,), (twenty,) = (
        splits[name] for name in ("transunet", "transunet-test", "evaluated-20")
    )
    assert [len(side) for side in (fold["train"], fold["val"], test["val"])] == [
        140,
        20,
        40,
    ] and test["train"] == fold["train"]
    assert len({*fold["train"], *fold["val"], *test["val"]}) == 200 and test["val"] == twenty["val"]
    assert {fold["train"][-1][:10], fold["val"][0][:10], fold["val"][-1][:10]} == {
        "patient087",
        "patient089",
        "patient100",
    }


def test_acdc_without_its_info(tmp_path):
    reader = opened("acdc", tmp_path / "raw", 8)
    (reader.root / "training/patient001/Info.cfg").unlink()
    (reader.root / "training/patient002/Info.cfg").write_text("ED: 1\nGroup: NOR\n")
    problems = survey(open_reader("acdc", reader.root), workers=1).problems
    assert [(p.case, p.field, p.found) for p in problems] == [
        ("patient001", "Info.cfg", "no file"),
        ("patient002", "Info.cfg", "no frame for ES"),
    ]


def test_brain_tumours_have_regions_for_who_wants_them(shared_data):
    root = shared_data("Task01_BrainTumour")
    assert not open_reader("msd", root).dataset().regions
    found = open_reader("msd", root, regions="overlapping").dataset()
    assert found.regions == {
        "whole tumour": (1, 2, 3),
        "tumour core": (2, 3),
        "enhancing tumour": (3,),
    } and found.region_order == (1, 2, 3)
    assert found.labels == open_reader("msd", root).dataset().labels


def test_other_tasks_have_no_regions(tmp_path):
    with pytest.raises(InputError, match="Phantom has no known ones; tasks that have: BrainTumour"):
        opened("msd", tmp_path / "raw", 2, regions="overlapping").dataset()


def test_folder_with_classes_and_parts(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for index in range(count):
            pixels = np.zeros((20, 24), np.uint8)
            pixels[index : index + 8, 4:9] = 1
            pixels[10:14, 10 + index :] = 2
            for folder, array in (("images", pixels * 100), ("masks", pixels)):
                (tmp_path / part / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / part / folder / f"{part}{index}.png")
    reader = open_reader("folder", tmp_path)
    assert reader.dataset().channels == ("grey",) and reader.splits()["given"][0]["val"] == (
        "val0",
        "val1",
    )
    (tmp_path / "labels.json").write_text(json.dumps({"background": 0, "cup": 1, "disc": 2}))
    reader = open_reader("folder", tmp_path)
    assert reader.dataset().labels == {"background": 0, "cup": 1, "disc": 2}
    case = reader.read(reader.refs()[0])
    assert len(case.image_CZYX) == 1 and set(np.unique(case.label_ZYX)) == {0, 1, 2}
    (tmp_path / "labels.json").write_text(json.dumps({"background": 1, "cup": 0}))
    with pytest.raises(InputError, match="labels.json: found .* expected"):
        open_reader("folder", tmp_path).dataset()


def test_folder_with_a_mask_folder_per_class(tmp_path, monkeypatch):
    for folder, box in (("images", (0, 20)), ("masks/0", (2, 12)), ("masks/1", (8, 16))):
        (tmp_path / folder).mkdir(parents=True)
        array = np.zeros((20, 20), np.uint8)
        array[box[0] : box[1]] = 255
        Image.fromarray(array).save(
            tmp_path / folder / ("a_mask.png" if "masks" in folder else "a.png")
        )
    reader = open_reader("folder", tmp_path)
    assert (
        reader.dataset().labels == {"background": 0, "class 0": 1, "class 1": 2}
        and not reader.problems()
    )
    assert [int(v) for v in reader.label(reader.refs()[0])[0][0, :, 0]] == [0] * 2 + [1] * 6 + [
        2
    ] * 8 + [0] * 4
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        here = open_reader("folder", ".")
        assert np.array_equal(here.label(here.refs()[0])[0], reader.label(reader.refs()[0])[0]), (
            "no class is lost"
        )
    (tmp_path / "masks/0/a_mask.png").rename(tmp_path / "masks/0/b_mask.png")
    reader = open_reader("folder", tmp_path)
    assert [int(v) for v in reader.label(reader.refs()[0])[0][0, :, 0]] == [0] * 8 + [2] * 8 + [
        0
    ] * 4, "a class without a mask here"
    assert [(p.case, p.field) for p in survey(reader, workers=1).problems] == [("b", "image")]
    Image.new("L", (20, 19)).save(tmp_path / "masks/0/a.png")
    assert "shape of mask" in survey(open_reader("folder", tmp_path), workers=1).problems[0].field


def test_npy_slices_are_grouped_by_volume(tmp_path):
    reader = opened("npy", tmp_path / "raw", 12)
    refs = reader.refs()
    assert [ref.group for ref in refs] == ["1"] * 4 + ["2"] * 4 + ["3"] * 4 and refs[
        0
    ].id == "train_1_1"
    raw = np.load(refs[5].images[0])
    assert (
        raw.dtype == np.float64
        and np.allclose(reader.image(refs[5])[0][:, 0], raw.transpose(2, 0, 1))
        and peek(refs[5].images[0]) == (3, 1, 32, 32)
    )
    assert reader.splits()["given"][0]["val"] == tuple(ref.id for ref in refs[8:])
    np.save(refs[0].images[0], np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (problem,) = survey(reader, workers=1).problems
    assert problem.field == "file" and problem.case == "train_1_1", "nothing is unpickled"


def test_dicom_slices_are_ordered_by_position(tmp_path):
    reader = opened("dicom", tmp_path / "raw", 2)
    ref = reader.refs()[0]
    assert (
        len(ref.images) == 10
        and reader.dataset().channels == ("CT",)
        and peek(ref.images[0]) == (1, 1, 32, 32)
    )
    image, geometry = reader.image(ref)
    label, grid = reader.label(ref)
    assert np.allclose(geometry.affine, grid.affine) and geometry.spacing == pytest.approx(
        (3.0, 0.9, 0.9)
    )
    assert (
        image[0][label == 2].mean()
        > image[0][label == 1].mean()
        > image[0][(label == 0) & (image[0] > -1000)].mean()
    )
    for path in ref.images:
        if sitk.ReadImage(str(path)).GetOrigin()[2] == pytest.approx(7.5 + 3 * 4):
            path.unlink()
    (problem,) = survey(open_reader("dicom", reader.root), workers=1).problems
    assert (problem.field, problem.expected) == (
        "slice distance",
        "3 mm everywhere",
    ) and problem.found.startswith("6 mm before IM")
    other = reader.refs()[1]
    shutil.copy(other.images[0], ref.images[0].with_name("IM9999.dcm"))
    (problem,) = survey(open_reader("dicom", reader.root), workers=1).problems
    assert (problem.field, problem.found) == ("series", "2 in case00")


def test_published_splits_are_those_of_scikit_learn():
    """The names on the right were drawn by scikit-learn 1.7's train_test_split."""
    names = [f"c{i:02d}" for i in range(13)]
    assert published(names[::-1])["80-20-seed41"][0]["val"] == ("c04", "c07", "c09")
    assert published(names)["80-20-seed2981"][0]["val"] == ("c00", "c04", "c07")
    found = published([f"{i:04d}" for i in range(647)])
    fold, test = found["70-15-15-seed42"][0], found["70-15-15-seed42-test"][0]
    assert (len(fold["train"]), len(fold["val"]), len(test["val"])) == (452, 97, 98)
    assert test["val"][:4] == ("0002", "0006", "0010", "0030") and fold["val"][:4] == (
        "0003",
        "0005",
        "0011",
        "0014",
    )
    lengths = published([f"{i:04d}" for i in range(2594)])["70-15-15-seed42"][0]
    assert (len(lengths["train"]), len(lengths["val"])) == (1815, 389) and published(["a"]) == {}
    assert {name for name in found if name.startswith("80-20-seed")} == {
        f"80-20-seed{seed}" for seed in (41, 2981, 6142, 1187)
    }
    for (one,) in found.values():
        assert all(one[side] == tuple(sorted(one[side])) for side in ("train", "val"))


def test_the_splits_of_asc_seg_have_its_sizes_and_overlap_nowhere():
    def sizes(count, name):
        folds = published([f"{i:04d}" for i in range(count)])
        fold, test = folds[name][0], folds.get(f"{name}-test", ({"val": ()},))[0]
        parts = [set(fold["train"]), set(fold["val"]), set(test["val"])]
        assert sum(map(len, parts)) == len(set.union(*parts)) == count
        return tuple(len(part) for part in parts)

    assert sizes(2594, "70-10-20-seed42") == (1815, 259, 520)
    assert sizes(200, "80-10-10-seed42") == (160, 20, 20)
    assert sizes(647, "80-20-shuffle42") == (518, 129, 0)
    # Python's own generator, sorted names, whatever order they come in
    names = [f"c{i:02d}" for i in range(10)]
    expected = list(names)
    random.Random(42).shuffle(expected)
    assert published(names[::-1])["80-10-10-seed42-test"][0]["val"] == (expected[9],)


REAL = {  # pack -> layout, cases, patients, labels that occur: as their README says
    "dsb2018": ("dsb2018", 402, 402, {0, 1}),
    "sunnybrook_acdc_layout": ("acdc", 24, 12, {0, 3}),
    "Task01_BrainTumour": ("msd", 2, 2, {0, 1, 2, 3}),
    "Task04_Hippocampus": ("msd", 208, 208, {0, 1, 2}),
}


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param("dsb2018", marks=pytest.mark.long),
        *(pack for pack in REAL if pack != "dsb2018"),
    ],
)
def test_real_packs_are_read_checked_and_stored(pack, shared_data, tmp_path):
    layout, cases, patients, labels = REAL[pack]
    root = shared_data(pack)
    manifest = build(BuildRequest(layout, root, tmp_path / "store", format="hdf5", workers=1))
    assert (
        len(manifest.cases) == cases and len({entry.group for entry in manifest.cases}) == patients
    )
    assert {value for entry in manifest.cases for value in entry.voxels} == labels and not verify(
        tmp_path / "store"
    )
    reader, store = open_reader(layout, root), open_store(tmp_path / "store")
    for ref, entry in list(zip(reader.refs(), manifest.cases, strict=True))[:: max(1, cases // 8)]:
        truth = store.truth(entry) if entry.has_truth else store.label(entry)
        assert np.array_equal(truth, reader.label(ref)[0])
    store.close()


def test_some_real_nuclei_are_stored(shared_data, tmp_path):
    """Every tenth image of the pack; all of them are a long test."""
    folders = sorted((shared_data("dsb2018") / "stage1_train").iterdir())[::10]
    (tmp_path / "raw").mkdir()
    for folder in folders:
        (tmp_path / "raw" / folder.name).symlink_to(folder)
    manifest = build(BuildRequest("dsb2018", tmp_path / "raw", tmp_path / "store", workers=1))
    assert (
        len(manifest.cases) == 41
        and not verify(tmp_path / "store")
        and manifest.plan.dtype == "uint8"
    )


def test_sunnybrook_slices_are_as_its_readme_says(shared_data):
    reader = open_reader("acdc", shared_data("sunnybrook_acdc_layout"))
    slices = {ref.id: peek(ref.images[0])[1] for ref in reader.refs()}
    assert (
        sum(slices.values()) == 241
        and slices["patient011_frame09"] == 10
        and slices["patient008_frame18"] == 14
    )
    assert {case[:10] for case in reader.splits()["evaluated-20"][0]["val"]} == {
        f"patient{n:03d}" for n in (2, 3, 8, 9, 12, 14)
    }


def test_all_problems_of_a_real_like_set_come_at_once(tmp_path):
    reader = opened("busi", tmp_path / "raw", 12)
    benign = reader.refs()[0].images[0].parent
    (benign / "benign (1)_mask.png").unlink()
    (benign / "benign (2).png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        build(BuildRequest("busi", reader.root, tmp_path / "store", workers=1))
    assert [(p.case, p.field) for p in caught.value.problems] == [
        ("benign (1)", "label"),
        ("benign (2)", "file"),
    ]


def test_nnunet_version_1_is_read_by_nnunet(tmp_path):
    root = PHANTOMS["msd"](tmp_path / "raw", cases=3, size=(8, 16, 16))
    document = json.loads((root / "dataset.json").read_text())
    for path in sorted((root / "imagesTr").iterdir()):
        for channel in range(2):
            shutil.copy(path, path.with_name(path.name.replace(".nii", f"_{channel:04d}.nii")))
        path.unlink()
    document["modality"] = {"0": "T1", "1": "T2"}
    (root / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="nnU-Net v1 folder. Use the layout nnunet"):
        open_reader("msd", root)
    reader = open_reader("nnunet", root)
    found = survey(reader, workers=1)
    assert not found.problems and found.dataset.channels == ("T1", "T2") and len(found.refs) == 3
    shutil.rmtree(root)
    with pytest.raises(InputError, match="Use the layout msd"):
        open_reader("nnunet", PHANTOMS["msd"](root, cases=1))


@pytest.mark.parametrize("name", ["glas", "cvc_clinicdb"])
def test_a_csv_that_is_none_is_passed_over(name, tmp_path):
    root = PHANTOMS[name](tmp_path / "raw")
    folder = open_reader(name, root).folder
    before = [ref.id for ref in open_reader(name, root).refs()]
    for path in folder.glob("*.csv"):
        path.unlink()
    (folder / "folder.csv").mkdir()
    (folder / "broken.csv").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.CSV")
    assert [ref.id for ref in open_reader(name, root).refs()] == before


def test_cases_of_a_pairing_are_looked_up_in_a_set(tmp_path):
    """However many there are, each name is asked for once."""

    class Counted(str):
        asked = 0

        def __eq__(self, other):
            Counted.asked += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    counts = []
    for many in (50, 500):
        Counted.asked = 0
        images = [Path(f"images/{n}.png") for n in range(many)]
        masks = [Path(f"masks/{n}.png") for n in range(many)]
        refs = paired(images, masks, "{}", "{}", mask_key=lambda p: Counted(p.stem))
        assert len(refs) == many and all(len(ref.labels) == 1 for ref in refs)
        counts.append(Counted.asked)
    assert counts[1] <= 11 * counts[0]


def test_dicom_files_are_named_as_they_like_and_all_are_hashed(tmp_path):
    reader = opened("dicom", tmp_path / "raw", 2)
    ref = reader.refs()[0]
    for n, path in enumerate(ref.images):
        path.rename(path.with_name(f"CT.1.2.840.{n}") if n % 2 else path.with_suffix(".DCM"))
    (ref.images[0].parent / "notes.txt").write_text("none of it")
    label = ref.labels[0]
    label.rename(label.with_name(f"1.2.840.5.{label.name}"))
    ref.images[0].parent.rename(ref.images[0].parent.with_name(f"1.2.840.5.{ref.id}"))
    reader = open_reader("dicom", reader.root)
    again = next(r for r in reader.refs() if r.id.startswith("1.2"))
    assert len(again.images) == len(ref.images) and again.labels[0].is_file()
    before = source_sha256(again)
    for path in again.images:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert source_sha256(again) != before
        before = source_sha256(again)


def test_an_nnunet_folder_has_its_own_name(tmp_path):
    root = PHANTOMS["nnunet"](tmp_path / "mine", cases=1)
    document = json.loads((root / "dataset.json").read_text())
    document.pop("name", None)
    (root / "dataset.json").write_text(json.dumps(document))
    assert open_reader("nnunet", root).dataset().name == "mine"


def test_masks_of_numbers_in_a_jpeg_are_a_problem(tmp_path):
    """Classes do not survive its compression; a mask that is all black is sound."""
    root = PHANTOMS["kvasir_seg"](tmp_path / "raw")
    reader = open_reader("kvasir_seg", root)
    path = reader.refs()[0].labels[0]
    grey = np.asarray(Image.open(path).convert("L"))
    Image.fromarray((grey > 127).astype(np.uint8) * 2).save(path)
    (problem,) = survey(reader, workers=1).problems
    assert problem.field == "mask values" and "no value above" in problem.found
    Image.fromarray(np.zeros_like(grey)).save(path)
    assert not survey(open_reader("kvasir_seg", root), workers=1).problems


def test_glands_are_what_a_palette_shows(tmp_path):
    root = PHANTOMS["glas"](tmp_path / "raw")
    reader = open_reader("glas", root)
    ref = reader.refs()[0]
    before = reader.label(ref)[0]
    picture = Image.fromarray((before[0] == 0).astype(np.uint8))
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(ref.labels[0])
    assert np.array_equal(reader.label(ref)[0], before)


def test_a_message_holds_no_addresses(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>404</html>")
    with pytest.raises(InputError) as caught:
        read_file(tmp_path / "a.png")
    assert "0x" not in str(caught.value)


def spelling(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize("layout", ["folder", "nnunet", "msd", "dicom"])
def test_names_that_look_the_same_are_one(layout, tmp_path):
    """Accents are stored in two ways, and some systems do not tell upper from lower case."""
    root = PHANTOMS[layout](tmp_path / "raw", cases=3)
    before = [reader_ref.id for reader_ref in open_reader(layout, root).refs()]
    for path in sorted(root.rglob("*"), key=lambda p: -len(p.parts)):
        if before[0] in path.name:
            own = path.parent.name.lower() in ("labels", "labelstr", "masks")
            new = path.name.replace(before[0], "Kn\u00e9e")
            path.rename(path.with_name(spelling(new) if own else new))
        elif before[1] in path.name and path.parent.name == "masks":
            path.rename(path.with_name(path.name.upper()))
    for path in root.glob("dataset.json"):
        text = path.read_text(encoding="utf-8").replace(before[0], "Kn\u00e9e")
        path.write_text(text, encoding="utf-8")
    reader = open_reader(layout, root)
    found = survey(reader, workers=1)
    assert not found.problems, found.problems
    assert sorted(ref.id for ref in found.refs) == sorted(["Kn\u00e9e", *before[1:]])


def test_what_a_damaged_file_says_is_one_line(tmp_path):
    error = ImageError(tmp_path / "a.dcm", "PixelSpacing", ".\x13\0SH\n", "2 numbers", "Mend it.")
    assert error.problem("a").found == ".??SH?" and "\n" not in str(error)
