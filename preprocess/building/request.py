"""What a store is made from and how: plain data that the command line fills and launchers carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, field
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from segfleet.core.job import Job
from segfleet.preprocess.planning.plan import Overrides

SPLIT_SEED = 12345
SHARD_BYTES = 16 * 2**20  # cases share a shard until it holds this much


@dataclass(frozen=True)
class BuildRequest:
    """The raw data set in `raw`, of the layout `reader_name`, becomes the store `out`.

    `options` are the layout's own; `overrides` replace parts of the plan. All but `workers`
    (processes at most; None: what cores, memory and work suggest) determines the store's bytes.
    """

    reader_name: str
    raw: Path
    out: Path
    _: KW_ONLY
    format: str = "zarr"
    codec: str = "blosc"
    options: Mapping[str, str] = field(default_factory=dict)
    overrides: Overrides = field(default_factory=Overrides)
    split_seed: int = SPLIT_SEED
    shard_bytes: int = SHARD_BYTES
    workers: int | None = None

    @property
    def partial(self) -> Path:
        """Where the store lies until it is complete."""
        return self.out.with_name(self.out.name + ".partial")


class Preprocess(Job):
    """A whole store, or what is missing of it."""

    do: Literal["preprocess"] = "preprocess"
    store: BuildRequest
    verify: bool = False  # then read every chunk back


class Survey(Job):
    """The `share` = (i, n) of n members in the first look at the raw files."""

    do: Literal["survey"] = "survey"
    store: BuildRequest
    share: tuple[int, int]


class Write(Job):
    """The same of the shards."""

    do: Literal["write"] = "write"
    store: BuildRequest
    share: tuple[int, int]
