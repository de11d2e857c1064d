"""One slice of a case as a picture: the image in grey, the truth as areas, the prediction as
outlines, a colour for each structure."""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from segfleet.core.files import write_atomically
from segfleet.pipeline.reports.drawn import FOLDER, INDEX
from segfleet.pipeline.scoring.evaluate import busiest_slice, without_ignored
from segfleet.pipeline.task import Task
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import CaseEntry

COLOURS = (  # of label values from 1
    (255, 140, 0),
    (0, 190, 255),
    (0, 200, 120),
    (240, 228, 66),
    (204, 121, 167),
    (230, 60, 40),
)
GOLDEN = 0.61803398875  # of a circle
FILL = 0.35  # of the colour in an area of truth
SIDE = 480  # pixels of the longer side


def save_overlays(
    run: Path,
    document: dict[str, Any],
    store: ShardStore,
    task: Task,
    slices: Callable[[Collection[str]], Mapping[str, tuple[int, np.ndarray]]],
) -> list[dict[str, Any]]:
    """Draw the best, median and worst case of an evaluation into RUN/overlays, with an index that a
    report reads.

    `slices(ids)` gives a slice's number and its predicted labels (Y, X) on the stored grid for each
    case, as scoring kept them: that is where the pictures are drawn; the scores are those of the
    raw grid. The index is written last, so it never names a picture that is not there.
    """
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    chosen, index = chosen_cases(document), []
    predicted = slices({entry["id"] for entry in chosen.values()})
    names = {value: name for name, value in store.manifest.dataset.labels.items() if value}
    for role, entry in chosen.items():
        if entry["id"] not in predicted:
            continue
        case, (z, prediction) = store.manifest.case(entry["id"]), predicted[entry["id"]]
        image, truth = _slice(store, case, z, task)
        png = draw_overlay(image, truth, prediction, spacing=case.spacing)
        (folder / f"{role}.png").write_bytes(png)
        shown = sorted({int(v) for v in np.union1d(truth, prediction)} & set(names))
        described = {
            "case": case.id,
            "mean_dice": entry["mean_dice"],
            "slice": z + 1,
            "slices": case.shape[0],
            "colours": {
                names[value]: "#{:02x}{:02x}{:02x}".format(*colour(value)) for value in shown
            },
        }
        index.append({"role": role, "file": f"{role}.png", **described})
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


def picture(
    store: ShardStore, case_id: str, z: int, prediction_YX: np.ndarray, task: Task
) -> np.ndarray:
    """(Y, X, 3) uint8 of a slice of a stored case with its truth and a prediction."""
    case = store.manifest.case(case_id)
    image, truth = _slice(store, case, z, task)
    return overlay(image, truth, prediction_YX, spacing=case.spacing)


def pixels(png: bytes) -> np.ndarray:
    """(Y, X, 3) uint8 of a picture."""
    with Image.open(io.BytesIO(png)) as opened:
        return np.asarray(opened.convert("RGB"))


def _slice(store: ShardStore, case: CaseEntry, z: int, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, Y, X) and truth (Y, X) of a slice on the stored grid."""
    plane = (slice(z, z + 1), slice(0, case.shape[1]), slice(0, case.shape[2]))
    truth = without_ignored(store.label(case, plane), task)[0]
    return store.image(case, plane)[:, 0], truth


def save_prediction(
    path: Path, image_CZYX: np.ndarray, label_ZYX: np.ndarray, spacing: Sequence[float]
) -> None:
    """A PNG of the slice with the most prediction, outlined; all on the raw grid."""
    z = busiest_slice(np.zeros_like(label_ZYX), label_ZYX)
    nothing = np.zeros_like(label_ZYX[z])
    png = draw_overlay(image_CZYX[:, z], nothing, label_ZYX[z], spacing=spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)


def colour(value: int) -> tuple[int, int, int]:
    """Of a label value: six that the colour-blind tell apart on grey, then as far from each other
    as can be."""
    if value <= len(COLOURS):
        return COLOURS[value - 1]
    red, green, blue = colorsys.hsv_to_rgb(value * GOLDEN % 1, 0.8, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


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


def draw_overlay(
    image_CYX: np.ndarray,
    truth_YX: np.ndarray,
    prediction_YX: np.ndarray,
    *,
    spacing: Sequence[float],
) -> bytes:
    """PNG of an `overlay`. Without `optimize`: a seventh larger, made in a twelfth of the time."""
    file = io.BytesIO()
    drawn = overlay(image_CYX, truth_YX, prediction_YX, spacing=spacing)
    Image.fromarray(drawn).save(file, format="PNG")
    return file.getvalue()


def overlay(
    image_CYX: np.ndarray,
    truth_YX: np.ndarray,
    prediction_YX: np.ndarray,
    *,
    spacing: Sequence[float],
) -> np.ndarray:
    """(Y, X, 3) uint8 of a slice, enlarged to about SIDE pixels with square millimetres. A colour
    image (3 channels) stays in colour.

    Labels are integer maps on the image's grid; every value has its colour: the truth is an area
    that the image shines through, the prediction a line along the inside of its area.
    """
    grey = _pixels(image_CYX)
    height, width = _size(grey.shape[:2], spacing)
    picture = np.asarray(
        Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR)
    ).copy()
    truth, prediction = (_enlarged(label, (width, height)) for label in (truth_YX, prediction_YX))
    for value in np.unique(truth[truth > 0]):
        area = truth == value
        mixed = (1 - FILL) * picture[area] + FILL * np.array(colour(int(value)))
        picture[area] = mixed.astype(np.uint8)
    for value in np.unique(prediction[prediction > 0]):
        area = prediction == value
        line = area & ~ndimage.binary_erosion(area, iterations=2, border_value=1)
        picture[line] = colour(int(value))
    return picture


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


def _enlarged(label_YX: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8, nearest neighbours."""
    picture = Image.fromarray(np.ascontiguousarray(label_YX, dtype=np.uint8))
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))
