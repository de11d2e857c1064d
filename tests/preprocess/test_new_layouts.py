"""Layouts that others write: MONAI datalists, BIDS derivatives, COCO and LabelMe."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.files.polygons import filled
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader, source_sha256


@pytest.fixture
def volumes(tmp_path):
    root = PHANTOMS["msd"](tmp_path / "msd", cases=6, size=(8, 16, 16))
    return open_reader("msd", root)


def pictures(folder, count=4):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(
            folder / f"p{n}.png"
        )


def test_a_datalist_of_monai(volumes, tmp_path):
    root = tmp_path / "monai"
    shutil.copytree(volumes.root, root)
    (root / "dataset.json").unlink()
    refs = volumes.refs()
    entries = [
        {
            "image": str(ref.images[0].relative_to(volumes.root)),
            "label": str(ref.labels[0].relative_to(volumes.root)),
            "fold": n % 3,
        }
        for n, ref in enumerate(refs)
    ]
    document = {"training": entries[:5], "validation": entries[5:], "testing": ["x.nii.gz"]}
    document |= {"labels": {"0": "background", "1": "a", "2": "b"}, "modality": {"0": "MRI"}}
    (root / "dataset_0.json").write_text(json.dumps(document))
    reader = open_reader("monai", root)
    found = survey(reader, workers=1)
    assert not found.problems and found.dataset.labels == {"background": 0, "a": 1, "b": 2}
    for ref, own in zip(reader.refs(), refs, strict=True):
        assert ref.id == own.id
        assert np.array_equal(reader.read(ref).label_ZYX, volumes.read(own).label_ZYX)
    splits = reader.splits()
    assert len(splits["folds"]) == 3 and splits["given"][0]["val"] == (refs[5].id,)
    del document["labels"]
    (root / "dataset_0.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match='names no labels. Add "labels"'):
        open_reader("monai", root).dataset()


def test_bids_with_derivatives(volumes, tmp_path):
    root = tmp_path / "bids"
    for n, ref in enumerate(volumes.refs()):
        subject, session = f"sub-{n // 2:02d}", f"ses-{n % 2}"
        raw = root / subject / session / "anat"
        done = root / "derivatives/manual" / subject / session / "anat"
        for folder in (raw, done):
            folder.mkdir(parents=True)
        name = f"{subject}_{session}"
        for suffix in ("T1w", "FLAIR"):
            shutil.copy(ref.images[0], raw / f"{name}_{suffix}.nii.gz")
        shutil.copy(ref.labels[0], done / f"{name}_space-T1w_desc-manual_dseg.nii.gz")
    (root / "derivatives/manual/desc-manual_dseg.tsv").write_text("index\tname\n1\ta\n2\tb\n")
    (root / "dataset_description.json").write_text("{}")
    reader = open_reader("bids", root)
    found = survey(reader, workers=1)
    assert not found.problems, found.problems
    assert found.dataset.channels == ("FLAIR", "T1w")
    assert found.dataset.labels == {"background": 0, "a": 1, "b": 2}
    assert [ref.id for ref in reader.refs()][:2] == ["sub-00_ses-0", "sub-00_ses-1"]
    assert {ref.group for ref in reader.refs()} == {"sub-00", "sub-01", "sub-02"}
    (root / "sub-01/ses-0/anat/sub-01_ses-0_FLAIR.nii.gz").unlink()
    assert open_reader("bids", root).channels == ("T1w",)


SQUARE = [(5, 6), (15, 6), (15, 20), (5, 20)]
TRIANGLE = [(20.0, 5.0), (45.5, 10.25), (30.0, 35.75)]


def centres_inside(outline, shape) -> np.ndarray:
    """By matplotlib-free ray casting over pixel centres, one by one."""
    inside = np.zeros(shape, bool)
    for y in range(shape[0]):
        for x in range(shape[1]):
            px, py, odd = x + 0.5, y + 0.5, False
            for (ax, ay), (bx, by) in zip(outline, [*outline[1:], outline[0]], strict=True):
                if (ay > py) != (by > py) and px < ax + (py - ay) * (bx - ax) / (by - ay):
                    odd = not odd
            inside[y, x] = odd
    return inside


def drawn(outlines, shape) -> np.ndarray:
    picture = np.zeros(shape, np.uint8)
    filled([np.array(outline) for outline in outlines], shape).paint(picture, 1)
    return picture


BEYOND = [(-9, -9), (70, 10), (10, 60)]


@pytest.mark.parametrize("outline", [SQUARE, TRIANGLE, BEYOND, [(60, 3), (70, 3), (65, 9)]])
def test_a_pixel_is_inside_if_its_centre_is(outline):
    expected = centres_inside(outline, (40, 50))
    assert np.array_equal(drawn([outline], (40, 50)), expected)
    hole = [(20.5, 8.5), (30.5, 9.5), (24.5, 15.5)]
    expected = expected ^ centres_inside(hole, (40, 50))
    assert np.array_equal(drawn([outline, hole], (40, 50)), expected)


def test_an_outline_takes_the_memory_of_its_box():
    area = filled([np.array(SQUARE) + 90_000], (100_000, 100_000))
    assert area.size == 140 and area.inside.size < 300
    assert filled([], (4, 5)).size == filled([[]], (4, 5)).size == 0
    for wrong in ([[0, 0], [np.nan, 3]], [[0, 0], [1e300, 3]], [1, 2, 3]):
        with pytest.raises(ValueError):
            filled([wrong], (40, 50))


def test_labelme(tmp_path):
    pictures(tmp_path / "raw")
    for n in range(4):
        shapes = [
            {"label": "cell", "points": TRIANGLE, "shape_type": "polygon"},
            {"label": "core", "points": [[5, 6], [15, 20]], "shape_type": "rectangle"},
        ]
        document = {"version": "5", "imagePath": f"p{n}.png", "shapes": shapes[: n % 3]}
        (tmp_path / f"raw/p{n}.json").write_text(json.dumps(document))
    reader = open_reader("labelme", tmp_path / "raw")
    found = survey(reader, workers=1)
    assert not found.problems and found.dataset.labels == {"background": 0, "cell": 1, "core": 2}
    label = reader.label(reader.refs()[2])[0][0]
    assert np.array_equal(label == 2, centres_inside(SQUARE, (40, 50)))
    assert np.array_equal(label == 1, centres_inside(TRIANGLE, (40, 50)) & (label != 2))
    for kind, points in (("circle", [[3, 4]]), ("rectangle", []), ("polygon", [[1e300, 2]])):
        wrong = [{"label": "cell", "points": points, "shape_type": kind}]
        (tmp_path / "raw/p1.json").write_text(json.dumps({"shapes": wrong}))
        (problem,) = survey(open_reader("labelme", tmp_path / "raw"), workers=1).problems
        assert problem.case == "p1" and f"points of a {kind}" in problem.found
    shapes[0]["shape_type"] = "line"
    (tmp_path / "raw/p1.json").write_text(json.dumps({"shapes": shapes}))
    (problem,) = survey(open_reader("labelme", tmp_path / "raw"), workers=1).problems
    assert problem.field == "shape" and problem.case == "p1"
    manifest_root = tmp_path / "store"
    (tmp_path / "raw/p1.json").write_text(json.dumps({"shapes": shapes[1:]}))
    assert (
        len(build(BuildRequest("labelme", tmp_path / "raw", manifest_root, workers=1)).cases) == 4
    )


def test_coco(tmp_path):
    root = tmp_path / "raw"
    pictures(root / "images")
    images = [{"id": 10 + n, "file_name": f"p{n}.png", "height": 40, "width": 50} for n in range(4)]
    flat = [float(v) for point in SQUARE for v in point]
    mask = Image.new("1", (50, 40))
    ImageDraw.Draw(mask).rectangle((30, 30, 35, 38), fill=1)
    column = np.asarray(mask).ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *edges, len(column)]).tolist()
    annotations = [
        {"id": 1, "image_id": 10, "category_id": 7, "segmentation": [flat]},
        {
            "id": 2,
            "image_id": 11,
            "category_id": 3,
            "segmentation": {"counts": runs, "size": [40, 50]},
        },
        {"id": 3, "image_id": 12, "category_id": 3, "segmentation": [[0, 0, 50, 0, 50, 40, 0, 40]]},
        {"id": 4, "image_id": 12, "category_id": 7, "segmentation": [flat]},
    ]
    categories = [{"id": 7, "name": "gland"}, {"id": 3, "name": "tissue"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(document))
    reader = open_reader("coco", root)
    found = survey(reader, workers=1)
    assert not found.problems and found.dataset.labels == {"background": 0, "tissue": 1, "gland": 2}
    labels = [reader.label(ref)[0][0] for ref in reader.refs()]
    assert np.array_equal(labels[0], 2 * centres_inside(SQUARE, (40, 50)))
    assert np.array_equal(labels[1], np.asarray(mask))
    assert np.array_equal(labels[2], 1 + centres_inside(SQUARE, (40, 50))), "the smaller on top"
    assert not labels[3].any()
    ref = reader.refs()[0]
    assert reader.read(ref).extra["source_sha256"] == source_sha256(ref)
    before = {r.id: source_sha256(r) for r in reader.refs()}
    annotations[0]["segmentation"] = [flat[2:]]
    (root / "annotations.json").write_text(json.dumps(document))
    after = {r.id: source_sha256(r) for r in open_reader("coco", root).refs()}
    assert [case for case in before if before[case] != after[case]] == ["p0"]
    for wrong in ([[0, 0, float("nan"), 3]], {"counts": "packed", "size": [40, 50]}, 7):
        annotations[0]["segmentation"] = wrong
        (root / "annotations.json").write_text(json.dumps(document))
        (problem,) = survey(open_reader("coco", root), workers=1).problems
        assert problem.case == "p0" and problem.field == "segmentation"
    annotations[0]["segmentation"] = [flat]
    images[0]["file_name"] = "../../p0.png"
    (root / "annotations.json").write_text(json.dumps(document))
    problems = survey(open_reader("coco", root), workers=1).problems
    assert "file_name" in {problem.field for problem in problems}


def test_a_coco_file_of_many_small_things_in_a_large_picture(tmp_path):
    """Each takes the memory of its own box, not that of the picture."""
    root = tmp_path / "raw"
    root.mkdir()
    Image.fromarray(np.zeros((2000, 2000), np.uint8)).save(root / "p.png")
    places = [(x, y) for x in range(0, 1900, 100) for y in range(0, 1900, 100)]
    outlines = [[x, y, x + 9, y, x + 9, y + 9, x, y + 9] for x, y in places]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "segmentation": [outline]}
        for n, outline in enumerate(outlines)
    ]
    document = {
        "images": [{"id": 1, "file_name": "p.png"}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (root / "annotations.json").write_text(json.dumps(document))
    reader = open_reader("coco", root)
    (ref,) = reader.refs()
    tracemalloc.start()
    label, _ = reader.label(ref)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert int(label.sum()) == 81 * len(places)
    assert peak < 3 * label.nbytes


@pytest.mark.parametrize("change", [{"labels": {"0": "background", "1": "a", "2": "a"}},
                                    {"training": 5}, {"modality": {"x": "MRI"}}])  # fmt: skip
def test_a_datalist_that_cannot_be_meant_is_one_sentence(change, volumes, tmp_path):
    refs = volumes.refs()
    listed = [{"image": str(r.images[0]), "label": str(r.labels[0])} for r in refs]
    document = {"training": listed, "labels": {"0": "background", "1": "a"}, **change}
    (tmp_path / "list").mkdir()
    (tmp_path / "list/data.json").write_text(json.dumps(document))
    with pytest.raises(InputError):
        reader = open_reader("monai", tmp_path / "list")
        reader.dataset(), reader.refs()
