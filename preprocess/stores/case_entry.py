"""What a manifest knows of one case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidatorFunctionWrapHandler,
    WrapSerializer,
    WrapValidator,
)

# said to whoever reads a store and to whoever preprocesses into it: there, the same command alone
# would find the same damage
RESTORE = (
    "Restore it from a backup; or move the store's folder away, or choose another --out, and "
    "preprocess the raw data again."
)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def inside(path: str) -> str:
    """A path that stays inside its folder, whatever system reads it. Raises ValueError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ValueError(f"path {path!r} leads out of its folder")
    return path


InsidePath = Annotated[str, AfterValidator(inside)]


class SampledVoxels(Mapping[int, np.ndarray]):
    """Label value -> sampled flat voxel indices, where they lie in a mapped file."""

    __slots__ = ("labels", "parts")

    def __init__(self, labels: list[int], parts: list[np.ndarray]):
        self.labels, self.parts = labels, parts

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        return iter(self.labels)

    def __getitem__(self, label: int) -> np.ndarray:
        try:
            return self.parts[self.labels.index(label)]
        except ValueError:
            raise KeyError(label) from None

    def plain(self) -> dict[int, tuple[int, ...]]:
        return {
            label: tuple(part.tolist()) for label, part in zip(self.labels, self.parts, strict=True)
        }

    def __eq__(self, other: object) -> bool:
        other = other.plain() if isinstance(other, SampledVoxels) else other
        return self.plain() == other

    __hash__ = None  # type: ignore[assignment]


def _as_it_lies(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, SampledVoxels) else check(value)


def _written(value: Any, write: SerializerFunctionWrapHandler) -> Any:
    return write(value.plain() if isinstance(value, SampledVoxels) else value)


class CaseEntry(Frozen):
    """One case of the store."""

    id: str
    group: str  # patient: never on both sides of a split
    shard: InsidePath  # path inside the store
    key: InsidePath  # array group inside the shard
    shape: tuple[int, int, int]  # of the stored grid (z, y, x), voxels
    spacing: tuple[float, float, float]  # mm
    # box of the raw grid that was kept: (start, stop) per axis
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    raw_shape: tuple[int, int, int]
    raw_spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...] | None = None
    has_truth: bool = False  # the label on the raw grid is stored beside the resampled one
    voxels: dict[int, int] = Field(default_factory=dict)  # label value -> count on the stored grid
    # label value -> sampled flat voxel indices of the stored grid
    foreground: Annotated[
        dict[int, tuple[int, ...]], WrapValidator(_as_it_lies), WrapSerializer(_written)
    ] = Field(default_factory=dict)
    sha256: str = ""  # of the stored image and label bytes: the same for every store format
    source_sha256: str = ""  # of the raw files
    image_sha256: str = (
        ""  # of the raw image's pixels, whatever file they were in; empty: not recorded
    )
    image_file: str = ""  # relative to the raw folder, for the reader of predictions and reports
