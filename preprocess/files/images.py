"""Single image files in and out of arrays: NIfTI, NRRD, MHA, TIFF, PNG, BMP, JPEG.

Arrays have axes (z, y, x), the reverse of the file order; a 2D image has one slice. Every file is
read whole before it is decoded, so that a truncated or damaged one is noticed (the checksum of a
gzip stream stands at its end) and hashed in passing.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.case import Geometry

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg")
NATURAL = (".png", ".bmp", ".jpg", ".jpeg")  # 2D, several channels in one file, no geometry
TOLERANCE = 1e-3  # of geometry: mm for spacing and affine
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world axes seen from NIfTI's, and back
BY_PILLOW = {  # compression of a TIFF -> colours -> bits
    **dict.fromkeys((2, 3, 4), {"MINISWHITE": (1,), "MINISBLACK": (1,)}),  # CCITT
    5: {"MINISWHITE": (1, 8), "MINISBLACK": (1, 8, 16), "PALETTE": (8,), "RGB": (8,)},  # LZW
    7: {"MINISBLACK": (8,), "RGB": (8,), "YCBCR": (8,)},  # JPEG
}


class ImageError(InputError):
    """A file cannot be used. `problem(case)` puts it into a table of problems."""

    def __init__(self, path: Path, field: str, found: str, expected: str, mend: str):
        self.path, self.facts = (
            Path(path),
            {"field": field, "found": found, "expected": expected, "mend": mend},
        )
        super().__init__(f"{path}: {field}: found {found}, expected {expected}. {mend}")

    def __reduce__(self):
        return ImageError, (self.path, *self.facts.values())

    def problem(self, case: str) -> Problem:
        return Problem(case=case, **self.facts)


def ending(path: Path) -> str:
    """The ending of a file name as this module knows it. Raises InputError with the legal ones."""
    name = Path(path).name.lower()
    for known in ENDINGS:
        if name.endswith(known):
            return known
    raise InputError(f"{path}: the file ending is none of: {', '.join(ENDINGS)}")


def stem(path: Path) -> str:
    return Path(path).name[: -len(ending(path))]


def read_image(paths: Sequence[Path], digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """Read the channels of one image. Raises ImageError.

    Args:
        paths: one file per channel, or one file that holds all of them (4D NIfTI, RGB).
        digest: a hashlib object that is fed the bytes of the files.

    Returns:
        image_CZYX in the file's integer type or float32, and the grid all channels lie on.
    """
    parts, first = [], None
    for path in paths:
        part, geometry = read_file(path, digest)
        if first is None:
            first = geometry
        elif difference := disagreement(geometry, first):
            field, found, expected = difference
            expected = f"{expected} as in {Path(paths[0]).name}"
            raise ImageError(
                path,
                f"{field} of channel {Path(path).name}",
                found,
                expected,
                "Put all channels on one grid.",
            )
        parts.append(part)
    if first is None:
        raise InputError("image: found no file to read")
    image = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return image, first


def read_label(path: Path, digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """label_ZYX as the file stores it (integers, or floats that ought to be), and its grid. Raises
    ImageError."""
    array, geometry = read_file(path, digest, label=True)
    if len(array) > 1 and all(np.array_equal(array[0], other) for other in array[1:]):
        array = array[:1]  # a grey mask saved as RGB
    if len(array) != 1:
        raise ImageError(
            path,
            "label channels",
            str(len(array)),
            "1",
            "Save the label as one channel of class numbers.",
        )
    return array[0], geometry


def read_file(
    path: Path, digest: Any = None, *, label: bool = False
) -> tuple[np.ndarray, Geometry]:
    """One file as (C, Z, Y, X). Raises ImageError; names the file whatever the decoder complains
    about."""
    path, kind = Path(path), ending(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        expected = "a readable file"
        raise ImageError(
            path,
            "file",
            f"{path.name}: {error.strerror or error}",
            expected,
            "Check the path and its permissions.",
        ) from None
    if digest is not None:
        digest.update(data)
    if not data:
        raise ImageError(
            path,
            "file",
            f"{path.name} with 0 bytes",
            "an image",
            "Copy or download the file again.",
        )
    try:
        if kind in (".nii", ".nii.gz"):
            array, geometry = _nifti(data, kind == ".nii.gz")
        elif kind in (".nrrd", ".mha"):
            array, geometry = _itk(path)
        elif kind in (".tif", ".tiff"):
            array, geometry = _tiff(data, path)
        else:
            array, geometry = _natural(data, label)
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything when a file is not what its name says
        found = f"{path.name} damaged or truncated ({_short(error)})"
        raise ImageError(
            path, "file", found, "a readable image", "Copy or download the file again."
        ) from None
    if not all(math.isfinite(s) and s > 0 for s in geometry.spacing):
        raise ImageError(
            path,
            "spacing",
            f"{geometry.spacing} in {path.name}",
            "positive numbers (mm)",
            "Mend the header.",
        )
    if array.dtype.kind not in "buif":
        raise ImageError(
            path,
            "voxel type",
            f"{array.dtype} in {path.name}",
            "integers or real numbers",
            "Convert the file.",
        )
    if not array.size:
        raise ImageError(
            path,
            "shape",
            f"{array.shape} in {path.name}",
            "at least one voxel",
            "Export the image again.",
        )
    return _plain(array), geometry


def peek(path: Path) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) from the header alone; zeros where the file cannot be read, which reading it
    then explains."""
    try:
        if path.suffix.lower() in (".npy", ".dcm"):
            return _peek_slice(path)
        kind = ending(path)
        if kind in (".nii", ".nii.gz"):
            import nibabel as nib

            with (gzip.open if kind == ".nii.gz" else open)(path, "rb") as file:
                start = file.read(352)
            header = nib.Nifti1Header.from_fileobj(io.BytesIO(start), check=False)
            return _czyx(header.get_data_shape())
        if kind in (".nrrd", ".mha"):
            import SimpleITK as sitk

            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            channels, _, *space = (reader.GetNumberOfComponents(), 0, *reader.GetSize())
            shape = _czyx(tuple(space))
            return (shape[0] * channels, *shape[1:])
        if kind in (".tif", ".tiff"):
            import tifffile

            with tifffile.TiffFile(path) as file:
                return _tiff_axes(file.series[0].shape, file.series[0].axes)[0]
        from PIL import Image

        with Image.open(path) as picture:
            width, height = picture.size
            return (
                3 if picture.mode in ("P", "CMYK") else len(picture.getbands()),
                1,
                height,
                width,
            )
    except Exception:
        return (0, 0, 0, 0)


