"""NIfTI-1 and NIfTI-2, packed or not, whatever the file's ending says.

The header is read by nibabel without its silent repairs; what it says about the grid is judged
here. Source: the NIfTI-1 header definition (nifti1.h) and, for units, ITK's reader.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.faults import ImageError, check_size, damaged

LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL: values are indices of names
GZIP = b"\x1f\x8b"
LONGEST_HEADER = 544
LONGEST_EXTENSION = 2**24  # bytes between header and voxels
TRAILING = 2**20  # bytes a file may hold behind its voxels
TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units of space: unknown, m, mm, um
AGREE = 1e-3  # relative, of voxel sizes
MEND = "Export the image again with a sound header."
Warnings = list[tuple[str, str, str, str]]


def read_nifti(data: bytes, path: Path) -> tuple[np.ndarray, Geometry]:
    """(C, Z, Y, X) and its grid in mm. Raises ImageError."""
    start = _inflated(data, LONGEST_HEADER, path) if _is_packed(data) else data[:LONGEST_HEADER]
    header = header_of(start, path)
    shape, dtype = _shape(header, path), _dtype(header, path)
    offset = float(header["vox_offset"])
    least = header.sizeof_hdr
    if not least <= offset <= LONGEST_EXTENSION:
        raise ImageError(
            path,
            "vox_offset",
            f"{offset:g} in {path.name}",
            f"{least} to {LONGEST_EXTENSION}",
            MEND,
        )
    size = check_size(path, shape, dtype.itemsize, len(data) if _is_packed(data) else None)
    end = int(offset) + size
    if _is_packed(data):
        data = _inflated(data, end, path, whole=True)
    if len(data) < end:
        raise damaged(path, f"{len(data) - int(offset)} bytes of voxels, expected {size}")
    stored = np.frombuffer(data, dtype, size // dtype.itemsize, int(offset))
    array = _values(stored.reshape((*shape, 1)[: max(3, len(shape))], order="F"), header, path)
    c, z, y, x = czyx(array.shape)
    array = array.reshape((x, y, z, c), order="F").T
    return array, _grid(header, (z, y, x), len(shape), path)


def peek_nifti(path: Path) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) from the header alone. Raises anything."""
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP
    with (gzip.open if packed else open)(path, "rb") as file:
        header = header_of(file.read(LONGEST_HEADER), path)
    shape = czyx(_shape(header, path))
    fields = _dtype(header, path).names or ()
    return (shape[0] * max(1, len([f for f in fields if f != "A"])), *shape[1:])


def header_of(start: bytes, path: Path) -> Any:
    """A nibabel header, none of whose fields has been checked. Raises ImageError."""
    import nibabel as nib

    for cls, length in ((nib.Nifti1Header, 348), (nib.Nifti2Header, 540)):
        if len(start) >= length and length in (
            int.from_bytes(start[:4], "little"),
            int.from_bytes(start[:4], "big"),
        ):
            order = "<" if length == int.from_bytes(start[:4], "little") else ">"
            header = cls(start[:length], endianness=order, check=False)
            magic = bytes(header["magic"].item())[:2]
            if magic == b"ni":
                expected = "header and voxels in one file"
                mend = "Give the .hdr and .img to a converter that writes .nii.gz."
                raise ImageError(path, "file", f"half of a pair in {path.name}", expected, mend)
            if magic != b"n+":
                raise damaged(path, "no NIfTI mark in its header")
            return header
    raise damaged(path, "no NIfTI header")


