"""Where the files know no spacing, distances are pixels and volumes are areas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from segfleet.pipeline.reports.score_tables import COLUMNS, in_unit, times
from segfleet.pipeline.scoring.summary import definitions, unit_of


def manifest(dims, *cases):
    columns = dict(zip(("affine", "raw_spacing"), zip(*cases, strict=True), strict=True))
    table = SimpleNamespace(grids=lambda name: iter(columns[name]))
    return SimpleNamespace(dataset=SimpleNamespace(dims=dims), cases=table)


@pytest.mark.parametrize(
    ("dims", "cases", "unit"),
    [
        (2, [(None, (1.0, 1.0, 1.0))], "pixels"),
        (3, [(None, (1.0, 1.0, 1.0))], "voxels"),
        (3, [(None, (2.5, 1.0, 1.0))], "mm"),  # a TIFF with its spacing beside it
        (3, [(((1.0, 0, 0, 0),) * 4, (1.0, 1.0, 1.0))], "mm"),
        (2, [(None, (1.0, 1.0, 1.0)), (None, (1.0, 0.5, 0.5))], "mm"),
    ],
)
def test_the_unit_is_what_the_files_know(dims, cases, unit):
    assert unit_of(manifest(dims, *cases)) == unit


def test_a_report_says_pixels_and_counts_them():
    headings = [heading for _, heading, *_ in in_unit(COLUMNS, "pixels")]
    assert "HD95 (pixels)" in headings and "Area error (pixels)" in headings
    assert not any(word in " ".join(headings) for word in ("mm", "ml", "Volume"))
    ((_, _, digits, _, factor),) = [
        column for column in in_unit(COLUMNS, "pixels") if column[0] == "volume_error_ml"
    ]
    # 120 voxels of 1 mm are 0.12 ml
    assert (times(0.12, factor), times([-0.001, 0.002], factor), digits) == (120, [-1, 2], 0)
    text = " ".join(definitions("pixels").values())
    assert "95th percentile in pixels" in text and "millilitres" not in text
    assert "HD95 (mm)" in [heading for _, heading, *_ in in_unit(COLUMNS, "mm")]
