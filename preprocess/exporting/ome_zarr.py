"""A case of a store as OME-Zarr (NGFF 0.5), which napari and other viewers open.

Source: https://ngff.openmicroscopy.org/0.5/. The image is what a network sees, normalised and
resampled; its place is that of the raw grid in mm, without the file's rotation, of which version
0.5 knows nothing.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.making import making
from segfleet.preprocess.files.names import colour
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import CaseEntry
from segfleet.preprocess.transforms.case_transforms import along

VERSION = "0.5"
SMALL = 256  # voxels of the longest edge, below which there are no coarser levels
CHUNK = 64
NAME = "segmentation"


def write_ome_zarr(store: ShardStore, case_id: str, out: Path) -> Path:
    """Write image and label of a case to the new folder `out`. Raises InputError for a case that is
    not in the store, or if `out` exists."""
    import zarr

    case = store.manifest.case(case_id)
    dataset = store.manifest.dataset
    with making(Path(out)) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = zarr.open_group(folder, mode="w", zarr_format=3)
        levels = _write(root, store.image(case), case, store, True)
        channels = [
            {"label": name, "active": True, **_window(array)}
            for name, array in zip(dataset.channels, store.image(case), strict=True)
        ]
        root.attrs["ome"] = {
            "version": VERSION,
            "multiscales": [_multiscale(case.id, levels, True)],
            "omero": {"channels": channels},
        }
        labels = root.create_group("labels")
        labels.attrs["ome"] = {"version": VERSION, "labels": [NAME]}
        own = labels.create_group(NAME)
        levels = _write(own, store.label(case), case, store, False)
        own.attrs["ome"] = {
            "version": VERSION,
            "multiscales": [_multiscale(NAME, levels, False)],
            "image-label": {
                "colors": [
                    {"label-value": value, "rgba": list(colour(value))}
                    for value in dataset.labels.values()
                    if value
                ],
                "properties": [
                    {"label-value": value, "name": name}
                    for name, value in dataset.labels.items()
                    if value
                ],
                "source": {"image": "../../"},
            },
        }
    return Path(out)


def _write(
    group: Any, array: np.ndarray, case: CaseEntry, store: ShardStore, channels: bool
) -> list[tuple[str, list[float], list[float]]]:
    """The array and coarser ones, each half of the one before in plane: (name, scale, translation)
    per level."""
    plan, level, written = store.manifest.plan, 0, []
    raw = along(case.raw_spacing, plan.transpose)
    start = [
        crop[0] * step for crop, step in zip(along(case.crop, plan.transpose), raw, strict=True)
    ]
    step = list(case.spacing)
    names = ("c", "z", "y", "x")[0 if channels else 1 :]
    while True:
        shape = array.shape
        stored = group.create_array(
            str(level),
            shape=shape,
            chunks=tuple(
                1 if name == "c" else min(size, CHUNK)
                for name, size in zip(names, shape, strict=True)
            ),
            dtype=array.dtype,
            dimension_names=names,
        )
        stored[...] = array
        # where the centre of the first voxel lies
        centre = [s + (n - r) / 2 for s, n, r in zip(start, step, raw, strict=True)]
        written.append((str(level), list(step), centre))
        if max(shape[-2:]) <= SMALL:
            return written
        array = _halved(array, channels)
        step = [step[0], step[1] * 2, step[2] * 2]
        level += 1


def _halved(array: np.ndarray, mean: bool) -> np.ndarray:
    """Half as many rows and columns: means of an image, every second voxel of a label."""
    y, x = (size - size % 2 for size in array.shape[-2:])
    array = array[..., :y, :x]
    if not mean:
        return array[..., ::2, ::2]
    blocks = array.reshape(*array.shape[:-2], y // 2, 2, x // 2, 2)
    return blocks.mean((-3, -1), dtype=np.float32).astype(array.dtype)


def _multiscale(
    name: str, levels: list[tuple[str, list[float], list[float]]], channels: bool
) -> dict[str, Any]:
    lead = [1.0] if channels else []
    return {
        "name": name,
        "axes": ([{"name": "c", "type": "channel"}] if channels else [])
        + [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": [
            {
                "path": path,
                "coordinateTransformations": [
                    {"type": "scale", "scale": lead + [float(s) for s in step]},
                    {
                        "type": "translation",
                        "translation": [0.0] * len(lead) + [float(s) for s in centre],
                    },
                ],
            }
            for path, step, centre in levels
        ],
    }


def _window(array: np.ndarray) -> dict[str, Any]:
    values = array.astype(np.float32)
    low, high = (float(v) for v in np.percentile(values, [0.5, 99.5]))
    ends = {"min": float(values.min()), "max": float(values.max())}
    return {"color": "FFFFFF", "window": {**ends, "start": low, "end": high}}
