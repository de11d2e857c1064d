"""Prediction of raw files: names, geometry, bad inputs, going on after an interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from PIL import Image

from segfleet.core.errors import InputError, explain
from segfleet.pipeline import jobs
from segfleet.pipeline.inference.collect import collect
from segfleet.pipeline.inference.ensemble import Member
from segfleet.pipeline.inference.predict import Wishes, predict_files
from segfleet.pipeline.inference.sliding_window import Window
from segfleet.pipeline.reports.overlays import save_prediction
from segfleet.pipeline.scoring.evaluate import case_probabilities, raw_label
from segfleet.pipeline.stop import Interrupted
from segfleet.pipeline.task import make_task
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.files.images import read_label
from segfleet.preprocess.phantoms.phantom import (
    PHANTOMS,
    write_dsb_phantom,
    write_msd_phantom,
    write_nnunet_phantom,
)
from segfleet.preprocess.readers.base import Layout
from segfleet.preprocess.stores.base import open_store


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    write_msd_phantom(root / "raw_msd", cases=4, size=(10, 24, 24))
    write_nnunet_phantom(root / "raw_nnunet", cases=4, size=(8, 24, 24))
    write_dsb_phantom(root / "raw_dsb2018", images=4, size=32)
    opened = {}
    for name in ("msd", "nnunet", "dsb2018"):
        build(BuildRequest(name, root / f"raw_{name}", root / name, workers=1))
        opened[name] = (open_store(root / name), root / f"raw_{name}")
    return opened


def threshold(channels):
    """A crude network without parameters: channel k likes voxels k standard deviations above the
    tile's mean."""

    def forward(x):
        middle = x.mean(1, keepdim=True)
        axes = tuple(range(1, x.ndim))
        z = (middle - middle.mean(axes, keepdim=True)) / middle.std(axes, keepdim=True).clamp_min(
            1e-6
        )
        return torch.cat([torch.exp(-((z - k) ** 2)) for k in range(channels)], 1)

    return forward


WINDOW = ("overlap", "mirror_axes", "batch", "dims", "patch")


def member(store, forward=None, **window):
    manifest, task = store.manifest, make_task(store.manifest.dataset)
    forward = forward or threshold(task.channels)
    window = {"patch": manifest.plan.patch, **window}
    return Member(forward=lambda: forward, plan=manifest.plan, task=task, **window)


def predict(store, inputs, out, forward=None, draw=None, format="", layout=None, **more):
    window = {key: more.pop(key) for key in WINDOW if key in more}
    return predict_files(
        [member(store, forward, **window)],
        store.manifest.dataset,
        inputs,
        out,
        wishes=Wishes(draw=draw, format=format, layout=layout),
        **more,
    )


def copy_images(store, raw, folder):
    """The raw images of all cases in one folder; dsb2018 has one folder per image."""
    folder.mkdir()
    for path in sorted(raw.rglob("*")):
        if (
            path.is_file()
            and not path.name.startswith(".")
            and path.parent.name in ("imagesTr", "images")
        ):
            shutil.copy(path, folder / path.name)
    return folder


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_raw_files_give_what_the_store_gives(sets, name, tmp_path):
    """The same case through the preprocessed store and from its raw files: the same voxels, on the
    raw grid, with the raw geometry."""
    store, raw = sets[name]
    task = make_task(store.manifest.dataset)
    found = predict(store, [copy_images(store, raw, tmp_path / "in")], tmp_path / "out", batch=2)
    assert (found["failed"], found["kept"], found["exit_code"]) == ([], [], 0)
    assert sorted(entry["id"] for entry in found["done"]) == sorted(
        case.id for case in store.manifest.cases
    )
    for case in store.manifest.cases:
        window = Window(patch=store.manifest.plan.patch, batch=2)
        found = case_probabilities(threshold(task.channels), store, case, window)
        expected = raw_label(found, store, case, task)
        assert len(np.unique(expected)) > 1, "a threshold finds something"
        if name == "dsb2018":
            written = np.asarray(Image.open(tmp_path / "out" / f"{case.id}.png"))[None]
        else:
            file = nib.load(tmp_path / "out" / f"{case.id}.nii.gz")
            source = nib.load(next((tmp_path / "in").glob(f"{case.id}*.nii.gz")))
            assert np.array_equal(file.affine, source.affine) and file.shape == source.shape
            assert file.header.get_zooms() == source.header.get_zooms()
            written = np.asarray(file.dataobj).T
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_a_store_and_a_data_set_give_what_their_files_give(sets, name, tmp_path):
    store, raw = sets[name]
    files = predict(store, [copy_images(store, raw, tmp_path / "in")], tmp_path / "files")
    stored = predict(store, [store.root], tmp_path / "stored")
    layout = predict(store, [raw], tmp_path / "layout", layout=Layout(name))
    for kind, document in (("stored", stored), ("layout", layout)):
        assert document["failed"] == [] and len(document["done"]) == len(files["done"])
        for one in files["done"]:
            path = tmp_path / kind / Path(one["file"]).name
            assert np.array_equal(read_label(path)[0], read_label(Path(one["file"]))[0])
            if name != "dsb2018":
                np.testing.assert_allclose(nib.load(path).affine, nib.load(one["file"]).affine)
    assert predict(store, [store.root], tmp_path / "stored")["done"] == [], "kept"
    with pytest.raises(InputError, match="overlays: the raw image of"):
        predict(store, [store.root], tmp_path / "drawn", draw=save_prediction)


