"""Raw folders of nnU-Net made of other layouts, and read back."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from segfleet.core.errors import InputError
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.exporting.nnunet import write_nnunet
from segfleet.preprocess.files.names import write_names
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader


@pytest.mark.parametrize("name", ["msd", "nnunet", "dicom", "busi", "folder", "acdc"])
def test_what_is_written_is_what_was_read(name, tmp_path):
    reader = open_reader(name, PHANTOMS[name](tmp_path / "raw", cases=4))
    assert write_nnunet(reader, tmp_path / "out") == len(reader.refs())
    again = open_reader("nnunet", tmp_path / "out")
    found = survey(again, workers=1)
    assert not found.problems, found.problems
    one, other = reader.dataset(), again.dataset()
    assert one.labels == other.labels and one.regions == other.regions
    assert one.ignore_label == other.ignore_label and one.channels == other.channels
    assert [ref.id for ref in again.refs()] == sorted(
        (ref.id for ref in reader.refs()), key=[r.id for r in again.refs()].index
    )
    mine = {ref.id: ref for ref in again.refs()}
    for ref in reader.refs():
        before, after = reader.read(ref), again.read(mine[ref.id])
        assert np.array_equal(before.image_CZYX, after.image_CZYX)
        assert np.array_equal(before.label_ZYX, after.label_ZYX)
        assert before.geometry.spacing == pytest.approx(after.geometry.spacing, rel=1e-5)
        if before.geometry.affine is not None:
            assert np.allclose(before.geometry.affine, after.geometry.affine, atol=1e-4)
    assert json.loads((tmp_path / "out/labels.json").read_text()) == one.labels


def test_version_1_is_read_back(tmp_path):
    reader = open_reader("msd", PHANTOMS["msd"](tmp_path / "raw", cases=3, size=(8, 16, 16)))
    write_nnunet(reader, tmp_path / "out", version=1)
    again = open_reader("nnunet", tmp_path / "out")
    assert (
        not survey(again, workers=1).problems and again.dataset().labels == reader.dataset().labels
    )
    with pytest.raises(InputError, match="version 1 knows no regions"):
        write_nnunet(open_reader("nnunet", PHANTOMS["nnunet"](tmp_path / "r")), tmp_path / "o", 1)


def test_names_of_labels_stand_beside_them(tmp_path):
    write_names(tmp_path, {"background": 0, "left ventricle": 2, "liver": 1})
    rows = (tmp_path / "labels.ctbl").read_text().splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [
        ["0", "background"], ["1", "liver"], ["2", "left_ventricle"],
    ]  # fmt: skip
    assert all(len(row.split()) == 6 for row in rows[1:]) and rows[1].endswith("0 0 0 0")
    lines = (
        (tmp_path / "labels.label").read_text().splitlines()
    )  # ITK-SNAP: "%d %d %d %d %g %d %d \"...\""
    form = re.compile(r'\s*(\d+) (\d+) (\d+) (\d+) ([\d.]+) ([01]) ([01]) "(.*)"')
    found = {int(m[1]): m[8] for line in lines if (m := form.fullmatch(line))}
    assert found.pop(0) == "Clear Label" and len(found) == len(rows) - 2