def czyx(file_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Of a file shape (x, y[, z[, t[, c]]])."""
    x, y, z, *rest = (*file_shape, 1, 1, 1)[: max(3, len(file_shape))]
    return (math.prod(rest), z, y, x)


def _is_packed(data: bytes) -> bool:
    return data[:2] == GZIP


def _inflated(data: bytes, wanted: int, path: Path, whole: bool = False) -> bytes:
    """The first `wanted` bytes of a gzip file, never more in memory. `whole`: the rest is looked
    at too, since the checksum stands at its end. Raises ImageError."""
    out, filled, beyond, rest = bytearray(wanted), 0, 0, data
    try:
        while rest and (rest[:2] == GZIP or not (filled or beyond)):  # members follow each other
            stream = zlib.decompressobj(wbits=31)
            while not stream.eof:
                piece = stream.decompress(rest, min(2**22, wanted - filled) or 2**16)
                rest = stream.unconsumed_tail
                part = piece[: wanted - filled]
                out[filled : filled + len(part)] = part
                filled, beyond = filled + len(part), beyond + len(piece) - len(part)
                if filled == wanted and not whole:
                    return bytes(out)
                if beyond > TRAILING:
                    raise damaged(path, "more bytes than its header speaks of")
                if not piece and not rest and not stream.eof:
                    raise damaged(path, "the packed bytes end too early")
            rest = stream.unused_data
    except zlib.error as error:
        raise damaged(path, str(error)) from None
    return memoryview(out)[:filled] if whole else bytes(out[:filled])


def _shape(header: Any, path: Path) -> tuple[int, ...]:
    axes = [int(n) for n in header["dim"]]
    if not 1 <= axes[0] <= 7 or min(axes[1 : 1 + axes[0]]) < 1:
        raise ImageError(
            path, "dim", f"{axes} in {path.name}", "1 to 7 axes, each of 1 or more", MEND
        )
    shape = axes[1 : 1 + axes[0]]
    return tuple(shape + [1] * (2 - len(shape)))


def _dtype(header: Any, path: Path) -> np.dtype:
    import nibabel as nib

    try:
        dtype = header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError):
        dtype = np.dtype("V")
    if not dtype.itemsize or dtype.kind not in "buifcV" or dtype == np.dtype("V"):
        found = f"code {int(header['datatype'])} in {path.name}"
        raise ImageError(path, "voxel type", found, "a type of NIfTI", MEND)
    return dtype


def _values(stored: np.ndarray, header: Any, path: Path) -> np.ndarray:
    """Real numbers where a slope makes them so; slice by slice, for these take eight bytes each.
    Colours get an axis of their own, the last; opacity is dropped."""
    if stored.dtype.names:
        return np.stack([stored[name] for name in stored.dtype.names if name != "A"], axis=-1)
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isnan(slope) or slope == 0:  # the standard: no scaling
        return stored
    if not (math.isfinite(slope) and math.isfinite(inter)):
        found = f"slope {slope:g}, intercept {inter:g} in {path.name}"
        raise ImageError(path, "scaling", found, "finite numbers", MEND)
    if (slope, inter) == (1.0, 0.0) or stored.dtype.kind == "c":
        return stored
    array = np.empty(stored.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for last in range(stored.shape[-1]):
            array[..., last] = stored[..., last].astype(np.float64) * slope + inter
    return array


def _grid(header: Any, shape: tuple[int, int, int], dims: int, path: Path) -> Geometry:
    """Raises ImageError where the header says nothing that can be true; where it contradicts
    itself, the affine counts and a warning says so."""
    warnings: Warnings = []
    unit = int(header["xyzt_units"]) & 7
    if unit not in TO_MM:
        warnings.append(("xyzt_units", f"{unit} in {path.name}", "metres, mm or micrometres", MEND))
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not (slope < 0 or slope > 0) and not math.isnan(inter) and inter:
        found = f"slope {slope:g} with intercept {inter:g} in {path.name}"
        expected = "a slope; without one values stay as they are stored"
        warnings.append(("scaling", found, expected, "Programs differ here: save the values."))
    scale = TO_MM.get(unit, 1.0)
    zooms = [float(v) * scale for v in header["pixdim"][1:4]]
    if dims < 3 and not (math.isfinite(zooms[2]) and zooms[2] > 0):
        zooms[2] = 1.0  # a flat picture need not say how thick it is
    valid = all(math.isfinite(v) and v > 0 for v in zooms)
    sform, qform = _sform(header, scale), _qform(header, scale)
    affine = sform if sform is not None else qform
    if affine is None:
        if not valid:
            found = f"{'x'.join(f'{v:g}' for v in zooms)} in {path.name}"
            raise ImageError(path, "spacing", found, "positive numbers (mm)", MEND)
        affine = _base(zooms, shape)
    columns = affine[:3, :3]
    sizes = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(columns)) <= 1e-6 * np.prod(sizes):
        found = f"a matrix that is {'singular' if np.isfinite(affine).all() else 'not finite'}"
        raise ImageError(path, "affine", f"{found} in {path.name}", "three directions", MEND)
    agree = valid and np.allclose(sizes, zooms, rtol=AGREE, atol=0)
    if not agree and not (dims < 3 and valid and np.allclose(sizes[:2], zooms[:2], rtol=AGREE)):
        transform = "sform" if sform is not None else "qform"
        found = f"pixdim {_times(zooms)} in {path.name}"
        expected = f"{_times(sizes)} mm as its {transform} says, which is taken"
        warnings.append(("spacing", found, expected, "Correct pixdim if the affine is right."))
    if sform is not None and qform is not None and (far := _apart(sform, qform, shape)) > 0.5:
        found = f"up to {far:.3g} voxels apart in {path.name}"
        mend = "Programs differ in which they take: make both equal."
        warnings.append(("sform and qform", found, "one place; the sform is taken", mend))
    cosines = (columns / sizes).T @ (columns / sizes)
    if (shear := np.abs(cosines - np.eye(3)).max()) > AGREE:
        found = f"axes {90 - math.degrees(math.asin(min(1.0, shear))):.3g} degrees apart"
        mend = "Distances along a slanting axis are not exact: resample the image if that matters."
        warnings.append(("affine", f"{found} in {path.name}", "90 degrees", mend))
    spacing = tuple(zooms if agree or dims < 3 and valid else (float(s) for s in sizes))
    rows = tuple(tuple(float(v) for v in row) for row in affine)
    file = FileFacts(warnings=tuple(warnings), header=bytes(header.binaryblock), dims=min(dims, 3))
    return Geometry(shape=shape, spacing=spacing[::-1], affine=rows, file=file)


def _sform(header: Any, scale: float) -> np.ndarray | None:
    if not header["sform_code"] > 0:
        return None
    rows = np.stack([header["srow_x"], header["srow_y"], header["srow_z"]]).astype(np.float64)
    return np.vstack([rows * scale, [0, 0, 0, 1]])


def _qform(header: Any, scale: float) -> np.ndarray | None:
    """The matrix of the quaternion; voxel sizes of zero or less leave none."""
    from nibabel.quaternions import fillpositive, quat2mat

    if not header["qform_code"] > 0:
        return None
    sizes = np.array(header["pixdim"][1:4], np.float64)
    if int(header["dim"][0]) < 3 and not sizes[2] > 0:
        sizes[2] = 1
    sizes[2] *= -1 if header["pixdim"][0] < 0 else 1
    if not (np.isfinite(sizes).all() and (sizes[:2] > 0).all() and sizes[2] != 0):
        return None
    try:
        turn = quat2mat(
            fillpositive([header[f"quatern_{axis}"] for axis in "bcd"], w2_thresh=-1e-4)
        )
    except ValueError:
        return None
    affine = np.eye(4)
    affine[:3, :3] = turn * sizes * scale
    affine[:3, 3] = [float(header[f"qoffset_{axis}"]) * scale for axis in "xyz"]
    return affine


def _base(zooms: list[float], shape: tuple[int, int, int]) -> np.ndarray:
    """Without sform and qform: nibabel's convention, x from right to left around the middle."""
    affine = np.diag([-zooms[0], zooms[1], zooms[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return affine


def _apart(first: np.ndarray, second: np.ndarray, shape: tuple[int, int, int]) -> float:
    """The farthest that two affines put one voxel of the grid apart, in voxels of the first."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[::-1]])).reshape(3, -1)
    shift = (first - second)[:3, :3] @ corners + (first - second)[:3, 3:]
    least = np.linalg.norm(first[:3, :3], axis=0).min()
    return float(np.linalg.norm(shift, axis=0).max() / least) if least else math.inf


def _times(values: Any) -> str:
    return "x".join(f"{v:.4g}" for v in values)


def label_bytes(label_ZYX: np.ndarray, geometry: Geometry) -> bytes:
    """A NIfTI file of class numbers that says where it lies in the very words of the image it was
    made of: version, sform, qform, their codes, voxel sizes and units. Without such a header, the
    affine is the sform."""
    import nibabel as nib

    if not geometry.file.header:
        picture = nib.Nifti1Image(label_ZYX.T, geometry.to_mm)
        picture.header.set_xyzt_units("mm")
        picture.header.set_zooms(geometry.spacing[::-1])
        picture.header["intent_code"] = LABEL_INTENT
        return picture.to_bytes()
    header = header_of(geometry.file.header, Path("header")).as_byteswapped("<")
    flat = geometry.file.dims < 3
    array = label_ZYX[0].T if flat else label_ZYX.T
    ndim, shape = array.ndim, array.shape
    header["dim"][:] = [ndim, *shape, *[1] * (7 - ndim)]
    header.set_data_dtype(label_ZYX.dtype)
    header["pixdim"][1 + ndim :] = 1
    header["scl_slope"], header["scl_inter"], header["cal_min"], header["cal_max"] = 1, 0, 0, 0
    header["intent_code"], header["vox_offset"] = LABEL_INTENT, header.single_vox_offset
    for key in ("intent_p1", "intent_p2", "intent_p3"):
        header[key] = 0
    header["intent_name"], header["descrip"] = b"", b""
    gap = header.single_vox_offset - header.sizeof_hdr  # says that no extension follows
    swapped = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return header.binaryblock + bytes(gap) + swapped.tobytes(order="F")
