"""One slice of a case as a picture: the image in grey, the truth and the prediction as outlines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from segfleet.core.files import write_atomically
from segfleet.pipeline.task import Task
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import CaseEntry

FOLDER, INDEX = "overlays", "index.json"

# blue, orange: told apart by the colour-blind too
TRUTH, PREDICTION, BOTH = (
    (0, 190, 255),
    (255, 140, 0),
    (255, 255, 255),
)
SIDE = 480  # pixels of the longer side


def save_overlays(
    run: Path,
    document: dict[str, Any],
    store: ShardStore,
    task: Task,
    probabilities: Callable[[CaseEntry], Tensor],
) -> list[dict[str, Any]]:
    """Draw the best, median and worst case of an evaluation into RUN/overlays, with an index that a
    report reads.

    `probabilities(case)` gives (K, Z, Y, X) on the stored grid, which is where the pictures are
    drawn; the scores are those of the raw grid. The index is written last, so it never names a
    picture that is not there.
    """
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    index = []
    for role, entry in chosen_cases(document).items():
        case = store.manifest.case(entry["id"])
        truth = store.label(case)
        truth = (
            np.where(truth == task.ignore_label, 0, truth)
            if task.ignore_label is not None
            else truth
        )
        prediction = task.labels(torch.as_tensor(probabilities(case))).cpu().numpy()
        z = busiest_slice(truth, prediction)
        png = draw_overlay(store.image(case), truth, prediction, spacing=case.spacing, z=z)
        (folder / f"{role}.png").write_bytes(png)
        facts = {
            "case": case.id,
            "mean_dice": entry["mean_dice"],
            "slice": z + 1,
            "slices": case.shape[0],
        }
        index.append({"role": role, "file": f"{role}.png", **facts})
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


def save_prediction(
    path: Path, image_CZYX: np.ndarray, label_ZYX: np.ndarray, spacing: Sequence[float]
) -> None:
    """A PNG of the slice with the most prediction, outlined; all on the raw grid."""
    z = busiest_slice(np.zeros_like(label_ZYX), label_ZYX)
    png = draw_overlay(image_CZYX, np.zeros_like(label_ZYX), label_ZYX, spacing=spacing, z=z)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)


def chosen_cases(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"best", "median", "worst"} -> case entry, by mean Dice over structures; fewer roles when
    there are fewer cases with a score."""
    ranked = sorted(
        (c for c in document["cases"] if c["mean_dice"] is not None),
        key=lambda c: (-c["mean_dice"], c["id"]),
    )
    if not ranked:
        return {}
    chosen = {"best": ranked[0]}
    if len(ranked) > 2:
        chosen["median"] = ranked[len(ranked) // 2]
    if len(ranked) > 1:
        chosen["worst"] = ranked[-1]
    return chosen


def busiest_slice(truth_ZYX: np.ndarray, prediction_ZYX: np.ndarray) -> int:
    """The slice with the most voxels of truth; of prediction where there is no truth; else the
    middle one."""
    for label in (truth_ZYX, prediction_ZYX):
        counts = np.count_nonzero(label, axis=(1, 2))
        if counts.any():
            return int(counts.argmax())
    return len(truth_ZYX) // 2


def draw_overlay(
    image_CZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    prediction_ZYX: np.ndarray,
    *,
    spacing: Sequence[float],
    z: int,
) -> bytes:
    """PNG of slice z, enlarged to about SIDE pixels with square millimetres. A colour image (3
    channels) stays in colour.

    All arrays share one grid; labels are integer maps, outlines are drawn between different values.
    Where both outlines meet: white.
    """
    grey = _pixels(image_CZYX[:, z])
    height, width = _size(grey.shape[:2], spacing)
    picture = np.asarray(
        Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR)
    ).copy()
    truth, prediction = (
        _outline(label[z], (width, height)) for label in (truth_ZYX, prediction_ZYX)
    )
    picture[truth] = TRUTH
    picture[prediction] = PREDICTION
    picture[truth & prediction] = BOTH
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _pixels(slice_CYX: np.ndarray) -> np.ndarray:
    """(Y, X, 3) uint8: contrast from the 1st to the 99th percentile of the slice, all channels
    alike."""
    colour = slice_CYX[:3] if len(slice_CYX) == 3 else slice_CYX[:1].repeat(3, axis=0)
    low, high = np.percentile(colour, [1, 99])
    scaled = (colour.astype(np.float32) - low) / max(float(high - low), 1e-6)
    return np.ascontiguousarray((scaled.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def _size(shape: tuple[int, int], spacing: Sequence[float]) -> tuple[int, int]:
    """(height, width) in pixels: proportional to millimetres, the longer side SIDE."""
    millimetres = (shape[0] * spacing[1], shape[1] * spacing[2])
    scale = SIDE / max(millimetres)
    return tuple(max(1, round(side * scale)) for side in millimetres)


def _outline(label_YX: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: a line two pixels wide along the inside of every labelled area."""
    large = np.asarray(
        Image.fromarray(label_YX.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    )
    line = np.zeros(large.shape, dtype=bool)
    for value in np.unique(large[large > 0]):
        area = large == value
        line |= area & ~ndimage.binary_erosion(area, iterations=2, border_value=1)
    return line
