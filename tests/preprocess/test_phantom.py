"""Synthetic sets: the same bytes every time, and something to learn in them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from segfleet.core.errors import InputError
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.phantoms.phantom import PHANTOMS, write_msd_phantom
from segfleet.preprocess.readers.base import open_reader


def digest(root) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", sorted(PHANTOMS))
def test_a_phantom_is_reproducible_and_sound(name, tmp_path):
    first, second, other = (
        PHANTOMS[name](tmp_path / part, seed=seed) for part, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert digest(first) == digest(second) != digest(other)
    reader = open_reader(name, first)
    found = survey(reader, workers=1)
    assert not found.problems and all(warning.case == "splits" for warning in found.warnings)
    full = [
        {*facts.voxels}
        for ref, facts in zip(found.refs, found.facts, strict=True)
        if not reader.may_be_empty(ref)
    ]
    assert {
        value for values in full or [set(found.dataset.labels.values())] for value in values
    } >= set(found.dataset.labels.values())
    assert all(len(values) > 1 for values in full), "every mask has foreground"


def test_labels_are_brighter_and_scales_differ(tmp_path):
    reader = open_reader("msd", write_msd_phantom(tmp_path / "a", cases=6))
    scales = []
    for ref in reader.refs():
        case = reader.read(ref)
        image, label = case.image_CZYX[0], case.label_ZYX
        means = [image[(label == value) & (image > 0)].mean() for value in (0, 1, 2)]
        assert means[0] < means[1] < means[2]
        scales.append(means[0])
        assert not image[0].any() and not image[:, 0].any()
    assert max(scales) / min(scales) > 20


def test_a_phantom_never_mixes_with_what_is_there(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is not an empty folder"):
        write_msd_phantom(tmp_path)
    assert np.array_equal([p.name for p in tmp_path.iterdir()], ["mine"])