def test_an_oblique_affine_comes_back_to_the_bit(sets, tmp_path):
    store, _ = sets["msd"]
    turn, (c, s) = np.eye(4), (np.cos(0.3), np.sin(0.3))
    turn[:2, :2] = [[c, -s], [s, c]]
    affine = (turn @ np.diag([-0.9, 0.9, 2.5, 1.0])).astype(np.float32).astype(float)
    affine[:3, 3] = (31.5, -7.25, 100.125)
    image = np.random.default_rng(0).random((20, 22, 9), dtype=np.float32) + 0.5
    nib.Nifti1Image(image, affine).to_filename(tmp_path / "turned.nii.gz")
    found = predict(store, [tmp_path / "turned.nii.gz"], tmp_path / "out")
    written = nib.load(found["done"][0]["file"])
    assert written.shape == image.shape
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "turned.nii.gz").affine)


def test_real_volumes_keep_their_geometry(shared_data, tmp_path):
    """Four real MRI volumes with the affines of their scanner."""
    source, raw = shared_data("Task04_Hippocampus"), tmp_path / "raw"
    description = json.loads((source / "dataset.json").read_text())
    description |= {"training": description["training"][:4], "numTraining": 4}
    for entry in description["training"]:
        for path in entry.values():
            (raw / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / path, raw / path)
    (raw / "dataset.json").write_text(json.dumps(description))
    build(BuildRequest("msd", raw, tmp_path / "store", workers=1))
    found = predict(open_store(tmp_path / "store"), [raw / "imagesTr"], tmp_path / "out")
    assert len(found["done"]) == 4 and not found["failed"]
    for entry in found["done"]:
        written, image = (
            nib.load(entry["file"]),
            nib.load(raw / "imagesTr" / f"{entry['id']}.nii.gz"),
        )
        assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
        assert set(np.unique(np.asarray(written.dataobj))) == {0, 1, 2}


def test_a_4d_file_holds_all_channels(sets, tmp_path):
    store, raw = sets["nnunet"]
    case = store.manifest.cases[0].id
    parts = [nib.load(raw / "imagesTr" / f"{case}_{i:04d}.nii.gz") for i in range(2)]
    together = np.stack([np.asarray(p.dataobj, np.float32) for p in parts], -1)
    nib.Nifti1Image(together, parts[0].affine).to_filename(tmp_path / "both.nii.gz")
    apart = predict(
        store, [raw / "imagesTr" / f"{case}_{i:04d}.nii.gz" for i in range(2)], tmp_path / "a"
    )
    one = predict(store, [tmp_path / "both.nii.gz"], tmp_path / "b")
    a, b = (np.asarray(nib.load(found["done"][0]["file"]).dataobj) for found in (apart, one))
    assert a.any() and a.ndim == 3
    np.testing.assert_array_equal(a, b)


