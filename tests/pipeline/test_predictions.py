"""Any folder of predictions is scored as a run is; what cannot be scored is said case by case."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from segfleet.core.errors import DataError, InputError
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.reports.score_tables import cases_csv
from segfleet.pipeline.scoring.predictions import parse_labels, score_predictions, write_scores
from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.preprocess.files.dicom_seg import write_seg
from segfleet.preprocess.files.images import read_label
from segfleet.preprocess.files.writer import write_segments
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader

AFFINE = np.diag([0.5, 0.5, 2.0, 1.0])


def save(path, label_ZYX, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label_ZYX.transpose(2, 1, 0).astype(np.uint8), affine), path)


@pytest.fixture
def folders(tmp_path):
    """Six cases of two structures; predictions one row short."""
    for index in range(6):
        truth = np.zeros((4, 12, 12), np.uint8)
        truth[1:3, 2:6, 2:6], truth[1:3, 7:11, 2:6] = 1, 2
        prediction = truth.copy()
        prediction[:, 2] = 0
        save(tmp_path / "truth" / f"p{index}.nii.gz", truth)
        save(tmp_path / "found" / f"p{index}.nii.gz", prediction)
    (tmp_path / "found" / "labels.json").write_text('{"background": 0, "liver": 1, "spleen": 2}')
    return tmp_path / "found", tmp_path / "truth"


def test_scores_by_hand_and_the_same_report(folders, tmp_path):
    document = score_predictions(*folders, workers=1)
    scores = document["cases"][0]["scores"]
    assert scores["liver"]["dice"] == pytest.approx(2 * 24 / (32 + 24))
    assert scores["spleen"]["dice"] == 1.0 and scores["liver"]["truth_ml"] == 32 * 0.5 / 1000
    assert document["unit"] == "mm" and document["summary"]["patients"] == 6
    out = write_scores(tmp_path / "scores", document)
    assert evaluation_of(out)["summary"] == document["summary"]
    page = write_report(out).read_text()
    assert "liver" in page and "Learning curves" not in page
    lines = cases_csv(document).splitlines()
    assert len(lines) == 1 + 12 and lines[0].startswith("case,patient,fold,structure,dice")


def test_another_grid_shows_both_geometries(folders):
    predictions, truth = folders
    label = np.zeros((4, 12, 12), np.uint8)
    turned = AFFINE.copy()
    turned[0, 3] = 7.5
    save(predictions / "p1.nii.gz", label, turned)
    save(predictions / "p4.nii.gz", np.zeros((4, 12, 10), np.uint8))
    with pytest.raises(DataError) as caught:
        score_predictions(predictions, truth, workers=1)
    shifted, smaller = caught.value.problems
    assert (
        shifted.case == "p1" and "7.5" in shifted.found and "origin (0, 0, 0)" in shifted.expected
    )
    assert "4 x 12 x 10" in smaller.found and "4 x 12 x 12" in smaller.expected


def test_missing_predictions_are_refused_or_left_out(folders):
    predictions, truth = folders
    (predictions / "p5.nii.gz").unlink()
    with pytest.raises(InputError, match="1 of 6 cases .* have no prediction .*p5.*--partial"):
        score_predictions(predictions, truth, workers=1)
    document = score_predictions(predictions, truth, partial=True, workers=1)
    assert document["without_prediction"] == ["p5"] and len(document["cases"]) == 5
    assert document["without_truth"] == []
    (truth / "p3.nii.gz").unlink()
    document = score_predictions(predictions, truth, partial=True, workers=1)
    assert document["without_truth"] == ["p3"] and len(document["cases"]) == 4
    for path in predictions.glob("*.nii.gz"):
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(InputError, match="no file of .* has the name of one in"):
        score_predictions(predictions, truth, workers=1)


def test_labels_are_declared_or_refused(folders):
    predictions, truth = folders
    (predictions / "labels.json").write_text('{"background": 0, "liver": 1}')
    with pytest.raises(DataError, match="label values: found 2 in p0.nii.gz, expected one of 0, 1"):
        score_predictions(predictions, truth, workers=1)
    whole = {"labels": {"background": 0, "organs": [1, 2], "spleen": [2]}}
    whole["regions_class_order"] = [1, 2]
    (truth / "dataset.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="the labels differ: .*organs.* beside the truth"):
        score_predictions(predictions, truth, workers=1)
    (predictions / "labels.json").unlink()
    found = score_predictions(predictions, truth, workers=1)
    assert found["cases"][0]["scores"]["organs"]["truth_voxels"] == 64
    said = score_predictions(predictions, truth, labels=parse_labels("a=1,b=2"), workers=1)
    assert said["structures"] == ["a", "b"]
    for wrong in ("a", "a=x", "a=1,b=1", "a=1,a=2", "a=0"):
        with pytest.raises(InputError, match="labels: found"):
            parse_labels(wrong)


def test_black_and_white_pictures_need_no_labels(tmp_path):
    mask = np.zeros((10, 10), np.uint8)
    mask[2:6, 2:6] = 255
    for folder, rows in (("truth", mask), ("found", np.roll(mask, 1, 0))):
        (tmp_path / folder).mkdir()
        Image.fromarray(rows).save(tmp_path / folder / "a.png")
    document = score_predictions(tmp_path / "found", tmp_path / "truth", workers=1)
    assert document["unit"] == "pixels" and document["structures"] == ["foreground"]
    assert document["cases"][0]["scores"]["foreground"]["dice"] == pytest.approx(0.75)


def test_arrays_are_labels(tmp_path):
    """As `predict` and the layout npy write them."""
    for folder, shift in (("truth", 0), ("found", 1)):
        mask = np.zeros((10, 10), np.uint8)
        mask[2 + shift : 6 + shift, 2:6] = 255
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", mask)
    document = score_predictions(tmp_path / "found", tmp_path / "truth", workers=1)
    assert document["cases"][0]["scores"]["foreground"]["dice"] == pytest.approx(0.75)


def test_segments_are_laid_onto_the_truth(tmp_path):
    """3D Slicer cuts a segmentation to where something is; DICOM SEG is turned, too."""
    raw = PHANTOMS["dicom"](tmp_path / "raw", cases=2)
    reader = open_reader("dicom", raw)
    for folder in ("truth", "slicer", "seg"):
        (tmp_path / folder).mkdir()
    labels = reader.dataset().labels
    for ref in reader.refs():
        path = ref.labels[0]
        (tmp_path / "truth" / path.name).write_bytes(path.read_bytes())
        label, grid = read_label(path)
        assert label[0].max() == 0 and label.any(), "there is something to cut away"
        moved = np.array(grid.affine)
        moved[:3, 3] += moved[:3, 2]
        cut = replace(grid, shape=(len(label) - 1, *label.shape[1:]), affine=moved.tolist())
        write_segments(tmp_path / "slicer" / f"{ref.id}.seg.nrrd", label[1:], cut, labels)
        onto = reader.read(ref).label_ZYX
        write_seg(tmp_path / "seg" / f"{ref.id}.dcm", onto, ref.images, labels)
    named = {name: value for name, value in labels.items() if value}
    for folder in ("slicer", "seg"):
        found = score_predictions(tmp_path / folder, tmp_path / "truth", labels=named, workers=1)
        assert {s["dice"] for c in found["cases"] for s in c["scores"].values()} <= {1.0, None}


def test_patients_of_a_table(folders):
    predictions, truth = folders
    lines = [f"p{index},{'one' if index < 3 else 'two'}" for index in range(6)]
    (truth / "patients.csv").write_text("case,patient\n" + "\n".join(lines) + "\n")
    assert score_predictions(predictions, truth, workers=1)["summary"]["patients"] == 2
