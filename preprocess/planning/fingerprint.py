"""What a data set is like: the facts of its cases, gathered in one pass, and what planning needs of
them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Case
from segfleet.preprocess.stores.manifest import Dataset, Frozen
from segfleet.preprocess.transforms.case_transforms import crop_box
from segfleet.preprocess.transforms.voxels import counts, draw

MOST_SAMPLES = 2_000_000  # foreground voxels of the whole data set


class CaseFacts(Frozen):
    """What one pass over a raw case measures. Everything but the problems is empty where the case
    could not be read."""

    id: str
    group: str = ""
    stamp: tuple[tuple[str, int, int], ...] = ()  # files: name, bytes, time of change in ns
    source_sha256: str = ""
    image_sha256: str = (
        ""  # of the pixels, so that another compression or an alpha channel does not hide a copy
    )
    thumbnail: str = ""  # of a colour picture: base64 of 16 x 16 grey values, uint16
    raw_shape: tuple[int, int, int] = (0, 0, 0)
    crop_shape: tuple[int, int, int] = (0, 0, 0)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    dtype: str = ""
    white: int = 0  # what a black and white mask paints with; 0: nothing, or no such mask
    orientation: str = ""  # such as RAS: where the file axes x, y, z lead
    voxels: dict[int, int] = {}  # label value -> count on the raw grid
    samples: str = ""  # base64 of float32 (n, C): intensities of foreground voxels
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    def intensities(self, channels: int) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.samples), "<f4").reshape(-1, channels)

    def foreground(self, ignore_label: int | None) -> dict[int, int]:
        return {
            value: n for value, n in self.voxels.items() if value != 0 and value != ignore_label
        }


class Fingerprint(Frozen):
    """What planning needs of a data set. Lists are in the order of the cases."""

    shapes: Annotated[tuple[tuple[int, int, int], ...], BeforeValidator(tuple)]  # cropped, voxels
    spacings: Annotated[tuple[tuple[float, float, float], ...], BeforeValidator(tuple)]  # mm
    intensity: tuple[dict[str, float], ...]  # per channel, of foreground voxels
    kept: float  # median share of the raw volume that cropping keeps
    dtypes: tuple[str, ...]  # those of the raw images
    cases_with: dict[int, int]  # label value -> cases that have it
    orientations: dict[str, int]
    split_seed: int = 0


def samples_per_case(cases: int) -> int:
    return int(np.clip(MOST_SAMPLES // max(1, cases), 20, 50_000))


def statistics(
    case: Case,
    normalisation: Sequence[str],
    ignore_label: int | None,
    samples: int,
    labelled: bool = True,
) -> dict:
    """The fields of CaseFacts that follow from the arrays of a sound case. The draw depends on the
    case's id alone: foreground voxels, or where nothing is `labelled` those above the lowest value.
    """
    label = case.label_ZYX.astype(np.uint8, copy=False)
    voxels = counts(label)
    seed = int.from_bytes(hashlib.sha256(f"intensity {case.id}".encode()).digest()[:8], "little")
    ignored = 0 if ignore_label is None else ignore_label
    rng = np.random.default_rng(seed)
    if labelled:
        where = draw(label, lambda piece: (piece > 0) & (piece != ignored), samples, rng)
    else:
        first = case.image_CZYX[0]
        lowest = first.min()
        where = draw(first, lambda piece: piece > lowest, samples, rng)
    drawn = np.stack([channel.ravel()[where] for channel in case.image_CZYX], axis=-1).astype("<f4")
    return {
        "raw_shape": case.geometry.shape,
        "crop_shape": tuple(
            stop - start for start, stop in crop_box(case.image_CZYX, normalisation)
        ),
        "spacing": case.geometry.spacing,
        "dtype": str(case.image_CZYX.dtype),
        "orientation": orientation(case.geometry.affine),
        "voxels": {int(value): int(voxels[value]) for value in np.flatnonzero(voxels)},
        "samples": base64.b64encode(drawn.tobytes()).decode("ascii"),
    }


def fingerprint(dataset: Dataset, cases: Sequence[CaseFacts], split_seed: int = 0) -> Fingerprint:
    """Gather the facts of sound cases."""
    values = np.concatenate([case.intensities(len(dataset.channels)) for case in cases]).astype(
        np.float64
    )
    foreground = [case.foreground(dataset.ignore_label) for case in cases]
    orientations = sorted({case.orientation for case in cases if case.orientation})
    return Fingerprint(
        shapes=tuple(case.crop_shape for case in cases),
        spacings=tuple(case.spacing for case in cases),
        intensity=tuple(summary(channel) for channel in values.T),
        kept=float(
            np.median([np.prod(case.crop_shape) / np.prod(case.raw_shape) for case in cases])
        ),
        dtypes=tuple(sorted({case.dtype for case in cases})),
        cases_with={
            value: sum(value in case for case in foreground)
            for value in sorted({v for case in foreground for v in case})
        },
        orientations={
            name: sum(case.orientation == name for case in cases) for name in orientations
        },
        split_seed=split_seed,
    )


def summary(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, [0.5, 50, 99.5])
    figures = {
        "mean": values.mean(),
        "std": values.std(),
        "median": middle,
        "min": values.min(),
        "max": values.max(),
        "percentile_00_5": low,
        "percentile_99_5": high,
    }
    return {name: float(value) for name, value in figures.items()}


def orientation(affine: Sequence[Sequence[float]] | None) -> str:
    if affine is None:
        return ""
    from nibabel.orientations import aff2axcodes

    return "".join(axis or "?" for axis in aff2axcodes(np.asarray(affine)))