def test_a_bad_image_is_listed_and_the_rest_is_done(sets, tmp_path):
    store, raw = sets["msd"]
    folder = copy_images(store, raw, tmp_path / "in")
    good = sorted(p.name for p in folder.iterdir())
    (folder / good[0]).write_bytes((folder / good[0]).read_bytes()[:200])  # cut off
    image = nib.load(folder / good[1])
    nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine).to_filename(
        folder / good[1]
    )
    nib.Nifti1Image(np.ones((8, 8, 8, 3), np.float32), np.eye(4)).to_filename(
        folder / "three.nii.gz"
    )
    found = predict(store, [folder], tmp_path / "out")
    assert found["exit_code"] == 2
    assert [entry["id"] + ".nii.gz" for entry in found["done"]] == good[2:]
    problems = {entry["id"]: entry["problem"] for entry in found["failed"]}
    assert set(problems) == {
        good[0].removesuffix(".nii.gz"),
        good[1].removesuffix(".nii.gz"),
        "three",
    }
    assert "damaged or truncated" in problems[good[0].removesuffix(".nii.gz")]
    assert "nan" in problems[good[1].removesuffix(".nii.gz")]
    assert "channels: found 3, expected 1" in problems["three"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [
            *good[2:],
            ".predictions",
            "dataset.json",
            "labels.ctbl",
            "labels.json",
            "labels.label",
            "predictions.json",
        ]
    )
    assert sorted(p.name for p in (tmp_path / "out" / ".predictions").iterdir()) == [
        f"{name}.json" for name in good[2:]
    ]
    json.dumps(found, allow_nan=False)


