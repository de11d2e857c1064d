"""A case: the arrays of one image with its labels, and where they lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a voxel grid lies. Axes are in array order (z, y, x); a 2D image has one slice.

    `spacing` is in mm per axis (z, y, x). `affine` is the 4x4 voxel-to-world matrix of the file in
    *file* order (x, y, z), or None where the format has none (PNG); it is what predictions are
    written back with.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    affine: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """`image_CZYX` float32 or the file's integer type, `label_ZYX` integers or None
    (prediction)."""

    id: str
    image_CZYX: np.ndarray
    label_ZYX: np.ndarray | None
    geometry: Geometry
    group: str = ""
    extra: dict = field(default_factory=dict)

    @property
    def patient(self) -> str:
        """Cases of one patient never land on both sides of a split."""
        return self.group or self.id
