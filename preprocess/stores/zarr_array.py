"""One Zarr v3 array that is one shard file: written case by case, its index read once. zarr-python
reads the same files.

Zarr v3 core and its sharding codec:
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html An inner chunk is
[bytes little-endian, blosc, crc32c]; the index, 16 bytes per chunk and a crc32c, ends the file.
Chunks of zeros are left out.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np

from segfleet.preprocess.stores.packed import (
    MISSING,
    DamagedShard,
    OpenFile,
    PackedArray,
    Packing,
    crc32c,
    pieces,
)

FILE = "c."  # followed by 0.0.0: the one outer chunk, in a flat folder


def checksum(data: bytes) -> bytes:
    return struct.pack("<I", crc32c(data))


class ArrayWriter:
    """Stacks arrays (..., z, y, x) along z, each beginning at a chunk border, into `folder`.
    Memory: one chunk."""

    def __init__(
        self, folder: Path, *, chunk: tuple[int, int, int], dtype: np.dtype, packing: Packing
    ):
        folder.mkdir()
        self.folder, self.chunk, self.dtype, self.packing = (
            folder,
            chunk,
            np.dtype(dtype).newbyteorder("<"),
            packing,
        )
        self.lead: tuple[int, ...] | None = None  # axes before z: all in every chunk
        self.stop, self.extent = 0, (0, 0)  # of the stack so far: end along z, largest (y, x)
        # chunk (z, y, x) -> offset, bytes
        self.entries: dict[tuple[int, ...], tuple[int, int]] = {}
        self.position = 0
        self.file = open(folder / "data", "wb")

    def append(self, array: np.ndarray) -> int:
        """Add `array`; the slice of the stack where it begins. Raises OSError, ValueError for
        another number of channels."""
        lead, grid = array.shape[:-3], array.shape[-3:]
        if self.lead not in (None, lead):
            raise ValueError(f"an array with {lead} channels after arrays with {self.lead}")
        self.lead = lead
        first = -(-self.stop // self.chunk[0])
        for at, piece in pieces(array, self.chunk, self.dtype):
            self._add((first + at[0], *at[1:]), piece)
        start = first * self.chunk[0]
        self.stop = start + grid[0]
        self.extent = (max(self.extent[0], grid[1]), max(self.extent[1], grid[2]))
        return start

    def _add(self, at: tuple[int, ...], piece: np.ndarray) -> None:
        packed = self.packing.pack(piece)
        self.file.write(packed)
        self.file.write(checksum(packed))
        self.entries[at] = self.position, len(packed) + 4
        self.position += len(packed) + 4

    def finish(self) -> None:
        """Write index and metadata, close."""
        shape = (self.stop, *self.extent)
        chunks = tuple(-(-n // c) for n, c in zip(shape, self.chunk, strict=True))
        index = np.full((*chunks, 2), MISSING, "<u8")
        if self.entries:
            index[tuple(np.array(list(self.entries)).T)] = list(self.entries.values())
        packed = index.tobytes()
        self.file.write(packed + checksum(packed))
        self.file.close()
        lead = self.lead or ()
        name = FILE + ".".join("0" * (len(lead) + 3))
        (self.folder / "data").rename(self.folder / name)
        outer = (*lead, *(n * c for n, c in zip(chunks, self.chunk, strict=True)))
        text = json.dumps(self._metadata((*lead, *shape), outer, (*lead, *self.chunk)), indent=1)
        (self.folder / "zarr.json").write_text(text, encoding="utf-8")

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:
            # what is still in the buffer does not fit on the disk; the file is about to be removed
            pass

    def _metadata(
        self, shape: tuple[int, ...], outer: tuple[int, ...], inner: tuple[int, ...]
    ) -> dict:
        endian = (
            {"name": "bytes", "configuration": {"endian": "little"}}
            if self.dtype.itemsize > 1
            else {"name": "bytes"}
        )
        how = {
            "cname": self.packing.codec,
            "clevel": self.packing.level,
            "shuffle": self.packing.filter,
        }
        packing = {**how, "typesize": self.dtype.itemsize, "blocksize": 0}
        sharding = {
            "chunk_shape": inner,
            "codecs": [endian, {"name": "blosc", "configuration": packing}, {"name": "crc32c"}],
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["c", "z", "y", "x"][-len(shape) :],
            "attributes": {},
        }


def open_array(folder: Path, facts: dict) -> PackedArray:
    """An array of `ArrayWriter`; `facts` is its zarr.json. Raises DamagedShard, OSError."""
    try:
        sharding = facts["codecs"][0]["configuration"]
        codecs = [codec["name"] for codec in sharding["codecs"]]
        inner, shape = sharding["chunk_shape"], facts["shape"]
        if codecs != ["bytes", "blosc", "crc32c"] or sharding["index_location"] != "end":
            raise DamagedShard(f"{folder.name}: codecs {codecs}, expected bytes, blosc, crc32c")
        if not all(isinstance(n, int) and n > 0 for n in (*shape, *inner)):
            raise DamagedShard(f"{folder.name}: shape {shape}, chunks {inner}")
        dtype = np.dtype(facts["data_type"]).newbyteorder("<")
        if dtype.kind not in "iuf":
            raise DamagedShard(f"{folder.name}: {dtype}, expected numbers")
        chunk, lead = tuple(inner[-3:]), tuple(inner[:-3])
        chunks = tuple(-(-n // c) for n, c in zip(shape[-3:], chunk, strict=True))
        length = 16 * math.prod(chunks) + 4
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedShard(f"{folder.name}/zarr.json: {type(error).__name__} {error}") from None
    file = OpenFile(folder / (FILE + ".".join("0" * len(shape))))
    if not 4 <= length <= file.size:  # before memory is taken for it
        raise DamagedShard(f"{folder.name}: no room for an index of {chunks} chunks")
    tail = os.pread(file.number, length, file.size - length)
    if len(tail) != length or checksum(tail[:-4]) != tail[-4:]:
        raise DamagedShard(f"{folder.name}: checksum of the chunk index")
    index = np.frombuffer(tail, "<u8", len(tail) // 8).reshape(*chunks, 2)
    return PackedArray(
        file=file, name=folder.name, lead=lead, chunk=chunk, dtype=dtype, index=index
    )