def _peek_slice(path: Path) -> tuple[int, int, int, int]:
    """Of a file that some layouts read by themselves: an array H x W [x C], a DICOM slice."""
    if path.suffix.lower() == ".npy":
        height, width, *channels = np.load(path, mmap_mode="r", allow_pickle=False).shape
        return (math.prod(channels), 1, height, width)
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    width, height, *depth = reader.GetSize()
    return (1, math.prod(depth), height, width)


def disagreement(one: Geometry, other: Geometry) -> tuple[str, str, str] | None:
    """(field, found, expected) where the first grid differs from the second by more than the
    tolerance."""
    if one.shape != other.shape:
        return "shape", _times(one.shape), _times(other.shape)
    if not np.allclose(one.spacing, other.spacing, rtol=0, atol=TOLERANCE):
        return "spacing", f"{_numbers(one.spacing)} mm", f"{_numbers(other.spacing)} mm"
    if (
        one.affine is not None
        and other.affine is not None
        and not np.allclose(one.affine, other.affine, rtol=0, atol=TOLERANCE)
    ):
        here, there = np.asarray(one.affine), np.asarray(other.affine)
        row, column = np.unravel_index(np.abs(here - there).argmax(), here.shape)
        return "affine", f"[{row},{column}] = {here[row, column]:.6g}", f"{there[row, column]:.6g}"
    return None


def _nifti(data: bytes, packed: bool) -> tuple[np.ndarray, Geometry]:
    import nibabel as nib

    raw = gzip.decompress(data) if packed else data
    try:
        picture = nib.Nifti1Image.from_bytes(raw)
    except nib.filebasedimages.ImageFileError:
        picture = nib.Nifti2Image.from_bytes(raw)
    except nib.spatialimages.HeaderDataError as error:
        raise ValueError(str(error)) from None
    array = _voxels(picture.dataobj)
    shape = _czyx(array.shape)
    zooms = (*map(float, picture.header.get_zooms()[:3]), 1.0, 1.0)[:3]
    array = array.reshape(shape[::-1], order="F").T
    return array, Geometry(shape=shape[1:], spacing=zooms[::-1], affine=_rows(picture.affine))


def _voxels(data: Any) -> np.ndarray:
    """The array of a NIfTI file in the file's order. Slopes make it real numbers: eight bytes each,
    so that is done slice by slice."""
    if (data.slope, data.inter) == (1.0, 0.0) or len(data.shape) < 3:
        return np.asanyarray(data)
    array = np.empty(data.shape, np.float32, order="F")
    for last in range(data.shape[-1]):
        array[..., last] = data[..., last]
    return array


