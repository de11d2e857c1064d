"""One Zarr v3 array that is one shard file: written case by case, its index read once. zarr-python
describes it (zarr.json), reads the same files, and reads for us what has other codecs or chunks.

Zarr v3 core and its sharding codec:
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html An inner chunk is
[bytes little-endian, blosc or zstd, crc32c]; the index, 16 bytes per chunk and a crc32c, ends the
file. Chunks of zeros are left out.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from zarr.core.group import GroupMetadata
    from zarr.core.metadata.v3 import ArrayV3Metadata

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

    def finish(self) -> ArrayV3Metadata:
        """Write index and metadata, close; the metadata."""
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
        return self._describe((*lead, *shape), outer, (*lead, *self.chunk))

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:
            # what is still in the buffer does not fit on the disk; the file is about to be removed
            pass

    def _describe(
        self, shape: tuple[int, ...], outer: tuple[int, ...], inner: tuple[int, ...]
    ) -> ArrayV3Metadata:
        """zarr.json, by zarr-python, which refuses what is no Zarr array."""
        from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
        from zarr.core.metadata.v3 import ArrayV3Metadata

        packing: BloscCodec | ZstdCodec
        if self.packing.filter is None:
            packing = ZstdCodec(level=self.packing.level, checksum=False)
        else:
            packing = BloscCodec(
                cname=self.packing.codec,
                clevel=self.packing.level,
                shuffle=self.packing.filter,
                typesize=self.dtype.itemsize,
                blocksize=0,
            )
        endian = BytesCodec(endian="little" if self.dtype.itemsize > 1 else None)
        shard = ShardingCodec(chunk_shape=inner, codecs=[endian, packing, Crc32cCodec()])
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [shard.to_dict()],
            "dimension_names": ["c", "z", "y", "x"][-len(shape) :],
            "attributes": {},
        }
        metadata = ArrayV3Metadata.from_dict(document)
        write_metadata(self.folder, metadata)
        return metadata


def write_metadata(folder: Path, metadata: ArrayV3Metadata | GroupMetadata) -> None:
    """zarr.json of an array or a group."""
    from zarr.core.buffer import default_buffer_prototype

    for name, text in metadata.to_buffer_dict(default_buffer_prototype()).items():
        (folder / name).write_bytes(text.to_bytes())


class AnyArray:
    """An array (*lead, z, y, x) of whatever codecs and chunks, read by zarr-python: as a
    `PackedArray`, but slower, and with the checksums that its codecs have."""

    def __init__(self, folder: Path, metadata: dict):
        """Raises DamagedShard, also where `metadata` are not what lies there."""
        import zarr

        self.name = folder.name
        for path in folder.rglob("*"):
            if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
                raise DamagedShard(f"{self.name}/{path.relative_to(folder)} is no file")
        with self._damaged():
            self.array = zarr.open_array(folder, mode="r", zarr_format=3)
        if list(self.array.shape) != metadata["shape"]:
            raise DamagedShard(
                f"{self.name}: {self.array.shape}, its group says {metadata['shape']}"
            )
        self.lead, self.dtype = self.array.shape[:-3], self.array.dtype

    def read(self, start: tuple[int, int, int], size: list[int]) -> np.ndarray:
        """As `PackedArray.read`."""
        box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        with self._damaged():
            values = np.asarray(self.array[(..., *box)])
        if values.shape != (*self.lead, *size):
            raise DamagedShard(f"{self.name}: {values.shape} at {start}, expected {tuple(size)}")
        return values

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # a codec's own
            words = f"{type(error).__name__} {error}"
            raise DamagedShard(f"{self.name}: zarr-python: {words}") from None


def open_array(folder: Path, metadata: dict) -> PackedArray | AnyArray:
    """An array of a shard; `metadata` is its zarr.json. Raises DamagedShard, OSError."""
    try:
        if (codec := _codec(metadata)) is None:
            return AnyArray(folder, metadata)
        inner, shape = metadata["codecs"][0]["configuration"]["chunk_shape"], metadata["shape"]
        if not all(isinstance(n, int) and n > 0 for n in (*shape, *inner)):
            raise DamagedShard(f"{folder.name}: shape {shape}, chunks {inner}")
        dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
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
        file=file, name=folder.name, lead=lead, chunk=chunk, dtype=dtype, index=index, codec=codec
    )


def _codec(metadata: dict) -> str | None:
    """What an array is packed by if it is one shard, packed and checked as `ArrayWriter` does
    it."""
    (how, *others), shape = metadata["codecs"], metadata["shape"]
    if others or how["name"] != "sharding_indexed":
        return None
    sharding, outer = how["configuration"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    inner, key = sharding["chunk_shape"], metadata["chunk_key_encoding"]
    first, *codec, last = [codec["name"] for codec in sharding["codecs"]]
    readable = (
        (first, last) == ("bytes", "crc32c")
        and codec in (["blosc"], ["zstd"])
        and [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
        and sharding.get("index_location", "end") == "end"
        and key["name"] == "default"
        and key["configuration"]["separator"] == "."
        and inner[:-3] == shape[:-3]
        and all(whole >= size for whole, size in zip(outer, shape, strict=True))
    )
    return codec[0] if readable else None
