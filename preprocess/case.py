"""A case: the arrays of one image with its labels, and where they lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file says beside its values and their grid.

    `warnings` are what a person should look at: (field, found, expected, mend). `header` is a NIfTI
    file's own, so that a prediction can say where it lies in the same words. `dims` is 2 where the
    file is a flat picture by its own account. `white` is the value that a black and white mask
    paints with. `lies`: of a label that lies where its affine says: "turned" covers all of its
    image, "anywhere" perhaps but a part; "" is to be on the image's grid.
    """

    warnings: tuple[tuple[str, str, str, str], ...] = ()
    header: bytes = b""
    dims: int = 3
    white: int = 0
    lies: str = ""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a voxel grid lies. Axes are in array order (z, y, x); a 2D image has one slice.

    `spacing` is in mm per axis (z, y, x). `affine` is the 4x4 voxel-to-world matrix (mm) of the
    file in *file* order (x, y, z), or None where the format has none (PNG); it is what predictions
    are written back with. `file` does not count when grids are compared.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    affine: tuple[tuple[float, ...], ...] | None = None
    file: FileFacts = field(default=FileFacts(), compare=False)

    @property
    def to_mm(self) -> np.ndarray:
        """The affine, in file order; without one the spacing alone."""
        plain = np.diag([*self.spacing[::-1], 1.0])
        return plain if self.affine is None else np.asarray(self.affine)


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
