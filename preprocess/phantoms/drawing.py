"""What synthetic data sets are drawn from: ellipsoids in volumes, blots in pictures, and files with
the same bytes every time."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from segfleet.core.errors import InputError

ORIGIN = (-20.0, 15.0, 7.5)  # mm, of every volume


def blobs(
    generator: np.random.Generator, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """image (Z, Y, X) float64, 0 in a margin of one voxel, and label (Z, Y, X) uint8: a shell 1
    around a core 2."""
    grid = np.indices(shape).astype(np.float64)
    extent = np.array(shape, np.float64)
    centre = extent / 2 + generator.uniform(-0.08, 0.08, 3) * extent
    radii = extent * generator.uniform(0.22, 0.32, 3)
    inner = centre + generator.uniform(-0.2, 0.2, 3) * radii
    column = (slice(None), None, None, None)
    shell = (((grid - centre[column]) / radii[column]) ** 2).sum(0) < 1
    core = (((grid - inner[column]) / (0.5 * radii)[column]) ** 2).sum(0) < 1
    label = np.where(core, 2, np.where(shell, 1, 0)).astype(np.uint8)
    image = 1.0 + 0.8 * shell + 0.9 * core
    image = ndimage.gaussian_filter(image, (0.4, 0.8, 0.8))
    slope = generator.uniform(-0.15, 0.15, 3) / extent
    bias = 1 + (slope[column] * (grid - extent[column] / 2)).sum(0)
    image = np.maximum(image * bias + generator.normal(0, 0.12, shape), 0.01)
    inside = np.zeros(shape, bool)
    inside[tuple(slice(1, n - 1) for n in shape)] = True
    return np.where(inside, image, 0.0), label


def blot(
    generator: np.random.Generator,
    shape: tuple[int, int],
    ground: Sequence[int],
    ink: Sequence[int],
    spots: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) uint8 of `spots` uneven ellipses of colour `ink` on `ground`, and their
    numbers (H, W) uint8, 0 outside.

    Spots lie side by side in strips of the picture, so that they never touch.
    """
    height, width = shape
    y, x = np.indices(shape)
    numbers = np.zeros(shape, np.uint8)
    strip = width / max(1, spots)
    for spot in range(spots):
        centre = (
            height * generator.uniform(0.4, 0.6),
            strip * (spot + generator.uniform(0.45, 0.55)),
        )
        radii = (height * generator.uniform(0.18, 0.3), strip * generator.uniform(0.2, 0.32))
        angle = np.arctan2((y - centre[0]) / radii[0], (x - centre[1]) / radii[1])
        edge = 1 + 0.12 * np.sin(3 * angle + generator.uniform(0, 6))
        numbers[((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < edge] = (
            spot + 1
        )
    picture = np.where(
        numbers[..., None] > 0, np.array(ink, np.float64), np.array(ground, np.float64)
    )
    picture = ndimage.gaussian_filter(picture, (1, 1, 0)) + generator.normal(0, 8, (*shape, 3))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), numbers


def write_picture(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    """An 8-bit picture in the format of the file's ending; `mode` as Pillow names it ("1", "L",
    "RGB", "RGBA")."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    picture = picture.convert(mode) if mode else picture
    picture.save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))


def write_nifti(path: Path, array_ZYX: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """A NIfTI file, packed if its name says so; spacing (z, y, x) in mm."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = ORIGIN
    data = nib.Nifti1Image(array_ZYX.T, affine).to_bytes()
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def junk(*folders: Path) -> None:
    """What macOS and Windows leave behind in archives."""
    for folder in folders:
        (folder / "._picture.png").write_bytes(b"\0\5\x16\7junk of another system")
        (folder / "Thumbs.db").write_bytes(b"junk of another system")
        (folder / ".DS_Store").write_bytes(b"junk of another system")


def fresh(root: str | Path) -> Path:
    """An empty folder. Raises InputError rather than mixing with what is there."""
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"phantom: {root} is not an empty folder. Choose another.")
    root.mkdir(parents=True, exist_ok=True)
    return root
