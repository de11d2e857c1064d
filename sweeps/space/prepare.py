"""Stores as axes of a space: which ones its points need, and where they lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from segfleet.pipeline.sections import Section

PREFIX = "prepare."
NUMBERS = ("size", "patch", "spacing")  # a list is one value, a list of lists an axis
WORDS = ("interpolation", "masks", "normalisation", "slices")


class Prepare(Section):
    """A raw data set, and how it is preprocessed: options of `segfleet preprocess`, of which those
    below may be lists of values, each an axis."""

    name: str = Field(description="layout of the raw data, as `segfleet datasets` lists them")
    raw: str = Field(description="folder of the raw data set")
    out: str = Field(description="folder of the stores, one for each combination of values")
    format: Literal["zarr", "hdf5"] = Field("zarr", description="of the stores")
    codec: Literal["blosc", "zstd"] = Field("blosc", description="of their chunks")
    options: dict[str, str] = Field(default_factory=dict, description="of the layout")
    size: Any = Field(None, description="y and x of every 2D image; or a list of such")
    patch: Any = Field(None, description="z, y, x; or a list of such; null: the planned one")
    spacing: Any = Field(
        None, description="z, y, x in mm; or a list of such; null: the planned one"
    )
    interpolation: Any = Field(None, description="of images that are resized, or a list")
    masks: Any = Field(None, description="how masks are resized, or a list")
    normalisation: Any = Field(None, description="of every channel, or a list")
    slices: Any = Field(False, description="a 3D data set for 2D networks, or a list")

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Option -> its values, of those that have several."""
        given = {key: getattr(self, key) for key in (*NUMBERS, *WORDS)}
        return {
            key: tuple(value)
            for key, value in given.items()
            if isinstance(value, list)
            and (key in WORDS or any(isinstance(item, list) or item is None for item in value))
        }

    def store(self, point: Mapping[str, Any]) -> Path:
        """The folder of a point's store; `point`: axis label -> value."""
        words = [f"{key}={_word(point[PREFIX + key])}" for key in self.axes()]
        return Path(self.out) / ",".join(words) if words else Path(self.out)

    def stores(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every store's folder, and its options."""
        axes = self.axes()
        fixed = {key: getattr(self, key) for key in (*NUMBERS, *WORDS) if key not in axes}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            point = {PREFIX + key: value for key, value in chosen.items()}
            yield self.store(point), {**fixed, **chosen}


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(f"{number:g}" for number in value)
    return "planned" if value is None else str(value).lower()
