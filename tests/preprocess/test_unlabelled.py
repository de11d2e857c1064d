"""Any layout without its labels."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.base import open_store

BARE = {"unlabelled": "yes"}


@pytest.mark.parametrize("layout", sorted(PHANTOMS))
def test_images_alone_are_read_from_every_layout(layout, tmp_path):
    PHANTOMS[layout](tmp_path)
    whole = open_reader(layout, tmp_path)
    expected = {ref.id: whole.image(ref)[0] for ref in whole.refs()[:2]}
    images = {path for ref in whole.refs() for path in ref.images}
    for ref in whole.refs():
        for path in ref.labels:
            if path not in images:
                path.unlink(missing_ok=True)
    bare = open_reader(layout, tmp_path, **BARE)
    refs = {ref.id: ref for ref in bare.refs()}
    assert len(refs) >= len(whole.refs()) > 0
    assert bare.dataset().labels == {"background": 0} and not bare.dataset().regions
    for case, image in expected.items():
        read = bare.read(refs[case])
        assert np.array_equal(read.image_CZYX, image) and not read.label_ZYX.any()


def test_a_store_of_images_alone_is_made_compared_and_has_ct_statistics(tmp_path):
    PHANTOMS["lits"](tmp_path / "raw", cases=3)
    whole = open_reader("lits", tmp_path / "raw")
    for ref in whole.refs():
        ref.labels[0].unlink()
    found = build(BuildRequest("lits", tmp_path / "raw", tmp_path / "s", workers=1, options=BARE))
    assert len(found.cases) == 3 and not any(case.foreground for case in found.cases)
    assert found.fingerprint["intensity"][0]["std"] > 0
    image, label = open_store(tmp_path / "s").stored(found.cases[0])
    assert np.isfinite(image).all() and image.std() > 0 and not label.any()
    assert (
        build(BuildRequest("lits", tmp_path / "raw", tmp_path / "s", workers=1, options=BARE))
        == found
    )
    with pytest.raises(InputError, match="made from something else"):
        PHANTOMS["lits"](tmp_path / "other", cases=4)
        build(BuildRequest("lits", tmp_path / "other", tmp_path / "s", workers=1, options=BARE))


def test_a_folder_needs_no_masks_and_a_mask_alone_is_no_case(tmp_path):
    PHANTOMS["folder"](tmp_path)
    refs = open_reader("folder", tmp_path).refs()
    refs[0].images[0].unlink()
    assert len(open_reader("folder", tmp_path, **BARE).refs()) == len(refs) - 1
    shutil.rmtree(refs[1].labels[0].parent)
    found = survey(open_reader("folder", tmp_path, **BARE), workers=1)
    assert not found.problems and len(found.facts) == len(refs) - 1


def test_patients_are_known_without_labels_too(tmp_path):
    PHANTOMS["acdc"](tmp_path)
    whole, bare = open_reader("acdc", tmp_path), open_reader("acdc", tmp_path, **BARE)
    groups = {ref.id: ref.group for ref in bare.refs()}
    assert all(groups[ref.id] == ref.group for ref in whole.refs())
    assert bare.grouping.rule == whole.grouping.rule
