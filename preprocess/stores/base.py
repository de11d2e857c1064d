"""What every store format can do. A format is one file `preprocess/stores/<name>.py` with a class
`Store`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from segfleet.core.errors import check_one_of, import_part
from segfleet.preprocess.stores.manifest import CaseEntry, Manifest, load_manifest

Box = tuple[slice, slice, slice]  # (z, y, x), in voxels of the stored grid; may reach outside it


class ShardStore(Protocol):
    """Read access to a published store. Open it lazily in every process; it is picklable (handles
    are dropped)."""

    root: Path
    manifest: Manifest
    fill: Callable[..., None]  # how voxels come out of a packed array, `PackedArray.fill`

    def image(
        self, case: CaseEntry, box: Box | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(C, Z, Y, X) float32 (stored integers times plan.scale). Outside the grid: 0. None: the
        whole case. `out`: an array of that shape and type, or of the stored one (then unscaled),
        which is filled and returned."""
        ...

    def stored_image(self, case: CaseEntry) -> np.ndarray:
        """(C, Z, Y, X), the whole case in the plan's type; integers are to be multiplied by
        plan.scale."""
        ...

    def label(
        self, case: CaseEntry, box: Box | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(Z, Y, X) uint8. Outside the grid: 0, so pad voxels are background. `out` as above."""
        ...

    def truth(self, case: CaseEntry) -> np.ndarray:
        """(Z, Y, X) uint8, the label on the *raw* grid of the whole uncropped case: what scores are
        computed against."""
        ...

    def close(self) -> None: ...


class ShardWriter(Protocol):
    """Writes finished cases into a shard that does not exist until `publish` renames it. One writer
    per shard."""

    def write(
        self, key: str, image: np.ndarray, label: np.ndarray, truth: np.ndarray | None
    ) -> str: ...

    def publish(self) -> dict[str, dict]:
        """Flush, fsync, rename; the files that appeared: {path inside the store: {"bytes",
        "sha256"}}."""
        ...

    def abandon(self) -> None:
        """Remove everything written so far."""
        ...


SHARED = (
    "base",
    "case_entry",
    "case_table",
    "chunks",
    "columns",
    "content",
    "manifest",
    "packed",
    "shard_reader",
    "shard_writer",
    "staged_copy",
    "verify",
    "zarr_array",
)


def formats() -> list[str]:
    import segfleet.preprocess.stores as room

    return sorted(m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in SHARED)


def store_module(name: str):
    """The module of a format. Raises InputError with the legal names."""
    check_one_of("format", name, formats())
    return import_part(f"segfleet.preprocess.stores.{name}", "store format")


def open_store(root: str | Path) -> ShardStore:
    """Open the published store in `root`, whatever its format. Raises InputError."""
    manifest = load_manifest(Path(root))
    return store_module(manifest.format).Store(Path(root), manifest)
