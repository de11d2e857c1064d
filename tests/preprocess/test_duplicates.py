"""Pictures that look the same: found after a new compression, never invented."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from segfleet.preprocess.check import survey
from segfleet.preprocess.duplicates import nearly, thumbnail
from segfleet.preprocess.fingerprint import CaseFacts
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.splits import Member, disjoint, make_splits


def facts(number: int, image_YXC: np.ndarray, group: str = "") -> CaseFacts:
    image = np.moveaxis(image_YXC, -1, 0)[:, None]
    return CaseFacts(id=f"c{number}", group=group, raw_shape=image.shape[1:], thumbnail=thumbnail(image), image_sha256=str(number))


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
    others = [image // 2, image[::-1], np.roll(image, 12, axis=1), picture(0, 100), np.zeros((8, 8, 3), np.uint8), flat, flat + 1]
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
    assert (warning.case, warning.found) == ("case3", "looks the same as case10") and not found.problems
    members = [Member(id=ref.id, group=ref.group or ref.id, foreground={}) for ref in found.refs]
    assert {m.id for m in members if m.group == "case3"} == {"case3", "case10"}
    assert all(disjoint(fold, members) for fold in make_splits(members, 1)["kfold"])


@pytest.mark.long
def test_no_alarm_on_real_nuclei(shared_data):
    found = survey(open_reader("dsb2018", shared_data("dsb2018")), workers=1)
    assert not [w for w in found.warnings if "looks the same" in w.found]
