"""Chunks packed by blosc, each with a CRC-32C: what the data of both store formats are made of,
however a format finds them in its file.

Packed and checked here, not by the formats' libraries: zarr-python spends 0.3 ms of Python per
chunk; HDF5 holds one lock for all threads, and its Fletcher32 takes eight times as long as a
CRC-32C.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import blosc

blosc.set_nthreads(1)  # loaders bring their own processes

HEADER = 16  # bytes of a blosc chunk's
MISSING = 2**64 - 1  # offset of a chunk of zeros: it is left out
FILTERS = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class DamagedShard(Exception):
    """Stored bytes are not what was written."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A configuration of the blosc codec."""

    codec: str
    level: int
    filter: str

    def pack(self, piece: np.ndarray) -> bytes:
        return blosc.compress(piece, self.codec.encode(), self.level, FILTERS[self.filter])


# Measured: lz4hc decodes at least as fast as lz4 and packs 5 to 15 % better, at 60 to 150 MB/s of
# writing. Bitshuffle packs integers 15 % better still, but halves the speed. zstd packs labels as
# well as lz4hc does without a filter, and decodes them four times slower.
IMAGES = Packing(codec="lz4hc", level=5, filter="shuffle")
LABELS = Packing(codec="lz4hc", level=9, filter="noshuffle")


def crc32c(data: bytes | np.ndarray) -> int:
    return google_crc32c.value(data)


def told(packed: np.ndarray) -> tuple[int, int]:
    """(bytes unpacked, bytes packed) as the header of a blosc chunk says; of none (-1, -1)."""
    if len(packed) < HEADER:
        return -1, -1
    sizes = packed[4:HEADER].view("<u4")
    return int(sizes[0]), int(sizes[2])


def pieces(
    array: np.ndarray, chunk: tuple[int, int, int], dtype: np.dtype
) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
    """The chunks (..., z, y, x) of `array` with their places in the grid of chunks, padded with
    zeros. Chunks of zeros are left out."""
    lead, grid = array.shape[:-3], array.shape[-3:]
    for at in product(*(range(-(-n // c)) for n, c in zip(grid, chunk, strict=True))):
        part = array[(..., *(slice(i * c, (i + 1) * c) for i, c in zip(at, chunk, strict=True)))]
        piece = np.zeros((*lead, *chunk), dtype)
        piece[tuple(slice(n) for n in part.shape)] = part
        if piece.reshape(-1).view(np.uint8).any():
            yield at, piece


class OpenFile:
    """A file descriptor for reading that is closed with its last user."""

    number = -1

    def __init__(self, path: Path):
        """Raises DamagedShard for what is no file: a pipe would be waited for."""
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        facts = os.fstat(self.number)
        if not stat.S_ISREG(facts.st_mode):
            raise DamagedShard(f"{path.name} is no file")
        self.size = facts.st_size

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


@dataclass(frozen=True, kw_only=True)
class PackedArray:
    """Random access to an array (*lead, z, y, x) whose `chunk`s (z, y, x) lie somewhere in `file`.
    Safe in threads.

    index: (chunks along z, y, x; 2), offset and bytes of every chunk, uint64. sums: the CRC-32C of
    every chunk, uint32; None: it is the chunk's last four bytes, little-endian.
    """

    file: OpenFile
    name: str
    lead: tuple[int, ...]
    chunk: tuple[int, int, int]
    dtype: np.dtype
    index: np.ndarray
    sums: np.ndarray | None = None

    def read(self, start: tuple[int, int, int], size: list[int]) -> np.ndarray:
        """The box of `size` voxels from `start` on; the chunks it touches are read, checked and
        decoded. Raises DamagedShard, OSError."""
        out = np.empty((*self.lead, *size), self.dtype)
        axes = [_overlaps(s, s + n, c) for s, n, c in zip(start, size, self.chunk, strict=True)]
        near = tuple(slice(axis[0][0], axis[-1][0] + 1) for axis in axes)
        entries = self.index[near].reshape(-1, 2).tolist()
        self._announce(entries)
        piece = np.empty((*self.lead, *self.chunk), self.dtype)
        for ((i, fz, tz), (j, fy, ty), (k, fx, tx)), (offset, count) in zip(
            product(*axes), entries, strict=True
        ):
            if offset == MISSING:
                out[..., tz, ty, tx] = 0
                continue
            if offset + count > self.file.size:  # before memory is taken for it
                raise DamagedShard(f"{self.name}: chunk {(i, j, k)} lies behind the file's end")
            packed = np.frombuffer(os.pread(self.file.number, count, offset), np.uint8)
            whole = len(packed) == count
            if self.sums is not None:
                expected = int(self.sums[i, j, k])
            else:
                packed, expected = packed[:-4], int.from_bytes(packed[-4:].tobytes(), "little")
            if not whole or crc32c(packed) != expected:
                raise DamagedShard(f"{self.name}: checksum of chunk {(i, j, k)}")
            if told(packed) != (piece.nbytes, len(packed)):  # or old memory would show in the rest
                raise DamagedShard(f"{self.name}: chunk {(i, j, k)} holds another number of bytes")
            blosc.decompress(packed, piece)
            out[..., tz, ty, tx] = piece[..., fz, fy, fx]
        return out

    def fill(
        self,
        start: tuple[int, int, int],
        size: list[int],
        out: np.ndarray,
        scale: float,
    ) -> None:
        """As `read`, into `out` (*lead, *size): float32 (integers times `scale`), or the stored
        type as it is."""
        found = self.read(start, size)
        if out.dtype != found.dtype and found.dtype.kind in "iu":
            np.multiply(found, np.float32(scale), out=out, dtype=np.float32)
        else:
            np.copyto(out, found)

    def _announce(self, entries: list[list[int]]) -> None:
        """Let the kernel fetch all chunks at once: twice as fast from a cold disk, 4 % slower from
        memory (Linux)."""
        if hasattr(os, "posix_fadvise") and len(entries) > 1:
            for offset, count in entries:
                if offset != MISSING:
                    os.posix_fadvise(self.file.number, offset, count, os.POSIX_FADV_WILLNEED)


def _overlaps(start: int, stop: int, chunk: int) -> list[tuple[int, slice, slice]]:
    """Along one axis, of every chunk that [start, stop) touches: its number, the part of it that is
    wanted, where that goes."""
    found = []
    for number in range(start // chunk, -(-stop // chunk)):
        origin = number * chunk
        low, high = max(start, origin), min(stop, origin + chunk)
        found.append((number, slice(low - origin, high - origin), slice(low - start, high - start)))
    return found
