"""Writing one shard so that it is there completely or not at all: what every store format
shares."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts, sync_folder
from segfleet.preprocess.stores.content import content_sha256


class ShardWriter:
    """A `ShardWriter` (preprocess.stores.base). A format gives `suffix`, `_begin`, `_write`,
    `_finish` and `_drop`.

    `shard` is a path inside the store without suffix, `chunk` the inner chunk (z, y, x) in voxels,
    `dtype` that of the stored images, `codec` blosc or zstd. Everything goes to a `.partial`
    sibling, which `publish` renames. Whatever goes wrong, a full disk included, removes it and is
    raised.
    """

    suffix: str

    def __init__(
        self,
        root: Path,
        shard: str,
        *,
        chunk: tuple[int, int, int],
        dtype: str,
        codec: str = "blosc",
    ):
        self.root, self.chunk, self.dtype = Path(root), chunk, np.dtype(dtype)
        self.codec = codec
        self.final = self.root / (shard.removesuffix(self.suffix) + self.suffix)
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.keys: set[str] = set()
        self.files: dict[str, dict] | None = None
        self.final.parent.mkdir(parents=True, exist_ok=True)
        _remove(self.partial)  # of a process that was killed: there is one writer per shard
        with self._all_or_nothing():
            self._begin()

    def write(
        self, key: str, image: np.ndarray, label: np.ndarray, truth: np.ndarray | None
    ) -> str:
        """Add a case: image (C, Z, Y, X) of the stored dtype, label (Z, Y, X) uint8, truth uint8 on
        the raw grid. Its `content_sha256`, which the shard keeps: so it knows whose it is."""
        with self._all_or_nothing():
            _check(key, image, label, truth, self.dtype)
            if key in self.keys or self.files is not None:
                raise ValueError(
                    f"case '{key}': it is in shard {self.final.name} already, or the shard is "
                    "published"
                )
            sha256 = content_sha256(image, label)
            self._write(key, image, label, truth, sha256)
            self.keys.add(key)
        return sha256

    def publish(self) -> dict[str, dict]:
        """Flush, fsync, rename. Returns {path inside the store: {"bytes", "sha256"}}; a second call
        returns the same."""
        if self.files is None:
            with self._all_or_nothing():
                if not self.keys:
                    raise ValueError(f"shard {self.final.name}: no case was written")
                self._finish()
                files = {
                    path.relative_to(self.partial): file_facts(path) for path in _sync(self.partial)
                }
                _replace(self.partial, self.final)
            self.files = {
                (self.final / path).relative_to(self.root).as_posix(): record
                for path, record in sorted(files.items())
            }
        return self.files

    def abandon(self) -> None:
        """Remove everything written so far. After `publish` this does nothing."""
        self._drop()
        _remove(self.partial)

    @contextmanager
    def _all_or_nothing(self):
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def _begin(self) -> None:
        raise NotImplementedError

    def _write(
        self,
        key: str,
        image: np.ndarray,
        label: np.ndarray,
        truth: np.ndarray | None,
        sha256: str,
    ) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Complete and close the files in `partial`; syncing them is done by the caller."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Close files without complaint."""
        raise NotImplementedError


def _check(
    key: str, image: np.ndarray, label: np.ndarray, truth: np.ndarray | None, dtype: np.dtype
) -> None:
    """Raises TypeError for a programmer's mistake, InputError for values no network can train
    on."""
    if (
        image.dtype != dtype
        or label.dtype != np.uint8
        or (truth is not None and truth.dtype != np.uint8)
    ):
        found = f"{image.dtype} and {label.dtype}" + (
            f" and {truth.dtype}" if truth is not None else ""
        )
        raise TypeError(f"case '{key}': image and labels are {found}, expected {dtype} and uint8")
    if image.ndim != 4 or image.shape[1:] != label.shape or (truth is not None and truth.ndim != 3):
        raise TypeError(
            f"case '{key}': image {image.shape} and label {label.shape}, expected (C, Z, Y, X) "
            "and (Z, Y, X)"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(
            f"case '{key}': image: found voxels that are nan or beyond {dtype}, expected finite "
            "ones. Correct the raw image."
        )


def _sync(path: Path) -> list[Path]:
    """fsync a file, or every file and folder below a folder; the files."""
    if path.is_dir():
        files = [file for child in sorted(path.iterdir()) for file in _sync(child)]
        sync_folder(path)
        return files
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return [path]


def _replace(partial: Path, final: Path) -> None:
    """Rename, in the place of an earlier shard if there is one. A folder cannot be renamed onto a
    full one, so that goes aside first."""
    aside = final.with_name(final.name + ".old.partial")
    _remove(aside)
    if final.is_dir():
        os.rename(final, aside)
    os.replace(partial, final)
    sync_folder(final.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
