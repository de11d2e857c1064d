"""Reading published shards: what every store format shares. A format adds how one shard is opened
and decoded."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from segfleet.core.errors import InputError
from segfleet.preprocess.stores.case_entry import RESTORE
from segfleet.preprocess.stores.manifest import CaseEntry, Manifest
from segfleet.preprocess.stores.packed import DamagedShard, PackedArray

OPEN_SHARDS = 64  # per process; a shard holds at most three file handles
Box = tuple[slice, slice, slice]
BLOCK = 2**15  # voxels converted at a time: they stay in the cache between the passes


class OpenShard(Protocol):
    """One published shard, open for reading."""

    def shape_and_dtype(self, key: str, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and stored dtype of array `name` (image | label | truth) of case `key`. Raises
        DamagedShard if there is none."""
        ...

    def owner(self, key: str) -> str:
        """The content's sha256 that was written with case `key`; empty if there is none."""
        ...

    def packed(self, key: str, name: str) -> tuple[PackedArray, int]:
        """The array and the slice of it where the case begins. Raises DamagedShard."""
        ...


class Handles:
    """The shards this process holds open, the least recently used dropped first. Empty after
    pickling and after a fork."""

    def __init__(self, limit: int = OPEN_SHARDS):
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        # A shard closes its files when the last reader lets go of it, so another thread may be in
        # the middle of one.
        self.process, self.lock, self.open = os.getpid(), threading.Lock(), OrderedDict()

    def get(self, path: Path, opener: Callable[[Path], OpenShard]) -> OpenShard:
        if self.process != os.getpid():
            self.clear()
        with self.lock:
            shard = self.open.pop(path, None) or opener(path)
            self.open[path] = shard
            while len(self.open) > self.limit:
                self.open.popitem(last=False)
        return shard

    def __reduce__(self):
        return Handles, (self.limit,)


class ShardReader:
    """A `ShardStore` (preprocess.stores.base) of the format whose shards end in `suffix`; it says
    how to `open_shard`."""

    suffix: str
    # How a box gets into an array; a loader puts its compiled pass here.
    fill: Callable[..., None] = staticmethod(PackedArray.fill)

    def __init__(self, root: Path, manifest: Manifest):
        self.root, self.manifest = Path(root), manifest
        self.handles = Handles()

    def path(self, case: CaseEntry) -> Path:
        """The file or folder the case lies in."""
        return self.root / (case.shard.removesuffix(self.suffix) + self.suffix)

    def open_shard(self, path: Path) -> OpenShard:
        """Raises FileNotFoundError, DamagedShard."""
        raise NotImplementedError

    def image(
        self, case: CaseEntry, box: Box | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        if out is None:
            return to_float32(self._read(case, "image", box), self.manifest.plan.scale)
        return self._read(case, "image", box, out)

    def stored_image(self, case: CaseEntry) -> np.ndarray:
        return self._read(case, "image", None)

    def label(
        self, case: CaseEntry, box: Box | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        return self._read(case, "label", box, out)

    def truth(self, case: CaseEntry) -> np.ndarray:
        if not case.has_truth:
            raise InputError(
                f"store: case '{case.id}' has no label on its raw grid, so it cannot be scored."
            )
        return self._read(case, "truth", None)

    def stored(self, case: CaseEntry) -> tuple[np.ndarray, np.ndarray]:
        """Image (C, Z, Y, X) and label (Z, Y, X) as they lie on disk, unscaled: what
        `content_sha256` is taken of."""
        return self._read(case, "image", None), self._read(case, "label", None)

    def close(self) -> None:
        self.handles.clear()

    def _read(
        self, case: CaseEntry, name: str, box: Box | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        path = self.path(case)
        where = f"store: case '{case.id}': shard {case.shard}"
        try:
            shard = self.handles.get(path, self.open_shard)
            shape, dtype = shard.shape_and_dtype(case.key, name)
            if shard.owner(case.key) != case.sha256:
                raise DamagedShard("it holds the data of another case or of another store")
            expected = case.raw_shape if name == "truth" else case.shape
            if tuple(shape[-3:]) != tuple(expected):
                raise DamagedShard(f"{name}: shape {shape}, the manifest says {expected}")
            kind = np.dtype(self.manifest.plan.dtype if name == "image" else np.uint8)
            lead = (len(self.manifest.plan.normalisation),) if name == "image" else ()
            if dtype.newbyteorder("=") != kind or tuple(shape[:-3]) != lead:
                raise DamagedShard(f"{name}: {dtype} of shape {shape}, expected {kind}")
            return self._read_box(*shard.packed(case.key, name), expected, box, out)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{where} is missing ({error.filename or path}). {RESTORE}") from None
        except PermissionError as error:
            raise InputError(f"{where} may not be read ({error}). Change its rights.") from None
        except DamagedShard as error:
            raise InputError(f"{where} is damaged ({error}; {path}). {RESTORE}") from None

    def _read_box(
        self,
        array: PackedArray,
        first: int,
        grid: tuple[int, int, int],
        box: Box | None,
        out: np.ndarray | None,
    ) -> np.ndarray:
        box = box or (slice(None),) * 3
        begin = [0 if s.start is None else int(s.start) for s in box]
        end = [n if s.stop is None else int(s.stop) for s, n in zip(box, grid, strict=True)]
        size = [max(0, e - b) for b, e in zip(begin, end, strict=True)]
        low = [max(0, b) for b in begin]
        held = [min(e, n) - l for e, n, l in zip(end, grid, low, strict=True)]
        start, inside = (first + low[0], *low[1:]), held == size and min(size) > 0
        if out is None:
            if inside:
                return array.read(start, size)
            out = np.empty((*array.lead, *size), array.dtype)
        if not inside:
            out[...] = 0
        if min(held) > 0:
            place = tuple(slice(l - b, l - b + h) for l, b, h in zip(low, begin, held, strict=True))
            self.fill(array, start, held, out[(..., *place)], self.manifest.plan.scale)
        return out


def to_float32(stored: np.ndarray, scale: float) -> np.ndarray:
    """Integers times `scale`, floats as they are; C-contiguous float32. Stored floats are
    finite."""
    if stored.dtype == np.float32:
        return stored
    if stored.dtype != np.float16:
        out = stored.astype(np.float32)
        if scale != 1:
            out *= np.float32(scale)
        return out
    out = np.empty(stored.shape, np.float32)
    # numpy converts halves one by one; shifting the bits into place and raising the exponent by 127
    # - 15 is exact and six times as fast.
    halves, floats = stored.reshape(-1).view(np.int16), out.reshape(-1)
    bits = floats.view(np.int32)
    for at in range(0, len(halves), BLOCK):
        b = bits[at : at + BLOCK]
        np.copyto(b, halves[at : at + BLOCK])
        np.left_shift(b, 13, out=b)
        np.bitwise_and(b, np.int32(-0x70002000), out=b)
        f = floats[at : at + BLOCK]
        np.multiply(f, np.float32(2.0**112), out=f)
    return out