GRIDS = {
    "singular": np.diag([1.0, 1.0, 0.0, 1.0]),
    "not finite": np.diag([np.nan, 1.0, 1.0, 1.0]),
    "beyond this world": np.diag([1e30, 1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("fault", GRIDS)
def test_a_grid_that_cannot_be_true_is_one_line_and_an_older_prediction_stays(
    fault, sets, tmp_path
):
    store, raw = sets["msd"]
    folder, out = copy_images(store, raw, tmp_path / "in"), tmp_path / "out"
    first, *others = sorted(folder.iterdir())
    for path in others[1:]:
        path.unlink()
    done = predict(store, [folder], out)["done"]
    before = Path(done[0]["file"]).read_bytes()
    image = nib.load(first)
    header = image.header.copy()
    header.set_qform(None, 0)
    header.set_sform(GRIDS[fault], 1)
    header["vox_offset"] = 352
    data = header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F")
    first.write_bytes(data)
    found = predict(store, [folder], out)
    (failed,) = found["failed"]
    assert failed["id"] == done[0]["id"] and "\n" not in failed["problem"]
    assert "affine" in failed["problem"] or "spacing" in failed["problem"]
    assert [one["id"] for one in found["kept"]] == [done[1]["id"]]
    assert Path(done[0]["file"]).read_bytes() == before


@pytest.mark.parametrize("kind", [".nii.gz", ".mha"])
def test_a_full_disk_ends_it_and_what_is_done_is_kept(sets, tmp_path, monkeypatch, kind):
    """One sentence, and not one for each of the images that would find it full, too."""
    store, raw = sets["msd"]
    folder, out = copy_images(store, raw, tmp_path / "in"), tmp_path / "out"
    for path in folder.iterdir():
        if kind != ".nii.gz":
            sitk.WriteImage(sitk.ReadImage(path), folder / path.name.replace(".nii.gz", kind))
            path.unlink()
    names = sorted(path.name for path in folder.iterdir())

    def full(path):
        if names[1] in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def itk(image, path, compress, write=sitk.WriteImage):
        if names[1] in path:
            raise RuntimeError("MetaImageIO: File cannot be written")
        write(image, path, compress)

    with monkeypatch.context() as patch:
        if kind == ".nii.gz":
            patch.setattr("segfleet.core.files.sync_file", full)
        else:
            patch.setattr("SimpleITK.WriteImage", itk)
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(OSError) as error:
            predict(store, [folder], out)
    words, code = explain(error.value)
    assert words.startswith(f"no space left on the device at {out}/") and code == 2
    assert f"{names[1]}" in words and "Free some and run the same command again" in words
    found = predict(store, [folder], out)
    assert len(found["kept"]) == 1 and len(found["done"]) == len(names) - 1


def test_finished_files_are_kept_and_other_networks_are_refused(sets, tmp_path):
    store, raw = sets["msd"]
    folder, out = copy_images(store, raw, tmp_path / "in"), tmp_path / "out"
    calls = []

    def forward(x):
        calls.append(len(x))
        return threshold(3)(x)

    def stop_after_two(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(store, [folder], out, forward, made_by="run a", progress=stop_after_two)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.nii.gz")}
    assert len(before) == 2
    found = predict(store, [folder], out, forward, made_by="run a")
    assert (len(found["kept"]), len(found["done"])) == (2, 2)
    assert all((out / name).stat().st_mtime_ns == facts[1] for name, facts in before.items())
    calls.clear()
    assert len(predict(store, [folder], out, forward, made_by="run a")["kept"]) == 4 and not calls
    with pytest.raises(InputError, match="made by 'run a'"):
        predict(store, [folder], out, forward, made_by="run b")


def picture(path, seed):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
        path
    )
    os.utime(path, (1e9, 1e9))  # as out of an archive
    return path


def counts(found):
    return len(found["done"]), len(found["kept"]), len(found["failed"])


def test_a_prediction_of_another_image_or_of_other_settings_is_written_again(sets, tmp_path):
    store, out = sets["dsb2018"][0], tmp_path / "out"
    first, other = picture(tmp_path / "a" / "x.bmp", 0), picture(tmp_path / "b" / "x.bmp", 1)
    assert (
        first.stat().st_size == other.stat().st_size
        and first.stat().st_mtime_ns == other.stat().st_mtime_ns
    )
    wanted = {
        path: np.asarray(
            Image.open(predict(store, [path], path.parent / "alone")["done"][0]["file"])
        )
        for path in (first, other)
    }
    assert not np.array_equal(*wanted.values())
    for path, expected in (
        (first, (1, 0, 0)),
        (first, (0, 1, 0)),
        (other, (1, 0, 0)),
        (other, (0, 1, 0)),
        (first, (1, 0, 0)),
    ):
        assert counts(predict(store, [path], out)) == expected
        np.testing.assert_array_equal(np.asarray(Image.open(out / "x.bmp")), wanted[path])
    picture(first, 2)  # changed in place
    assert counts(predict(store, [first], out)) == (1, 0, 0)
    assert counts(predict(store, [first], out, mirror_axes=(1, 2))) == (1, 0, 0)
    assert counts(predict(store, [first], out, mirror_axes=(2, 1), batch=3)) == (0, 1, 0)
    assert counts(predict(store, [first], out, mirror_axes=(1, 2), overlap=0.25)) == (1, 0, 0)


def test_the_spacing_beside_a_tiff_belongs_to_the_image(tmp_path):
    tifffile.imwrite(tmp_path / "x_0000.tif", np.zeros((4, 8, 8), np.uint8))
    (one,) = collect([tmp_path], 1)
    before = one.content()
    for name in ("x.json", "x_0000.json"):
        (tmp_path / name).write_text('{"spacing": [2, 1, 1]}')
        assert one.content() != before
        before = one.content()


def test_a_kill_between_the_steps_of_a_rewrite_leaves_no_old_file_under_a_new_note(
    sets, tmp_path, monkeypatch
):
    store, out = sets["dsb2018"][0], tmp_path / "out"
    first, other = picture(tmp_path / "a" / "x.png", 0), picture(tmp_path / "b" / "x.png", 1)
    predict(store, [first], out)
    with monkeypatch.context() as patch:
        patch.setattr(
            "segfleet.pipeline.inference.predict.write_label",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            predict(store, [other], out)
    assert not (out / "x.png").exists() and counts(predict(store, [other], out)) == (1, 0, 0)


def test_a_file_that_is_no_prediction_is_left_alone(sets, tmp_path):
    store, out = sets["dsb2018"][0], tmp_path / "out"
    path, truth = (
        picture(tmp_path / "a" / "x.png", 0),
        picture(tmp_path / "out" / "x.png", 1).read_bytes(),
    )
    found = predict(store, [path], out)
    assert (
        counts(found) == (0, 0, 1)
        and "x.png is there already, and no note says what it was made of"
        in found["failed"][0]["problem"]
    )
    assert (out / "x.png").read_bytes() == truth


def test_images_are_never_overwritten(sets, tmp_path):
    store, raw = sets["msd"]
    folder = copy_images(store, raw, tmp_path / "in")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="overwrite"):
        predict(store, [folder], folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def ids(found):
    return [(one.id, len(one.images), bool(one.problem)) for one in found]


def test_channels_and_numbered_images_are_told_apart(tmp_path):
    two = touch(
        tmp_path / "two",
        "b_0000.nii.gz",
        "b_0001.nii.gz",
        "a10_0000.nii.gz",
        "a10_0001.nii.gz",
        "a2_0000.nii.gz",
        "c_0001.nii.gz",
    )
    assert ids(collect([two], 2)) == [
        ("a2", 1, False),
        ("a10", 2, False),
        ("b", 2, False),
        ("c", 1, True),
    ]
    one = touch(
        tmp_path / "one",
        "scan_0000.png",
        "scan_0001.png",
        "scan_0007.png",
        "x_0000.png",
        "._x_0000.png",
        "notes.txt",
    )
    assert ids(collect([one], 1)) == [
        ("scan_0000", 1, False),
        ("scan_0001", 1, False),
        ("scan_0007", 1, False),
        ("x", 1, False),
    ]
    plain = touch(tmp_path / "plain", "BRATS_001.nii.gz", "ISIC_0012345.jpg")
    assert ids(collect([plain], 4)) == [("BRATS_001", 1, False), ("ISIC_0012345", 1, False)]


def test_two_images_of_one_name_are_a_problem(tmp_path):
    folder = touch(tmp_path / "in", "a.jpg", "a.png")
    found = collect([folder], 3)
    assert [one.output for one in found] == ["a.png", "a.png"]
    assert [bool(one.problem) for one in found] == [False, True]
    assert len(collect([folder / "a.png", folder / "a.png"], 3)) == 1, (
        "the same file twice is one image"
    )


def test_nothing_to_do_is_an_error(sets, tmp_path):
    with pytest.raises(InputError, match="no file or folder"):
        collect([tmp_path / "missing"], 1)
    with pytest.raises(InputError, match="no image"):
        collect([touch(tmp_path / "empty", "readme.txt")], 1)
    with pytest.raises(InputError, match="file ending"):
        collect([tmp_path / "empty" / "readme.txt"], 1)


def test_a_grey_picture_among_colour_ones(sets, tmp_path):
    store, _ = sets["dsb2018"]
    grey = np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(grey[..., None], 3, -1)).save(tmp_path / "rgb.png")
    found = predict(store, [tmp_path / "grey.png", tmp_path / "rgb.png"], tmp_path / "out")
    a, b = (np.asarray(Image.open(entry["file"])) for entry in found["done"])
    assert a.shape == (40, 30) and a.any()
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "kind", ["LA", "L16", "RGBA", "P", "P with alpha", "CMYK", "RGBA.tif", "RGB16.tif", "L.tif"]
)
def test_pictures_of_every_kind_are_read_as_preprocessing_reads_them(sets, kind, tmp_path):
    """Grey ones are repeated, alpha is dropped, palettes are looked up, whites of 16 bit are
    white."""
    store, _ = sets["dsb2018"]
    draw = np.random.default_rng(0)
    colour = np.repeat(np.repeat(draw.integers(0, 5, (10, 8, 3)), 4, 0), 4, 1).astype(np.uint8) * 60
    grey, alpha = colour[..., 0], draw.integers(0, 255, (40, 32, 1), dtype=np.uint8)
    plain, odd = (
        tmp_path / "plain.png",
        tmp_path / f"odd.{'tif' if kind.endswith('tif') else 'png'}",
    )
    if kind in ("LA", "L16", "L.tif"):
        colour = np.repeat(grey[..., None], 3, -1)
    if kind == "LA":
        Image.fromarray(np.concatenate([grey[..., None], alpha], -1)).save(odd)
    elif kind == "L16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(odd)
    elif kind in ("RGBA", "RGBA.tif"):
        Image.fromarray(np.concatenate([colour, alpha], -1)).save(odd)
    elif kind == "P":
        Image.fromarray(colour).quantize(256).save(odd)
    elif kind == "P with alpha":
        Image.fromarray(colour).quantize(256).save(odd, transparency=3)
    elif kind == "CMYK":
        odd = tmp_path / "odd.jpg"
        Image.fromarray(colour).convert("CMYK").save(odd, quality=100, subsampling=0)
        colour = np.asarray(Image.open(odd).convert("RGB"))
    elif kind == "RGB16.tif":
        tifffile.imwrite(odd, colour.astype(np.uint16) * 257, photometric="rgb")
    else:
        tifffile.imwrite(odd, grey)
    Image.fromarray(colour).save(plain)
    found = predict(store, [plain, odd], tmp_path / "out")
    assert not found["failed"]
    files = {entry["id"]: entry["file"] for entry in found["done"]}
    one, other = (np.squeeze(read_label(Path(files[name]))[0]) for name in ("plain", "odd"))
    assert one.any() and not one.all()
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("name", "found"), [("dsb2018", 5), ("msd", 2)])
def test_a_wrong_number_of_channels_names_the_file(sets, name, found, tmp_path):
    store, _ = sets[name]
    path = tmp_path / ("five.tif" if name == "dsb2018" else "two.nii.gz")
    if name == "dsb2018":
        tifffile.imwrite(path, np.zeros((5, 20, 20), np.uint8), metadata={"axes": "CYX"})
    else:
        nib.save(nib.Nifti1Image(np.ones((20, 20, 8, 2), np.float32), np.eye(4)), path)
    (failed,) = predict(store, [path], tmp_path / "out")["failed"]
    assert failed["problem"].startswith(
        f"{path}: channels: found {found}, expected {len(store.manifest.dataset.channels)}. Save"
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_a_png_prediction_shows_colours_and_keeps_its_values(sets, tmp_path):
    store, raw = sets["dsb2018"]
    images = copy_images(store, raw, tmp_path / "in")
    found = predict(store, [images], tmp_path / "out", draw=save_prediction)
    for entry in found["done"]:
        with Image.open(entry["file"]) as picture:
            assert picture.mode == "P" and set(np.unique(np.asarray(picture))) == {0, 1}
            colours = set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))
        assert colours == {(0, 0, 0), (230, 159, 0)}
        label, _ = read_label(Path(entry["file"]))
        assert set(np.unique(label)) == {0, 1}
    # an overlay for each, drawn again if it is gone, and no image to the next prediction
    overlays = tmp_path / "out" / "overlays"
    names = sorted(path.name for path in overlays.iterdir())
    assert names == sorted(f"{entry['id']}.png" for entry in found["done"])
    drawn = np.asarray(Image.open(overlays / names[0]).convert("RGB")).reshape(-1, 3)
    assert (drawn == (255, 140, 0)).all(1).any(), "an outline in the colour of predictions"
    (overlays / names[0]).unlink()
    again = predict(store, [images], tmp_path / "out", draw=save_prediction)
    assert len(again["kept"]) == len(names) and (overlays / names[0]).exists()


