"""Black and white masks: what is one, and what is silently not taken for one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.files.images import ImageError
from segfleet.preprocess.files.masks import read_mask
from segfleet.preprocess.readers.base import open_reader

Y, X = np.indices((64, 80))
DISC = (Y - 20) ** 2 + (X - 30) ** 2 < 144
OTHER = (Y - 45) ** 2 + (X - 60) ** 2 < 60


def numbers(*values: int) -> np.ndarray:
    """0, then the disc, then another one inside a third."""
    mask = np.zeros(DISC.shape, np.uint8)
    for where, value in zip((DISC, OTHER, X > 75), values, strict=False):
        mask[where] = value
    return mask


def smoothed(times: int) -> np.ndarray:
    fine = np.kron(DISC, np.ones((times, times)))[times // 2 :, times // 2 :]
    fine = np.pad(fine, ((0, times // 2), (0, times // 2)))
    return np.rint(255 * fine.reshape(64, times, 80, times).mean((1, 3))).astype(np.uint8)


GOOD = {"0/1": numbers(1), "0/255": numbers(255), "0/38": numbers(38), "smoothed": smoothed(4)}
BAD = {
    "0/1/2": numbers(1, 2),
    "0/1/255": numbers(1, 255),
    "0/128/255": numbers(128, 255),
    "0/50/100/200": numbers(50, 100, 200),
    "1/2": numbers(1) + 1,
    "five classes": (Y // 13 * 60).astype(np.uint8),
    "small numbers beside white": np.where(DISC, 255, X // 20).astype(np.uint8),
}


@pytest.mark.parametrize("name", GOOD)
def test_masks_are_read(name, tmp_path):
    Image.fromarray(GOOD[name]).save(tmp_path / "a.png")
    mask, geometry = read_mask(tmp_path / "a.png")
    assert (mask[0] != DISC).mean() < (0.01 if name == "smoothed" else 1e-9)
    assert geometry.file.white == GOOD[name].max()


@pytest.mark.parametrize("name", BAD)
def test_classes_are_never_merged(name, tmp_path):
    for kind in (".png", ".bmp", ".tif"):
        Image.fromarray(BAD[name]).save(tmp_path / f"a{kind}")
        with pytest.raises(ImageError, match="mask values: found .*") as caught:
            read_mask(tmp_path / f"a{kind}")
        assert "labels.json" in str(caught.value)


def test_jpeg_rings_and_classes_in_jpeg_do_not(tmp_path):
    Image.fromarray(numbers(255)).save(tmp_path / "a.jpg", quality=75)
    assert (read_mask(tmp_path / "a.jpg")[0][0] != DISC).mean() < 0.01
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")  # the noise of one in another
    assert (read_mask(tmp_path / "a.png")[0][0] != DISC).mean() < 0.01
    Image.fromarray(numbers(128, 255)).save(tmp_path / "b.jpg", quality=90)
    with pytest.raises(ImageError, match="areas of grey 128 in b.jpg"):
        read_mask(tmp_path / "b.jpg")


PALETTES = {  # colours of index 0 and 1 -> which pixels of `index = not DISC` are white
    "white first": ([255, 255, 255, 0, 0, 0], True),
    "black first": ([0, 0, 0, 255, 255, 255], False),
    "black and red": ([200, 0, 0, 0, 0, 0], True),
}


@pytest.mark.parametrize("kind", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("palette", PALETTES)
def test_a_palette_is_what_its_colours_show(palette, kind, tmp_path):
    colours, same = PALETTES[palette]
    picture = Image.fromarray((~DISC).astype(np.uint8))
    picture.putpalette(colours)
    picture.save(tmp_path / f"a{kind}")
    mask, _ = read_mask(tmp_path / f"a{kind}")
    assert np.array_equal(mask[0], DISC if same else ~DISC)


def test_a_palette_of_several_colours_is_no_mask(tmp_path):
    picture = Image.fromarray(numbers(1, 2))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="label channels: found 3 that differ"):
        read_mask(tmp_path / "a.png")


@pytest.fixture
def folder(tmp_path):
    def make(*masks: np.ndarray, labels=None):
        for name in ("images", "masks"):
            (tmp_path / name).mkdir()
        rng = np.random.default_rng(0)
        for n, mask in enumerate(masks):
            image = rng.integers(0, 255, (64, 80, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / f"images/p{n}.png")
            Image.fromarray(mask).save(tmp_path / f"masks/p{n}.png")
        if labels:
            (tmp_path / "labels.json").write_text(json.dumps(labels))
        return survey(open_reader("folder", tmp_path), workers=1)

    return make


def test_classes_in_different_files_are_seen_over_the_whole_set(folder):
    found = folder(numbers(1), numbers(1), numbers(2))
    (problem,) = found.problems
    assert (problem.case, problem.field, problem.found) == ("p2", "mask values", "2")
    assert "1 in 2 mask(s), 2 in 1 mask(s)" in problem.expected and "labels.json" in problem.mend


def test_whites_of_two_kinds_are_a_warning(folder):
    found = folder(numbers(1), numbers(255), numbers(255))
    assert not found.problems
    (warning,) = [w for w in found.warnings if w.field == "mask values"]
    assert warning.found == "1 in 1 mask(s), 255 in 2 mask(s)"


def test_declared_classes_keep_their_numbers(folder):
    found = folder(numbers(1, 2), numbers(2), labels={"background": 0, "a": 1, "b": 2})
    assert not found.problems and [set(f.voxels) for f in found.facts] == [{0, 1, 2}, {0, 2}]
