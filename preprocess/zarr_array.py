"""One Zarr v3 array that is one shard file: written case by case, read chunk by chunk. zarr-python reads the same files.

Zarr v3 core and its sharding codec: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
An inner chunk is [bytes little-endian, blosc, crc32c]; the index, 16 bytes per chunk and a crc32c, ends the file. Chunks of zeros are
left out.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import blosc

from segfleet.preprocess.shard_reader import DamagedShard

blosc.set_nthreads(1)  # loaders bring their own processes

MISSING = 2**64 - 1
FILE = "c."  # followed by 0.0.0: the one outer chunk, in a flat folder
FILTERS = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def crc32c(data: bytes | np.ndarray) -> bytes:
    return struct.pack("<I", google_crc32c.value(data))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A configuration of the blosc codec."""

    codec: str
    level: int
    filter: str


class ArrayWriter:
    """Stacks arrays (..., z, y, x) along z, each beginning at a chunk border, into `folder`. Memory: one chunk."""

    def __init__(self, folder: Path, *, chunk: tuple[int, int, int], dtype: np.dtype, packing: Packing):
        folder.mkdir()
        self.folder, self.chunk, self.dtype, self.packing = folder, chunk, np.dtype(dtype).newbyteorder("<"), packing
        self.lead: tuple[int, ...] | None = None  # axes before z: all in every chunk
        self.stop, self.extent = 0, (0, 0)  # of the stack so far: end along z, largest (y, x)
        self.entries: dict[tuple[int, ...], tuple[int, int]] = {}  # chunk (z, y, x) -> offset, bytes
        self.position = 0
        self.file = open(folder / "data", "wb")

    def append(self, array: np.ndarray) -> int:
        """Add `array`; the slice of the stack where it begins. Raises OSError, ValueError for another number of channels."""
        lead, grid = array.shape[:-3], array.shape[-3:]
        if self.lead not in (None, lead):
            raise ValueError(f"an array with {lead} channels after arrays with {self.lead}")
        self.lead = lead
        first = -(-self.stop // self.chunk[0])
        for at in product(*(range(-(-n // c)) for n, c in zip(grid, self.chunk, strict=True))):
            part = array[(..., *(slice(i * c, (i + 1) * c) for i, c in zip(at, self.chunk, strict=True)))]
            piece = np.zeros((*lead, *self.chunk), self.dtype)
            piece[tuple(slice(n) for n in part.shape)] = part
            if piece.reshape(-1).view(np.uint8).any():
                self._add((first + at[0], *at[1:]), piece)
        start = first * self.chunk[0]
        self.stop = start + grid[0]
        self.extent = (max(self.extent[0], grid[1]), max(self.extent[1], grid[2]))
        return start

    def _add(self, at: tuple[int, ...], piece: np.ndarray) -> None:
        packed = blosc.compress(piece, self.packing.codec.encode(), self.packing.level, FILTERS[self.packing.filter])
        self.file.write(packed)
        self.file.write(crc32c(packed))
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
        self.file.write(packed + crc32c(packed))
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
        except OSError:  # what is still in the buffer does not fit on the disk; the file is about to be removed
            pass

    def _metadata(self, shape: tuple[int, ...], outer: tuple[int, ...], inner: tuple[int, ...]) -> dict:
        endian = {"name": "bytes", "configuration": {"endian": "little"}} if self.dtype.itemsize > 1 else {"name": "bytes"}
        how = {"cname": self.packing.codec, "clevel": self.packing.level, "shuffle": self.packing.filter}
        packing = {**how, "typesize": self.dtype.itemsize, "blocksize": 0}
        sharding = {
            "chunk_shape": inner,
            "codecs": [endian, {"name": "blosc", "configuration": packing}, {"name": "crc32c"}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
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


class ArrayReader:
    """Random access to an array of `ArrayWriter`; `facts` is its zarr.json. Raises DamagedShard, OSError. Safe in threads."""

    file = -1

    def __init__(self, folder: Path, facts: dict):
        try:
            sharding = facts["codecs"][0]["configuration"]
            codecs = [codec["name"] for codec in sharding["codecs"]]
            inner, shape = sharding["chunk_shape"], facts["shape"]
            if codecs != ["bytes", "blosc", "crc32c"] or sharding["index_location"] != "end":
                raise DamagedShard(f"{folder.name}: codecs {codecs}, expected bytes, blosc, crc32c")
            self.dtype = np.dtype(facts["data_type"]).newbyteorder("<")
            self.chunk, self.lead = tuple(inner[-3:]), tuple(inner[:-3])
            chunks = tuple(-(-n // c) for n, c in zip(shape[-3:], self.chunk, strict=True))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedShard(f"{folder.name}/zarr.json: {type(error).__name__} {error}") from None
        self.name = folder.name
        self.file = os.open(folder / (FILE + ".".join("0" * len(shape))), os.O_RDONLY | os.O_CLOEXEC)
        size, length = os.fstat(self.file).st_size, 16 * math.prod(chunks) + 4
        tail = os.pread(self.file, length, max(0, size - length))
        if len(tail) != length or crc32c(tail[:-4]) != tail[-4:]:
            raise DamagedShard(f"{self.name}: checksum of the chunk index")
        self.index = np.frombuffer(tail, "<u8", len(tail) // 8).reshape(*chunks, 2)

    def __del__(self):
        if self.file >= 0:
            os.close(self.file)

    def read(self, start: tuple[int, int, int], size: list[int]) -> np.ndarray:
        """The box (..., z, y, x) of `size` voxels from `start` of the stack on; the chunks it touches are read, checked and decoded."""
        out = np.empty((*self.lead, *size), self.dtype)
        axes = [_overlaps(s, s + n, c) for s, n, c in zip(start, size, self.chunk, strict=True)]
        near = tuple(slice(axis[0][0], axis[-1][0] + 1) for axis in axes)
        entries = self.index[near].reshape(-1, 2).tolist()
        self._announce(entries)
        piece = np.empty((*self.lead, *self.chunk), self.dtype)
        for ((i, fz, tz), (j, fy, ty), (k, fx, tx)), (offset, count) in zip(product(*axes), entries, strict=True):
            if offset == MISSING:
                out[..., tz, ty, tx] = 0
                continue
            packed = np.frombuffer(os.pread(self.file, count, offset), np.uint8)
            if len(packed) != count or count < 4 or crc32c(packed[:-4]) != packed[-4:].tobytes():
                raise DamagedShard(f"{self.name}: checksum of chunk {(i, j, k)}")
            blosc.decompress(packed[:-4], piece)
            out[..., tz, ty, tx] = piece[..., fz, fy, fx]
        return out

    def _announce(self, entries: list[list[int]]) -> None:
        """Let the kernel fetch all chunks at once: twice as fast from a cold disk, 4 % slower from memory (Linux)."""
        if hasattr(os, "posix_fadvise") and len(entries) > 1:
            for offset, count in entries:
                if offset != MISSING:
                    os.posix_fadvise(self.file, offset, count, os.POSIX_FADV_WILLNEED)


def _overlaps(start: int, stop: int, chunk: int) -> list[tuple[int, slice, slice]]:
    """Along one axis, of every chunk that [start, stop) touches: its number, the part of it that is wanted, where that goes."""
    found = []
    for number in range(start // chunk, -(-stop // chunk)):
        origin = number * chunk
        low, high = max(start, origin), min(stop, origin + chunk)
        found.append((number, slice(low - origin, high - origin), slice(low - start, high - start)))
    return found
