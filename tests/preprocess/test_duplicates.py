"""Pictures that look the same: found after a new compression, never invented."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.checking.duplicates import nearly, shared, thumbnail
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.planning.fingerprint import CaseFacts
from segfleet.preprocess.planning.splits import Member, disjoint, make_splits
from segfleet.preprocess.readers.base import open_reader


def facts(number: int, image_YXC: np.ndarray, group: str = "") -> CaseFacts:
    image = np.moveaxis(image_YXC, -1, 0)[:, None]
    return CaseFacts(
        id=f"c{number}",
        group=group,
        raw_shape=image.shape[1:],
        thumbnail=thumbnail(image),
        image_sha256=str(number),
    )


def picture(seed: int, size: int = 96) -> np.ndarray:
    draw = np.random.default_rng(seed).integers(20, 200, (8, 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(draw).resize((size, size), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("quality", [60, 75, 90])
def test_a_new_compression_is_seen_through(quality):
    pictures = [picture(seed) for seed in range(12)]
    cases = [facts(k, image) for k, image in enumerate([*pictures, jpeg(pictures[5], quality)])]
    assert [(a.id, b.id) for a, b in nearly(cases)] == [("c5", "c12")]


def test_what_is_no_copy():
    image = picture(0)
    flat = np.full((96, 96, 3), 40, np.uint8)
    others = [
        image // 2,
        image[::-1],
        np.roll(image, 12, axis=1),
        picture(0, 100),
        np.zeros((8, 8, 3), np.uint8),
        flat,
        flat + 1,
    ]
    assert not list(nearly([facts(k, one) for k, one in enumerate([image, *others])]))
    frames = [facts(k, one, group="sequence1") for k, one in enumerate([image, jpeg(image, 90)])]
    assert not list(nearly(frames)), "frames of a sequence look alike"


def test_a_recompressed_case_stays_on_its_side(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((96, 96), np.uint8)
    mask[20:50, 30:60] = 255
    images = [picture(seed) for seed in range(10)]
    for k, image in enumerate([*images, jpeg(images[3], 80)]):
        Image.fromarray(image).save(tmp_path / "images" / f"case{k}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"case{k}.png")
    found = survey(open_reader("folder", tmp_path), workers=1)
    (warning,) = [w for w in found.warnings if w.field == "image"]
    assert (warning.case, warning.found) == (
        "case3",
        "looks the same as case10",
    ) and not found.problems
    members = [Member(id=ref.id, group=ref.group or ref.id, foreground={}) for ref in found.refs]
    assert {m.id for m in members if m.group == "case3"} == {"case3", "case10"}
    assert all(disjoint(fold, members) for fold in make_splits(members, 1)["kfold"])


def test_images_of_another_data_set_are_named(tmp_path):
    """As with ISIC 2017 and 2018: another file, the same pixels."""
    newer, older = (
        open_reader(name, PHANTOMS[name](tmp_path / name, cases=8, seed=k))
        for k, name in enumerate(("isic2018", "isic2017"))
    )
    manifest = build(BuildRequest("isic2018", newer.root, tmp_path / "store", workers=1))
    assert not shared(survey(older, workers=1).facts, manifest)
    there, here = newer.refs()[-1], older.refs()[1]
    here.images[0].write_bytes(there.images[0].read_bytes() + b"\0")
    here.labels[0].write_bytes(there.labels[0].read_bytes())
    command = [
        "datasets",
        "isic2017",
        "check",
        older.root,
        "--against",
        tmp_path / "store",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    (warning,) = [w for w in json.loads(done.stdout)["warnings"] if "also in" in w["found"]]
    assert done.returncode == 0 and warning["case"] == here.id
    fold = next(n for n, fold in enumerate(manifest.splits["kfold"]) if there.id in fold["val"])
    assert (
        f"isic2018: {there.id} (kfold: val of fold {fold}, official-test: val)" in warning["found"]
    )
    old = manifest.model_copy(
        update={
            "cases": tuple(
                entry.model_copy(update={"image_sha256": ""}) for entry in manifest.cases
            )
        }
    )
    with pytest.raises(InputError, match="against: the store does not record"):
        shared(survey(older, workers=1).facts, old)


@pytest.mark.long
def test_no_alarm_on_real_nuclei(shared_data):
    found = survey(open_reader("dsb2018", shared_data("dsb2018")), workers=1)
    assert not [w for w in found.warnings if "looks the same" in w.found]
