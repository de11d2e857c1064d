"""Cost grows as the work grows: operations are counted at two sizes, from the listing of raw files
to the first batch and an epoch of draws. Four times the cases may cost 4.4 times as much, no
more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from segfleet.pipeline.data import loader
from segfleet.pipeline.data.sampler import PatchSampler
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking import duplicates
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.verify import verify

MOST = 4.4
EDGE = 16


@contextmanager
def counted(into: dict[str, int], step: str):
    """Lines of Python, turns of loops among them, and calls of compiled functions, in this
    thread. Elements that a compiled function walks over are not seen."""
    count = 0

    def line(frame, event, argument):
        nonlocal count
        count += 1
        return line

    def call(frame, event, argument):
        nonlocal count
        count += event == "c_call"

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        yield
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
        into[step] = count


def write_pictures(root, count: int) -> None:
    """Noise and a mask, one in ten a copy of another; five of a patient."""
    draw = np.random.default_rng(3)
    rows = ["case,patient"]
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for index in range(count):
        pixels = draw.integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)
        if index % 10 == 9:
            pixels = np.asarray(Image.open(root / "images" / f"c{index - 1}.png"))
        mask = np.zeros((EDGE, EDGE), np.uint8)
        mask[2 : 4 + index % 8, 3:9] = 255
        Image.fromarray(pixels).save(root / "images" / f"c{index}.png", compress_level=0)
        Image.fromarray(mask).save(root / "masks" / f"c{index}.png", compress_level=0)
        rows.append(f"c{index},p{index // 5}")
    (root / "patients.csv").write_text("\n".join(rows))


def operations(root, count: int) -> dict[str, int]:
    """Of every step over `count` pictures, each in this process."""
    raw, out, found = root / "raw", root / "out", {}
    write_pictures(raw, count)
    with counted(found, "list"):
        reader = open_reader("folder", raw)
        reader.refs(), reader.dataset(), reader.problems(), reader.splits()
    with counted(found, "check"):
        survey(reader, workers=1)
    with counted(found, "preprocess"):
        build(BuildRequest("folder", raw, out, workers=1))
    with counted(found, "compare"):
        build(BuildRequest("folder", raw, out, workers=1))
    with counted(found, "verify"):
        assert not verify(out, chunks=True)
    with counted(found, "first batch"):
        store = open_store(out)
        manifest = store.manifest
        cases = manifest.cases.among(set(manifest.fold("kfold", 0)["train"]))
        sampler = PatchSampler(cases=cases, patch=(1, 8, 8), batch=8, foreground=0.5, seed=1)
        patches = loader.Patches(store, sampler, 0, len(cases) // 8, None, False)
        next(loader.batches(patches, loader.Schedule(0, 1, 9, 8, 1, 0, 1), 0))
    with counted(found, "epoch of draws"):
        for index in range(len(cases) // 8 * 8):
            sampler.draw(0, 0, index, len(cases) // 8)
    with counted(found, "all cases by id"):
        assert all(manifest.case(name) for name in manifest.fold("kfold", 0)["val"])
    return found


def compare(sizes: tuple[int, int], measure: Callable[[int], dict[str, int]]) -> None:
    small, large = map(measure, sizes)
    ratios = {step: large[step] / small[step] for step in small}
    assert max(ratios.values()) <= MOST * sizes[1] / sizes[0] / 4, ratios


def test_every_step_grows_as_the_cases_do(tmp_path):
    compare((150, 600), lambda count: operations(tmp_path / str(count), count))


@pytest.mark.long
def test_every_step_grows_as_the_cases_do_at_8000(tmp_path):
    compare((2000, 8000), lambda count: operations(tmp_path / str(count), count))


@pytest.mark.parametrize("layout", ["folder", "glas", "kvasir_seg", "busi", "isic2018", "ph2"])
def test_listing_grows_as_the_files_do(layout, tmp_path):
    def listing(count: int) -> dict[str, int]:
        raw, found = PHANTOMS[layout](tmp_path / str(count), cases=count), {}
        with counted(found, layout):
            reader = open_reader(layout, raw)
            reader.refs(), reader.dataset(), reader.problems(), reader.splits()
        return found

    compare((48, 192), listing)


@pytest.mark.parametrize("kind", ["noise", "alike", "flat"])
def test_pictures_are_compared_with_a_few_others(kind):
    """Counted: pairs that are looked at, of which 2,000 have 2 million."""
    draw = np.random.default_rng(0)
    grey = draw.uniform(60, 190, (2000, 256))
    if kind == "alike":  # frames of fifty films
        grey = grey[np.arange(2000) % 50] + draw.normal(0, 20, (2000, 256))
    if kind == "flat":
        grey = 100 + draw.normal(0, 2, (2000, 256))
    own = (grey - grey.mean(axis=1, keepdims=True)).astype(np.float32)
    pairs = sum(len(others) for _, others in duplicates._close(own, (own**2).mean(axis=1)))
    assert pairs < 50_000, pairs


def test_a_picture_is_opened_to_be_listed_weighed_checked_and_written(tmp_path, monkeypatch):
    raw, opened, real = tmp_path / "raw", [], Image.open
    write_pictures(raw, 5)
    monkeypatch.setattr(Image, "open", lambda source: opened.append(source) or real(source))
    build(BuildRequest("folder", raw, tmp_path / "out", workers=1))
    assert len(opened) == 5 * (1 + 1 + 2 + 2)  # twice the image's header; then image and mask
