"""REC-UNet's 2.5D recipe: volumes of CT to slices of three neighbours, in the folders the layout
`npy` reads.

Source: specification `rec_unet`, sections 4 and 8. Better than the original in three ways: every
annotated slice is kept (the first and last slice of a volume repeat themselves), the file name
holds the volume's own id, and values are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.making import making
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.readers.base import RawReader

WINDOW = (-200.0, 200.0)  # HU


def write_slices(
    reader: RawReader,
    out: Path,
    window: tuple[float, float] = WINDOW,
    crop: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> int:
    """Check all cases, then write OUT/train_image and OUT/train_label; the number of slices. One
    volume is in memory when writing.

    Kept are the slices from the first to the last with any label, clipped to `window` and scaled to
    [-1, 1]; rows and columns are turned so that they lead the same way in every volume, and cropped
    to the middle `crop` ones. Raises DataError with every problem of the data, InputError for data
    that are no CT-like volumes of one channel, and if `out` is taken.
    """
    dataset, out = reader.dataset(), Path(out)
    low, high = window
    if dataset.dims != 3 or len(dataset.channels) != 1:
        raise InputError(
            f"slices: {dataset.name} is {dataset.dims}D with {len(dataset.channels)} channel(s), "
            "expected 3D with one"
        )
    if not low < high:
        raise InputError(f"window: found {low:g} to {high:g}, expected a lower and a higher value")
    if out.exists():
        raise InputError(f"to: {out} exists. Choose a new folder for the slices.")
    report = progress or (lambda done, total: None)
    with making(out) as partial:
        survey(
            reader, workers=workers, progress=lambda done, total: report(done, 2 * total)
        ).raise_problems()
        written, refs = 0, reader.refs()
        for kind in ("image", "label"):
            (partial / f"train_{kind}").mkdir(parents=True)
        for index, ref in enumerate(refs):
            case = reader.read(ref)
            image, label = (
                turned(case.image_CZYX[0], case.geometry.affine),
                turned(case.label_ZYX, case.geometry.affine),
            )
            if crop is not None:
                image, label = (_middle(array, crop, ref.id) for array in (image, label))
            for z, triple, mask in stacks(image, label, low, high):
                name = f"{ref.id}_{z:04d}.npy"
                np.save(partial / "train_image" / name, triple)
                np.save(partial / "train_label" / name, mask)
                written += 1
            report(len(refs) + index + 1, 2 * len(refs))
        if not written:
            raise InputError(f"slices: no case of {reader.root} has a label")
    return written


def stacks(image_ZYX: np.ndarray, label_ZYX: np.ndarray, low: float, high: float):
    """(z, float32 (Y, X, 3), uint8 (Y, X)) of every slice of the annotated range."""
    annotated = np.flatnonzero(label_ZYX.any(axis=(1, 2)))
    for z in range(annotated[0], annotated[-1] + 1) if len(annotated) else ():
        planes = np.clip([z - 1, z, z + 1], 0, len(image_ZYX) - 1)
        scaled = (np.clip(image_ZYX[planes].astype(np.float32), low, high) - low) * (
            2 / (high - low)
        ) - 1
        yield (
            int(z),
            np.ascontiguousarray(np.moveaxis(scaled, 0, -1)),
            label_ZYX[z].astype(np.uint8),
        )


def turned(array_ZYX: np.ndarray, affine) -> np.ndarray:
    """Axes flipped, not exchanged, so that x leads to the patient's right, y to the front and z up
    in the file's world."""
    if affine is None:
        return array_ZYX
    matrix = np.asarray(affine)[:3, :3]
    ahead = [matrix[np.abs(matrix[:, axis]).argmax(), axis] >= 0 for axis in (2, 1, 0)]
    return array_ZYX[tuple(slice(None, None, 1 if straight else -1) for straight in ahead)]


def _middle(array: np.ndarray, edge: int, case: str) -> np.ndarray:
    if not 0 < edge <= min(array.shape[1:]):
        raise InputError(
            f"crop: found {edge}, but case '{case}' has {array.shape[1]} x {array.shape[2]} pixels"
        )
    y, x = ((n - edge) // 2 for n in array.shape[1:])
    return array[:, y : y + edge, x : x + edge]
