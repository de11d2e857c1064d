"""Zarr v3 shards: a folder `<shard>.zarr` is a plain group of the arrays image, label and, where
there is one, truth.

zarr-python makes the group and describes its arrays. Each is one shard file with small inner
chunks, which we write ourselves (zarr_array.py). The group holds the arrays' metadata too
(consolidated), so that one file is read to open a shard. The cases of a shard are stacked along z,
each from a chunk border on, so that thousands of 2D images are seven files and any Zarr tool still
shows them as slices; the group's attribute `cases` says where each lies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from segfleet.preprocess.stores.packed import (
    DamagedShard,
    PackedArray,
    packing_of,
)
from segfleet.preprocess.stores.shard_reader import ShardReader
from segfleet.preprocess.stores.shard_writer import ShardWriter
from segfleet.preprocess.stores.zarr_array import AnyArray, ArrayWriter, open_array, write_metadata

SUFFIX = ".zarr"


class Shard:
    """One published group, its arrays opened when they are first read. `hashes`: what is known of
    its files, path inside it -> sha256."""

    def __init__(self, folder: Path, hashes: dict[str, str]):
        self.folder, self.hashes, self.arrays = folder, hashes, {}
        try:
            group = self._metadata("zarr.json")
            attributes = group["attributes"]
            # stores of earlier versions have none
            self.described = (group.get("consolidated_metadata") or {}).get("metadata", {})
            self.cases: dict[str, dict[str, list[int]]] = attributes["cases"]
            self.owners: dict[str, str] = attributes["sha256"]
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedShard(f"zarr.json: {type(error).__name__} {error}") from None

    def shape_and_dtype(self, key: str, name: str) -> tuple[tuple[int, ...], np.dtype]:
        array = self._array(name)
        return (*array.lead, *self._place(key, name)[1:]), array.dtype

    def owner(self, key: str) -> str:
        return self.owners.get(key, "")

    def packed(self, key: str, name: str) -> tuple[PackedArray | AnyArray, int]:
        return self._array(name), self._place(key, name)[0]

    def _place(self, key: str, name: str) -> list[int]:
        try:
            return self.cases[key][name]
        except KeyError:
            raise DamagedShard(f"zarr.json: no {name} of '{key}'") from None

    def _array(self, name: str) -> PackedArray | AnyArray:
        if (array := self.arrays.get(name)) is None:
            metadata = self.described.get(name) or self._metadata(f"{name}/zarr.json")
            array = self.arrays[name] = open_array(self.folder / name, metadata)
        return array

    def _metadata(self, name: str) -> dict:
        """The one part of a shard without a checksum of its own; the manifest has one."""
        if (self.folder / name).exists() and not (self.folder / name).is_file():
            raise DamagedShard(f"{name} is no file")  # a pipe would be waited for
        raw = (self.folder / name).read_bytes()
        if name in self.hashes and hashlib.sha256(raw).hexdigest() != self.hashes[name]:
            raise DamagedShard(f"{name}: its sha256 is not that of the manifest")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DamagedShard(f"{name}: {error}") from None


class Store(ShardReader):
    suffix = SUFFIX

    def open_shard(self, path: Path) -> Shard:
        inside = path.relative_to(self.root).as_posix()
        names = ["zarr.json", *(f"{array}/zarr.json" for array in ("image", "label", "truth"))]
        recorded = ((name, self.manifest.files.get(f"{inside}/{name}")) for name in names)
        return Shard(path, {name: record["sha256"] for name, record in recorded if record})


class Writer(ShardWriter):
    suffix = SUFFIX

    def _begin(self) -> None:
        self.cases: dict[str, dict[str, list[int]]] = {}
        self.owners: dict[str, str] = {}
        self.arrays: dict[str, ArrayWriter] = {}
        self.partial.mkdir()

    def _write(
        self,
        key: str,
        image: np.ndarray,
        label: np.ndarray,
        truth: np.ndarray | None,
        sha256: str,
    ) -> None:
        self.owners[key] = sha256
        self.cases[key] = {
            "image": self._append("image", image),
            "label": self._append("label", label),
        }
        if truth is not None:
            self.cases[key]["truth"] = self._append("truth", truth)

    def _append(self, name: str, array: np.ndarray) -> list[int]:
        if name not in self.arrays:
            self.arrays[name] = ArrayWriter(
                self.partial / name,
                chunk=self.chunk,
                dtype=array.dtype,
                packing=packing_of(self.codec, name),
            )
        return [self.arrays[name].append(array), *array.shape[-3:]]

    def _finish(self) -> None:
        from zarr.core.group import ConsolidatedMetadata, GroupMetadata

        described = {name: array.finish() for name, array in self.arrays.items()}
        attributes = {
            "layout": "cases: name -> array -> [first slice, z, y, x]; sha256: of their content",
            "cases": self.cases,
            "sha256": self.owners,
        }
        group = GroupMetadata(
            attributes=attributes,
            zarr_format=3,
            consolidated_metadata=ConsolidatedMetadata(metadata=described),
        )
        write_metadata(self.partial, group)

    def _drop(self) -> None:
        for array in getattr(self, "arrays", {}).values():
            array.close()
