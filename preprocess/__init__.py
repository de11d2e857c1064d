"""Raw data sets become immutable shard stores. No torch in this room.

from segfleet.preprocess import BuildRequest, build, open_store
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from segfleet.core.faces import public

if TYPE_CHECKING:
    from segfleet.preprocess.building.build import build
    from segfleet.preprocess.building.request import BuildRequest
    from segfleet.preprocess.readers.base import open_reader
    from segfleet.preprocess.stores.base import open_store

__all__ = ["BuildRequest", "build", "open_reader", "open_store"]
__getattr__ = public(
    __name__,
    {
        "BuildRequest": "building.request",
        "build": "building.build",
        "open_reader": "readers.base",
        "open_store": "stores.base",
    },
)
