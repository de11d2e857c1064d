"""The label of a case of a store as DICOM SEG on the series it was read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.preprocess.files.dicom import is_dicom, read_series
from segfleet.preprocess.files.dicom_seg import write_seg
from segfleet.preprocess.readers.base import visible
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.transforms.case_transforms import changes_grid

APART = 1e-2  # mm that the corners of a series may lie off the case's


def export_seg(store: ShardStore, case_id: str, series: Path, out: Path) -> Path:
    """Write the original label of a case, on its raw grid, as the new file `out`. Raises InputError
    for a case without a label of its own, a series that is not the case's, and what `write_seg`
    refuses."""
    case, dataset = store.manifest.case(case_id), store.manifest.dataset
    if out.suffix.lower() != ".dcm" or out.exists():
        raise InputError(f"export dicom-seg: --to: found {out}, expected a new file, NAME.dcm")
    if dataset.regions or not any(dataset.labels.values()):
        what = "regions, which may overlap" if dataset.regions else "images alone"
        raise InputError(f"export dicom-seg: {dataset.name} has {what}, expected labels")
    if not series.is_dir():
        raise InputError(f"export dicom-seg: found no folder {series}, expected the DICOM series")
    files = [path for path in visible(series) if is_dicom(path)]
    if not files:
        raise InputError(f"export dicom-seg: {series} holds no DICOM file")
    geometry = read_series(files)[1]
    if tuple(geometry.shape) != tuple(case.raw_shape) or _far(geometry.affine, case):
        raise InputError(
            f"export dicom-seg: the series in {series} ({_text(geometry.shape)}) is not that of "
            f"case {case.id} ({_text(case.raw_shape)}), or lies elsewhere"
        )
    if case.has_truth:
        label = store.truth(case)
    elif changes_grid(case.raw_shape, case.crop, case.shape):
        label = store.truth(case)  # which says that there is none
    else:
        label = store.label(case)
    write_seg(out, np.asarray(label), files, dataset.labels)
    return out


def _far(affine, case) -> bool:
    if affine is None or case.affine is None:
        return False
    corners = np.array([[i * (n - 1) for i, n in zip(ends, case.raw_shape[::-1], strict=True)] + [1]
                        for ends in np.ndindex(2, 2, 2)], float)  # fmt: skip
    apart = corners @ (np.asarray(affine) - np.asarray(case.affine)).T
    return bool(np.abs(apart).max() > APART)


def _text(shape) -> str:
    return "x".join(map(str, shape))
