"""What the user decides instead of the planner: fixed size, patch, spacing, options of a layout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.planning.plan import Overrides
from segfleet.preprocess.readers.base import open_reader, readers
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import Dataset
from segfleet.preprocess.transforms.case_transforms import resample_probabilities
from segfleet.preprocess.transforms.resample import resample_image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return PHANTOMS["busi"](tmp_path_factory.mktemp("pictures") / "raw", cases=6)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return PHANTOMS["lits"](tmp_path_factory.mktemp("volumes") / "raw", cases=3)


def test_every_image_gets_the_size_and_the_truth_stays(pictures, tmp_path):
    manifest = build(
        BuildRequest(
            "busi", pictures, tmp_path / "store", workers=1, overrides=Overrides(size=(32, 40))
        )
    )
    assert (
        manifest.plan.size == manifest.plan.patch == (1, 32, 40) and manifest.plan.dtype == "uint8"
    )
    reader, store = open_reader("busi", pictures), open_store(tmp_path / "store")
    assert len({entry.raw_shape for entry in manifest.cases}) > 1 and {
        entry.shape for entry in manifest.cases
    } == {(1, 32, 40)}
    for ref, entry in zip(reader.refs(), manifest.cases, strict=True):
        case = reader.read(ref)
        assert entry.has_truth and np.array_equal(store.truth(entry), case.label_ZYX)
        expected = resample_image(case.image_CZYX.astype(np.float32) / 255, (1, 32, 40))
        assert np.abs(store.image(entry) - np.clip(expected, 0, 1)).max() <= 0.5 / 255 + 1e-6
        assert entry.spacing == pytest.approx((1, entry.raw_shape[1] / 32, entry.raw_shape[2] / 40))
        back = (
            resample_probabilities(
                (store.label(entry) == 1).astype(np.float32)[None], entry.raw_shape
            )[0]
            > 0.5
        )
        together = (
            2 * (back & (case.label_ZYX == 1)).sum() / max(1, back.sum() + case.label_ZYX.sum())
        )
        assert together > 0.93 or reader.may_be_empty(ref), (
            "scores at native resolution remain possible"
        )
    store.close()


def test_grey_images_of_one_size_are_not_cropped(tmp_path):
    """Black margins must not be stretched away."""
    from PIL import Image

    for folder in ("images", "masks"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        for index in range(2):
            pixels = np.zeros((20, 30), np.uint8)
            pixels[5:10, 8 : 16 + index] = 200
            Image.fromarray(pixels).save(tmp_path / "raw" / folder / f"{index}.png")
    manifest = build(
        BuildRequest(
            "folder",
            tmp_path / "raw",
            tmp_path / "store",
            workers=1,
            overrides=Overrides(size=(40, 60)),
        )
    )
    assert manifest.cases[0].crop == ((0, 1), (0, 20), (0, 30)) and manifest.plan.normalisation == (
        "zscore",
    )
    store = open_store(tmp_path / "store")
    rows, columns = (
        np.flatnonzero(store.label(manifest.cases[0])[0].any(axis=axis)) for axis in (1, 0)
    )
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (10, 20, 16, 32)
    store.close()


def test_patch_and_spacing_replace_the_planned_ones(volumes, tmp_path):
    wish = Overrides(patch=(8, 16, 24), spacing=(2.0, 1.0, 1.0))
    manifest = build(BuildRequest("lits", volumes, tmp_path / "store", workers=1, overrides=wish))
    assert (
        manifest.plan.patch == (8, 16, 24)
        and manifest.plan.target_spacing == (2.0, 1.0, 1.0)
        and manifest.plan.size is None
    )
    assert all(entry.spacing == (2.0, 1.0, 1.0) for entry in manifest.cases)
    assert (
        build(BuildRequest("lits", volumes, tmp_path / "store", workers=1, overrides=wish))
        == manifest
    ), "nothing to do"
    with pytest.raises(InputError, match="made from something else: the plan"):
        build(BuildRequest("lits", volumes, tmp_path / "store", workers=1))


@pytest.mark.parametrize(
    ("dims", "wish", "message"),
    [
        (3, {"size": (32, 32)}, "size: found 32 x 32, but d is 3D"),
        (2, {"size": (32, 2)}, r"size: found 32 x 2, expected 2 numbers \(y x\) from 4 to 8192"),
        (2, {"size": (32, 32), "spacing": (1.0, 1.0)}, "size, spacing: found both"),
        (2, {"patch": (1, 32, 32)}, r"patch: found 1 x 32 x 32, expected 2 numbers \(y x\)"),
        (3, {"patch": (32, 32)}, r"patch: found 32 x 32, expected 3 numbers \(z y x\)"),
        (3, {"patch": (0, 32, 32)}, "from 1 to 8192"),
        (3, {"spacing": (1.0, 0.0, 1.0)}, "spacing: found 1 x 0 x 1, expected 3 numbers"),
    ],
)
def test_impossible_wishes_are_refused(dims, wish, message):
    dataset = Dataset(
        name="d", reader="folder", dims=dims, channels=("a",), labels={"background": 0, "b": 1}
    )
    with pytest.raises(InputError, match=message):
        Overrides(**wish).check(dataset)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_takes_all_of_it(pictures, volumes, tmp_path):
    done = run(
        "preprocess",
        "busi",
        "--raw",
        pictures,
        "--out",
        tmp_path / "a",
        "--size",
        32,
        40,
        "--option",
        "normals=drop",
        "--json",
    )
    found = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and found["cases"] == 5
        and found["plan"]["size"] == [1, 32, 40]
        and "80-20-seed41" in found["splits"]
    )
    done = run(
        "preprocess",
        "lits",
        "--raw",
        volumes,
        "--out",
        tmp_path / "b",
        "--patch",
        "8x16x16",
        "--spacing",
        "2,1,1",
        "--json",
    )
    assert json.loads(done.stdout)["plan"]["patch"] == [8, 16, 16]
    for wrong, message in (
        (("--patch", "8xa"), "patch: found '8xa'"),
        (("--size", 8, 8), "but lits is 3D"),
        (("--option", "x"), "NAME=VALUE"),
    ):
        done = run("preprocess", "lits", "--raw", volumes, "--out", tmp_path / "c", *wrong)
        assert (
            done.returncode == 2
            and message in done.stderr
            and "Traceback" not in done.stderr
            and not (tmp_path / "c").exists()
        )


def test_the_table_of_data_sets_says_where_they_come_from():
    (busi,) = [
        found for found in json.loads(run("datasets", "--json").stdout) if found["name"] == "busi"
    ]
    assert (
        busi["complete"] == 780
        and busi["download"].startswith("http")
        and busi["options"] == {"normals": ["keep", "drop"]}
    )
    assert run("datasets").returncode == 0


def test_the_guide_names_every_layout_and_its_splits(tmp_path):
    """The table of docs/datasets.md against the readers; official splits are those a phantom
    brings."""
    guide = (Path(__file__).resolve().parents[2] / "docs/datasets.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", guide, re.MULTILINE))
    assert sorted(rows) == readers()
    for name, row in rows.items():
        if name not in PHANTOMS:
            continue
        brought = open_reader(name, PHANTOMS[name](tmp_path / name, seed=1)).splits()
        assert all(
            split in row
            for split in brought
            if not split.startswith(
                ("80-20-seed", "80-20-shuffle", "70-15-15", "70-10-20", "80-10-10", "70-30")
            )
            and split != "nnunet"
        ), name
        assert ("80-20-seed" in row) == ("80-20-seed41" in brought), name


def test_resizing_and_normalisation_by_the_field_s_names(pictures, tmp_path):
    wish = Overrides(
        size=(32, 40), interpolation="bilinear", masks="nearest", normalisation="imagenet"
    )
    manifest = build(BuildRequest("busi", pictures, tmp_path / "store", workers=1, overrides=wish))
    plan, store = manifest.plan, open_store(tmp_path / "store")
    assert (plan.interpolation, plan.masks, plan.dtype) == ("bilinear", "nearest", "float16")
    plain = build(
        BuildRequest(
            "busi", pictures, tmp_path / "plain", workers=1, overrides=Overrides(size=(32, 40))
        )
    )
    assert plain.id != manifest.id
    reader = open_reader("busi", pictures)
    for ref, entry in zip(reader.refs(), manifest.cases, strict=True):
        case = reader.read(ref)
        small = resample_image(case.image_CZYX / 255, (1, 32, 40), interpolation="bilinear")
        mean = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1, 1)
        std = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1, 1)
        assert np.abs(store.image(entry) - (small - mean) / std).max() < 4e-3  # float16
        assert set(np.unique(store.label(entry))) <= {0, 1}


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation: found 'lanczos', expected one of: cubic"),
        ({"masks": "cubic"}, "masks: found 'cubic', expected one of: linear, nearest"),
        ({"normalisation": "l2"}, "normalisation: found 'l2', expected one of: zscore"),
    ],
)
def test_unknown_names_are_refused(pictures, tmp_path, wish, message):
    with pytest.raises(InputError, match=message):
        build(
            BuildRequest(
                "busi", pictures, tmp_path / "store", workers=1, overrides=Overrides(**wish)
            )
        )
    assert not (tmp_path / "store").exists()
