"""HDF5 shards: a file `<shard>.h5` with one group per case, holding image, label and, where there
is one, truth.

Chunked and packed by Blosc or Zstandard, filters 32001 and 32015 of the HDF Group's register, so
`import hdf5plugin` lets h5py and every tool upon it read them: of the filters every HDF5 has, gzip
and lzf take five times as long to read. The attribute `crc32c` of an array holds the checksums of
its chunks; the file's own structures have theirs (format of HDF5 1.10). Chunks of zeros are left
out. HDF5 finds the chunks, preprocess.packed reads them.
"""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

from segfleet.preprocess.stores.packed import (
    MISSING,
    DamagedShard,
    OpenFile,
    PackedArray,
    Packing,
    crc32c,
    packing_of,
    pieces,
)
from segfleet.preprocess.stores.shard_reader import ShardReader
from segfleet.preprocess.stores.shard_writer import ShardWriter

SUFFIX = ".h5"
FORMAT = ("v110", "v110")  # the first with checksums on everything
SUMS = "crc32c"
OWNER = "sha256"  # of a case's content
# where a superblock of version 3 says how long the file is (HDF5 file format specification, II.A)
END_ADDRESS = 28
SLACK = 2**14  # bytes of structures per array, generously
# What the filter's values mean: https://github.com/Blosc/hdf5-blosc, src/blosc_filter.c
BLOSC, BLOSC_VERSIONS = 32001, (2, 2)
ZSTD = 32015  # its one value is the level
FILTERS = {BLOSC: "blosc", ZSTD: "zstd"}
BLOSC_CODECS, BLOSC_SHUFFLES = (
    {"lz4": 1, "lz4hc": 2, "zstd": 5},
    {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2},
)


class Shard:
    """One published file, its arrays' chunks looked up when they are first read."""

    def __init__(self, path: Path):
        self.data = OpenFile(path)  # FileNotFoundError with its name; h5py gives a text of its own
        with damage_named():
            self.file = _open(path)
        self.owners: dict[str, str] = {}
        self.arrays: dict[tuple[str, str], tuple[tuple[int, ...], PackedArray]] = {}

    def shape_and_dtype(self, key: str, name: str) -> tuple[tuple[int, ...], np.dtype]:
        shape, array = self._array(key, name)
        return shape, array.dtype

    def owner(self, key: str) -> str:
        if key not in self.owners:
            with damage_named(key):
                self.owners[key] = str(self.file[key].attrs[OWNER])
        return self.owners[key]

    def packed(self, key: str, name: str) -> tuple[PackedArray, int]:
        return self._array(key, name)[1], 0

    def _array(self, key: str, name: str) -> tuple[tuple[int, ...], PackedArray]:
        if (packed := self.arrays.get((key, name))) is None:
            with damage_named(name):
                array = _inside(self.file, f"{key}/{name}")
                packed = self.arrays[key, name] = self._look_up(array, name)
        return packed

    def _look_up(self, array: h5py.Dataset, name: str) -> tuple[tuple[int, ...], PackedArray]:
        packing = array.id.get_create_plist()
        filters = [packing.get_filter(i)[0] for i in range(packing.get_nfilters())]
        if filters not in ([BLOSC], [ZSTD]):
            raise DamagedShard(
                f"{name}: filters {filters}, expected [{BLOSC}], Blosc, or [{ZSTD}], Zstandard"
            )
        *lead, z, y, x = array.chunks
        checksums = array.attrs.get_id(SUMS)
        if 4 * math.prod(_chunks(array.shape, (z, y, x))) != checksums.get_storage_size():
            raise DamagedShard(f"{name}: another number of chunks than of checksums")
        if checksums.get_storage_size() > self.data.size:  # before memory is taken for it
            raise DamagedShard(f"{name}: more checksums than the file is long")
        index = np.full((*_chunks(array.shape, (z, y, x)), 2), MISSING, np.uint64)
        array.id.chunk_iter(
            lambda at: index.__setitem__(
                _place(at.chunk_offset, (z, y, x)), (at.byte_offset, at.size)
            )
        )
        sums = np.ascontiguousarray(array.attrs[SUMS], np.uint32).reshape(index.shape[:-1])
        packed = PackedArray(
            file=self.data,
            name=name,
            lead=tuple(lead),
            chunk=(z, y, x),
            dtype=array.dtype,
            index=index,
            sums=sums,
            codec=FILTERS[filters[0]],
        )
        return array.shape, packed


