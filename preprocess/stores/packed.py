"""Chunks packed by blosc, or as bare Zstandard frames, each with a CRC-32C: what the data of both
store formats are made of, however a format finds them in its file.

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
from numcodecs import blosc, zstd

blosc.set_nthreads(1)  # loaders bring their own processes

HEADER = 16  # bytes of a blosc chunk's
FRAME = b"\x28\xb5\x2f\xfd"  # a Zstandard frame begins with it
MISSING = 2**64 - 1  # offset of a chunk of zeros: it is left out
FILTERS = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class DamagedShard(Exception):
    """Stored bytes are not what was written."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a chunk becomes bytes: by `codec` inside blosc after `filter`, or with `filter` None as a
    Zstandard frame."""

    codec: str
    level: int
    filter: str | None = None

    def pack(self, piece: np.ndarray) -> bytes:
        if self.filter is None:
            return zstd.compress(piece, self.level)
        return blosc.compress(piece, self.codec.encode(), self.level, FILTERS[self.filter])


# Measured: lz4hc decodes at least as fast as lz4 and packs 5 to 15 % better, at 60 to 150 MB/s of
# writing. Bitshuffle packs integers 15 % better still, but halves the speed. zstd packs labels as
# well as lz4hc does without a filter, and decodes them four times slower.
# A store's codec -> packing of its images, and of labels and truths. Bare frames can be unpacked
# where there is no blosc, on a GPU for one.
CODECS = {
    "blosc": (
        Packing(codec="lz4hc", level=5, filter="shuffle"),
        Packing(codec="lz4hc", level=9, filter="noshuffle"),
    ),
    "zstd": (Packing(codec="zstd", level=3), Packing(codec="zstd", level=9)),
}


def packing_of(codec: str, name: str) -> Packing:
    """Of array `name` (image | label | truth) in a store of `codec`."""
    return CODECS[codec][name != "image"]


def crc32c(data: bytes | np.ndarray) -> int:
    return google_crc32c.value(data)


def unpack_into(piece: np.ndarray, packed: np.ndarray, codec: str) -> bool:
    """Decode a chunk; False, and maybe something else in `piece`, if it is none of so many
    bytes."""
    held = _frame_holds(packed) if codec == "zstd" else _blosc_holds(packed)
    if held != piece.nbytes:  # or old memory would show in the rest
        return False
    try:
        (zstd if codec == "zstd" else blosc).decompress(packed, piece)
    except (RuntimeError, ValueError):
        return False
    return True


def _blosc_holds(packed: np.ndarray) -> int:
    """Bytes that a blosc chunk unpacks to, by its header; -1 of what is none."""
    if len(packed) < HEADER:
        return -1
    sizes = packed[4:HEADER].view("<u4")
    return int(sizes[0]) if int(sizes[2]) == len(packed) else -1


def _frame_holds(packed: np.ndarray) -> int:
    """The same of a Zstandard frame (RFC 8878, 3.1.1.1), which need not say it: then -1 too."""
    head = packed[:18].tobytes()
    if len(head) < 6 or head[:4] != FRAME:
        return -1
    single, size = head[4] & 32, (0, 2, 4, 8)[head[4] >> 6] or (1 if head[4] & 32 else 0)
    at = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    if not size or at + size > len(head):
        return -1
    return int.from_bytes(head[at : at + size], "little") + (256 if size == 2 else 0)


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
        status = os.fstat(self.number)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedShard(f"{path.name} is no file")
        self.size = status.st_size

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


@dataclass(frozen=True, kw_only=True)
class PackedArray:
    """Random access to an array (*lead, z, y, x) whose `chunk`s (z, y, x) lie somewhere in `file`.
    Safe in threads.

    index: (chunks along z, y, x; 2), offset and bytes of every chunk, uint64. sums: the CRC-32C of
    every chunk, uint32; None: it is the chunk's last four bytes, little-endian. codec: blosc or
    zstd.
    """

    file: OpenFile
    name: str
    lead: tuple[int, ...]
    chunk: tuple[int, int, int]
    dtype: np.dtype
    index: np.ndarray
    sums: np.ndarray | None = None
    codec: str = "blosc"

    def read(self, start: tuple[int, int, int], size: list[int]) -> np.ndarray:
        """The box of `size` voxels from `start` on; the chunks it touches are read, checked and
        decoded. Raises DamagedShard, OSError."""
        out = np.empty((*self.lead, *size), self.dtype)
        axes = [_overlaps(s, s + n, c) for s, n, c in zip(start, size, self.chunk, strict=True)]
        touched = tuple(slice(axis[0][0], axis[-1][0] + 1) for axis in axes)
        entries = self.index[touched].reshape(-1, 2).tolist()
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
            if not unpack_into(piece, packed, self.codec):
                raise DamagedShard(f"{self.name}: chunk {(i, j, k)} holds another number of bytes")
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
        box = self.read(start, size)
        if out.dtype != box.dtype and box.dtype.kind in "iu":
            np.multiply(box, np.float32(scale), out=out, dtype=np.float32)
        else:
            np.copyto(out, box)

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
    overlaps = []
    for number in range(start // chunk, -(-stop // chunk)):
        origin = number * chunk
        low, high = max(start, origin), min(stop, origin + chunk)
        overlaps.append(
            (number, slice(low - origin, high - origin), slice(low - start, high - start))
        )
    return overlaps