def test_overlays_of_volumes(sets, tmp_path):
    store, raw = sets["nnunet"]
    images = copy_images(store, raw, tmp_path / "in")
    found = predict(store, [images], tmp_path / "out", draw=save_prediction)
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == len(found["done"]) > 0


@pytest.mark.parametrize("damage", ["truncated", "emptied", "zeroed", "edited"])
def test_a_prediction_that_is_not_as_it_was_written_is_never_there(sets, tmp_path, damage):
    store, out = sets["dsb2018"][0], tmp_path / "out"
    path = picture(tmp_path / "a" / "x.png", 0)
    predict(store, [path], out)
    made = (out / "x.png").read_bytes()
    bad = {
        "truncated": made[:-9],
        "emptied": b"",
        "zeroed": bytes(len(made)),
        "edited": made + b"\n",
    }[damage]
    (out / "x.png").write_bytes(bad)
    found = predict(store, [path], out)
    assert counts(found) == (0, 0, 1) and found["exit_code"] == 2
    assert "not as it was written: damaged, or edited by hand" in found["failed"][0]["problem"]
    assert (out / "x.png").read_bytes() == bad  # it may hold somebody's work
    (out / "x.png").unlink()
    assert counts(predict(store, [path], out)) == (1, 0, 0)
    assert (out / "x.png").read_bytes() == made


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_note_of_a_prediction_is_named_and_it_is_made_again(
    sets, tmp_path, capsys, damage
):
    store, out = sets["dsb2018"][0], tmp_path / "out"
    path = picture(tmp_path / "a" / "x.png", 0)
    predict(store, [path], out)
    made, note = (out / "x.png").read_bytes(), out / ".predictions" / "x.png.json"
    note.write_bytes(damage)
    assert counts(predict(store, [path], out)) == (1, 0, 0)
    assert f"{note} is damaged; x.png is made again" in capsys.readouterr().err
    assert (out / "x.png").read_bytes() == made and counts(predict(store, [path], out)) == (0, 1, 0)