def _inside(file: h5py.File, path: str) -> h5py.Dataset:
    """What lies at `path` in this file. A link to another one is none of ours: that may be a pipe,
    or private."""
    item = file
    for name in path.split("/"):
        if item.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise DamagedShard(f"{path}: a link")
        item = item[name]
    return item


def _chunks(shape: tuple[int, ...], chunk: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many along z, y, x."""
    return tuple(-(-n // c) for n, c in zip(shape[-3:], chunk, strict=True))


def _place(offset: tuple[int, ...], chunk: tuple[int, int, int]) -> tuple[int, int, int]:
    """In the grid of chunks, of the chunk whose first voxel is `offset`."""
    return tuple(o // c for o, c in zip(offset[-3:], chunk, strict=True))


def _even(chunk: int, length: int) -> int:
    """As many chunks along an axis, all alike: no chunk is longer than the axis, and none half
    empty."""
    return -(-length // -(-length // chunk))


def _room(array: np.ndarray, chunk: tuple[int, int, int]) -> int:
    """Bytes `array` may take: full chunks that do not pack, each with its checksum and its place in
    the index, structures around them."""
    count = math.prod(_chunks(array.shape, chunk))
    return count * (math.prod((*array.shape[:-3], *chunk)) * array.itemsize + 64) + SLACK


def _open(path: Path) -> h5py.File:
    """Without locks: published files never change, and NFS or Lustre may refuse them."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        # this process has the file open already, with locks: HDF5 wants the same again
        return h5py.File(path, "r")


class Store(ShardReader):
    suffix = SUFFIX

    def open_shard(self, path: Path) -> Shard:
        return Shard(path)


class Writer(ShardWriter):
    suffix = SUFFIX

    def _begin(self) -> None:
        empty = io.BytesIO()
        with h5py.File(empty, "w", libver=FORMAT):
            pass
        # Not written by HDF5, for the reason given in `_reserve`.
        self.partial.write_bytes(empty.getvalue())
        self.file = h5py.File(self.partial, "r+", libver=FORMAT, locking=False)

    def _write(
        self,
        key: str,
        image: np.ndarray,
        label: np.ndarray,
        truth: np.ndarray | None,
        sha256: str,
    ) -> None:
        arrays = {"image": image, "label": label} | ({} if truth is None else {"truth": truth})
        chunks = {
            name: tuple(map(_even, self.chunk, array.shape[-3:])) for name, array in arrays.items()
        }
        self._reserve(sum(_room(array, chunks[name]) for name, array in arrays.items()))
        group = self.file.create_group(key)
        group.attrs[OWNER] = sha256
        for name, array in arrays.items():
            self._write_array(group, name, array, chunks[name], packing_of(self.codec, name))
        self.file.flush()

    def _write_array(
        self,
        group: h5py.Group,
        name: str,
        array: np.ndarray,
        chunk: tuple[int, int, int],
        packing: Packing,
    ) -> None:
        lead, dtype = array.shape[:-3], array.dtype.newbyteorder("<")
        size = math.prod((*lead, *chunk)) * dtype.itemsize
        number, how = ZSTD, (packing.level,)
        if packing.filter is not None:
            number, how = (
                BLOSC,
                (
                    *BLOSC_VERSIONS,
                    dtype.itemsize,
                    size,
                    packing.level,
                    BLOSC_SHUFFLES[packing.filter],
                    BLOSC_CODECS[packing.codec],
                ),
            )
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((*lead, *chunk))
        properties.set_obj_track_times(False)  # equal content gives equal bytes
        # optional: or HDF5 would want the plugin, which only others need
        properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, how)
        space, kind = h5py.h5s.create_simple(array.shape), h5py.h5t.py_create(dtype, logical=True)
        target = h5py.h5d.create(group.id, name.encode(), kind, space, properties)
        sums = np.zeros(_chunks(array.shape, chunk), "<u4")
        for at, piece in pieces(array, chunk, dtype):
            packed = packing.pack(piece)
            sums[at] = crc32c(packed)
            target.write_direct_chunk(
                (*(0 for _ in lead), *(i * c for i, c in zip(at, chunk, strict=True))), packed
            )
        group[name].attrs[SUMS] = sums.reshape(-1)

    def _reserve(self, size: int) -> None:
        """Make sure that `size` bytes more fit. Raises OSError. HDF5 that meets a full disk cannot
        close the file and may crash."""
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
    """h5py says with many exceptions that a checksum or a structure is wrong; errors of the machine
    keep their number."""
    try:
        yield
    except OSError as error:
        if error.errno:
            raise
        raise DamagedShard(f"{name}: {error}") from None
    except (LookupError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise DamagedShard(f"{name}: {error}") from None