def _itk(path: Path) -> tuple[np.ndarray, Geometry]:
    import SimpleITK as sitk

    picture = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(picture)
    if picture.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif picture.GetDimension() == 3:
        array = array[None]
    if picture.GetDimension() == 2:
        array = array[:, None] if array.ndim == 3 else array[None, None]
    dims = picture.GetDimension()
    direction = np.asarray(picture.GetDirection()).reshape(dims, dims)
    affine = np.eye(4)
    n = min(dims, 3)
    affine[:n, :n] = direction[:n, :n] * np.asarray(picture.GetSpacing())[:n]
    affine[:n, 3] = picture.GetOrigin()[:n]
    spacing = (*picture.GetSpacing()[:3], 1.0)[:3]
    return array, Geometry(shape=array.shape[1:], spacing=spacing[::-1], affine=_rows(LPS @ affine))


def _tiff(data: bytes, path: Path) -> tuple[np.ndarray, Geometry]:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, page = file.series[0], file.series[0].keyframe
        shape, order = _tiff_axes(series.shape, series.axes)
        try:
            array = series.asarray().transpose(order).reshape(shape)
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
                array = ~array if array.dtype.kind == "b" else 2**page.bitspersample - 1 - array
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            array = _tiff_by_pillow(data, page) if len(file.pages) == 1 else None
            if array is None or array.shape != shape:
                found = f"{path.name} with unsupported compression {page.compression.name}"
                mend = "Save it uncompressed, or `pip install imagecodecs`."
                raise ImageError(path, "file", found, "none, deflate or LZW", mend) from None
    return array, Geometry(shape=shape[1:], spacing=_sidecar(path))


def _tiff_by_pillow(data: bytes, page: Any) -> np.ndarray | None:
    """(C, 1, Y, X) of the only page of a file that tifffile alone cannot unpack; None where Pillow
    would give other pixels, or none."""
    from PIL import Image

    colours = page.photometric.name
    depth = page.bitspersample if page.dtype is not None and page.dtype.kind in "bu" else 0
    if page.compression not in BY_PILLOW or depth not in BY_PILLOW[page.compression].get(
        colours, ()
    ):
        return None
    # which Pillow turns back
    turned = "Orientation" in page.tags and page.tags["Orientation"].value != 1
    if turned or 1 in page.extrasamples:  # colours multiplied by alpha, which Pillow divides again
        return None
    with Image.open(io.BytesIO(data)) as picture:
        array = np.asarray(picture)
    return (array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0))[:, None]


def _tiff_axes(shape: Sequence[int], axes: str) -> tuple[tuple[int, int, int, int], list[int]]:
    """The (C, Z, Y, X) shape of a series and the order of its axes that leads there."""
    channels = [i for i, axis in enumerate(axes) if axis in "SC"]
    space = [i for i in range(len(axes)) if i not in channels]
    sizes = [1, 1, 1, *(shape[i] for i in space)]
    return (
        math.prod(shape[i] for i in channels),
        math.prod(sizes[:-2]),
        *sizes[-2:],
    ), channels + space


def _sidecar(path: Path) -> tuple[float, float, float]:
    """Spacing (z, y, x) from CASE.json beside a 3D TIFF (nnU-Net's convention), 1 mm without
    one."""
    name = stem(path)
    for candidate in (name, name[:-5] if name[-5:-4] == "_" and name[-4:].isdigit() else name):
        file = path.with_name(f"{candidate}.json")
        if file.is_file():
            spacing = [float(s) for s in json.loads(file.read_text(encoding="utf-8"))["spacing"]]
            return tuple([1.0] * (3 - len(spacing)) + spacing)[-3:]
    return (1.0, 1.0, 1.0)


def _natural(data: bytes, label: bool) -> tuple[np.ndarray, Geometry]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images are no attack here
        picture = Image.open(io.BytesIO(data))
        picture.load()
    if picture.mode == "1" or picture.mode in ("P", "CMYK", "YCbCr") and not label:
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
        values = np.asarray(picture)
        array = (values > 0).astype(np.uint8) if label else values
    else:
        array = np.asarray(picture)
    if picture.mode in ("RGBA", "LA"):
        array = array[..., :-1]  # alpha says nothing of the image
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    array = array[:, None]
    return array, Geometry(shape=array.shape[1:])


def _czyx(file_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of a file shape (x, y[, z[, t[, c]]])."""
    x, y, z, *rest = (*file_shape, 1, 1, 1)[: max(3, len(file_shape))]
    return (math.prod(rest), z, y, x)


def _plain(array: np.ndarray) -> np.ndarray:
    """Native byte order, contiguous; booleans as uint8 and every float as float32."""
    if array.dtype.kind == "b":
        return np.ascontiguousarray(array, np.uint8)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(array, np.float32)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in np.asarray(matrix))


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:120]


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(s) for s in shape)


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{v:.4g}" for v in values)