def test_predictions_as_dicom_seg(tmp_path):
    """On the series they were made of: read back they are the NIfTI prediction, voxel by voxel."""
    pytest.importorskip("highdicom")
    nrrd = pytest.importorskip("nrrd")
    from segfleet.preprocess.files.grids import settled
    from segfleet.preprocess.files.segments import read_seg

    raw = PHANTOMS["dicom"](tmp_path / "raw", cases=2)
    build(BuildRequest("dicom", raw, tmp_path / "store", workers=1))
    store, series = open_store(tmp_path / "store"), raw / "images"
    plain = predict(store, [series], tmp_path / "nifti")
    drawn = []
    for count in (2, 0):
        found = predict(
            store, [series], tmp_path / "seg", format="dicom-seg",
            draw=lambda path, image, label, spacing: drawn.append((path.stem, label)),
        )  # fmt: skip
        assert len(found["done"]) == count and not found["failed"]
    for one in plain["done"]:
        label, geometry = read_label(Path(one["file"]))
        names = store.manifest.dataset.labels
        seg, _ = settled(*read_seg(tmp_path / f"seg/{one['id']}.dcm", names), geometry)
        assert label.any() and np.array_equal(seg, label)
        assert np.array_equal(dict(drawn)[one["id"]], label)
    found = predict(store, [series], tmp_path / "slicer", format="seg-nrrd")
    for one, other in zip(plain["done"], found["done"], strict=True):
        label, geometry = read_label(Path(one["file"]))
        assert nib.load(one["file"]).header["intent_code"] == 1002
        shown, grid = read_label(Path(other["file"]), names=names)
        assert np.array_equal(shown, label) and np.allclose(grid.affine, geometry.affine)
        header = nrrd.read_header(other["file"])
        assert {
            header[f"Segment{n}_Name"]: int(header[f"Segment{n}_LabelValue"]) for n in (0, 1)
        } == {name: value for name, value in names.items() if value}
        assert header["Segment0_Color"] != header["Segment1_Color"]
    picture(tmp_path / "a.png", 0)
    found = predict(store, [tmp_path / "a.png"], tmp_path / "more", format="dicom-seg")
    assert "a DICOM SEG needs a DICOM series" in found["failed"][0]["problem"]
    with pytest.raises(InputError, match="format: found 'seg', expected dicom-seg"):
        predict(store, [series], tmp_path / "odd", format="seg")


@pytest.mark.parametrize(("size", "words"), [(1, "1 of 60 images"), (2, "1 of rank 0's 60 images")])
def test_a_stop_says_whose_images_are_counted(monkeypatch, size, words):
    monkeypatch.setattr(jobs, "predict", lambda job, ranks, progress, deciding: progress(1, 60))
    job, ranks = SimpleNamespace(answer="answer"), SimpleNamespace(size=size, rank=0)
    with pytest.raises(Interrupted, match=f"stopped after {words}; the same command"):
        jobs.run_prediction(job, ranks, SimpleNamespace(asked=lambda: True))
