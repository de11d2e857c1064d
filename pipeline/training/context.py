"""What a run is trained with: settings, data, folders and ranks, and what to call meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from segfleet.pipeline.engines.base import Engine
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.run import StageFolder
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import Manifest

# (engine, resolved recipe) -> scores while training: {"dice": ..., ...}, the same on every rank
Validate = Callable[[Engine, Recipe], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Context:
    """The same on every rank."""

    recipe: Recipe
    stores: Callable[[Recipe], ShardStore]  # of a recipe that is resolved for its stage
    folders: list[StageFolder]
    ranks: Ranks
    asked_to_stop: Callable[[], bool]
    warn: Callable[[str], None]
    validate: Validate
    # for a stage that another run, which shares it, is training; never for the last one, which is
    # this very run's
    waits: bool = False
    listen: Callable[[dict[str, Any]], None] | None = None  # gets every event, on rank 0
    pause_at: int | None = None  # step of the last stage at which it stops, saved

    def manifests(self, settings: Recipe) -> Manifest:
        return self.stores(settings).manifest
