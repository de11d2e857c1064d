"""HDF5 shards: a file `<shard>.h5` with one group per case, holding image, label and, where there is one, truth.

Chunked, every chunk with a Fletcher32 checksum, the file's own structures with theirs (format of HDF5 1.10). Images are not compressed: of
the filters every HDF5 has, gzip and lzf cost five times the reading time. Labels are gzip-1. Chunks of zeros are left out.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import h5py
import numpy as np

from segfleet.preprocess.shard_reader import DamagedShard, ShardReader
from segfleet.preprocess.shard_writer import ShardWriter

SUFFIX = ".h5"
FORMAT = ("v110", "v110")  # the first with checksums on everything
OPEN_ARRAYS = 256  # per file; opening one takes 0.1 ms
END_ADDRESS = 28  # where a superblock of version 3 says how long the file is (HDF5 file format specification, II.A)
SLACK = 2**14  # bytes of structures per array, generously


class Shard:
    """One published file."""

    def __init__(self, path: Path):
        path.stat()  # FileNotFoundError with its name; h5py gives a text of its own
        with damage_named():
            self.file = _open(path)
        self.arrays: dict[tuple[str, str], h5py.Dataset] = {}

    def facts(self, key: str, name: str) -> tuple[tuple[int, ...], np.dtype]:
        array = self._array(key, name)
        return array.shape, array.dtype

    def read(self, key: str, name: str, start: list[int], size: list[int]) -> np.ndarray:
        with damage_named(name):
            return self._array(key, name)[(..., *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]

    def _array(self, key: str, name: str) -> h5py.Dataset:
        if (found := self.arrays.get((key, name))) is None:
            if len(self.arrays) >= OPEN_ARRAYS:
                self.arrays.clear()
            with damage_named(name):
                found = self.arrays[key, name] = self.file[f"{key}/{name}"]
        return found


def _even(chunk: int, length: int) -> int:
    """As many chunks along an axis, all alike: uncompressed, a chunk that is half outside takes its full room."""
    return -(-length // -(-length // chunk))


def _room(array: np.ndarray, chunk: tuple[int, ...]) -> int:
    """Bytes `array` may take: full chunks, each with its checksum and its place in the index, and the structures around them."""
    count = math.prod(-(-n // c) for n, c in zip(array.shape, chunk, strict=True))
    return count * (math.prod(chunk) * array.itemsize + 64) + SLACK


def _open(path: Path) -> h5py.File:
    """Without locks: published files never change, and NFS or Lustre may refuse them. A patch meets a chunk once: no cache of chunks."""
    try:
        return h5py.File(path, "r", rdcc_nbytes=0, locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r", rdcc_nbytes=0)  # this process has the file open already, with locks: HDF5 wants the same again


class Store(ShardReader):
    suffix = SUFFIX

    def open_shard(self, path: Path) -> Shard:
        return Shard(path)


class Writer(ShardWriter):
    suffix = SUFFIX

    def _begin(self) -> None:
        with h5py.File("empty", "w", driver="core", backing_store=False, libver=FORMAT) as empty:
            empty.flush()
            self.partial.write_bytes(empty.id.get_file_image())  # not by HDF5, for the reason given in `_reserve`
        self.file = h5py.File(self.partial, "r+", libver=FORMAT, locking=False)

    def _write(self, key: str, image: np.ndarray, label: np.ndarray, truth: np.ndarray | None) -> None:
        arrays = {"image": image, "label": label} | ({} if truth is None else {"truth": truth})
        chunks = {name: (*a.shape[:-3], *map(_even, self.chunk, a.shape[-3:])) for name, a in arrays.items()}
        self._reserve(sum(_room(array, chunks[name]) for name, array in arrays.items()))
        group = self.file.create_group(key)
        for name, array in arrays.items():
            chunk, packing = chunks[name], {} if name == "image" else {"compression": "gzip", "compression_opts": 1}
            target = group.create_dataset(name, array.shape, array.dtype.newbyteorder("<"), chunks=chunk, fletcher32=True, **packing)
            for at in product(*(range(0, n, c) for n, c in zip(array.shape, chunk, strict=True))):
                box = tuple(slice(a, min(a + c, n)) for a, c, n in zip(at, chunk, array.shape, strict=True))
                part = np.ascontiguousarray(array[box])
                if part.reshape(-1).view(np.uint8).any():
                    target[box] = part
        self.file.flush()

    def _reserve(self, size: int) -> None:
        """Make sure that `size` bytes more fit. Raises OSError. HDF5 that meets a full disk cannot close the file and may crash."""
        if hasattr(os, "posix_fallocate"):
            with open(self.partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), self.file.id.get_filesize(), size)
        elif shutil.disk_usage(self.partial.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.partial))

    def _finish(self) -> None:
        self.file.close()
        with open(self.partial, "r+b") as file:  # without what was reserved and not used
            file.seek(END_ADDRESS)
            file.truncate(int.from_bytes(file.read(8), "little"))

    def _drop(self) -> None:
        if hasattr(self, "file"):
            with suppress(Exception):
                self.file.close()


@contextmanager
def damage_named(name: str = "file"):
    """h5py says with many exceptions that a checksum or a structure is wrong; errors of the machine keep their number."""
    try:
        yield
    except OSError as error:
        if error.errno:
            raise
        raise DamagedShard(f"{name}: {error}") from None
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise DamagedShard(f"{name}: {error}") from None
