"""DICOM: the slices of one series, or all of them in one file, as one volume; a grid is only made
where there is one.

Values are stored value x slope + intercept of their own slice (PS3.3 C.7.6.16.2.9, C.11.1); the
place of a slice is its ImagePositionPatient along the normal of its rows and columns (C.7.6.2).
Pixels are unpacked by pydicom, lossless JPEG and JPEG-LS by imagecodecs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.codestreams import check_boxes, check_own_size
from segfleet.preprocess.files.faults import ImageError, check_size, damaged, is_regular, read_bytes
from segfleet.preprocess.files.itk import LPS

MARK = b"DICM"  # at byte 128
SUFFIXES = (".dcm", ".ima", ".dicom")
EVEN = 0.01  # of the usual step: how far another may be from it, and
ROUNDING = 0.02  # mm, which positions in text are off anyway
SLANT = 0.1  # of a pixel at the far end: below, a shift of slices against each other is none
CODECS = {  # transfer syntax -> of imagecodecs
    **dict.fromkeys(("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"), "ljpeg_decode"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), "jpegls_decode"),
}
RLE = "1.2.840.10008.1.2.5"  # packs bytes, not pictures with a header
DEFLATED = b"1.2.840.10008.1.2.1.99"  # unpacked without a limit by pydicom
SEG, RTSTRUCT = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.3"
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"  # a SEG whose pixels are segment numbers
KINDS = {  # what else may be in a series' folder
    SEG: "a segmentation (DICOM SEG)",
    LABELMAP: "a segmentation (DICOM SEG)",
    RTSTRUCT: "structures of radiotherapy (RTSTRUCT)",
}
AGAIN = "Copy or export the files again."
OWN_FOLDER = "Put each series into a folder of its own."


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One frame: where it lies (mm, LPS) and how its numbers become values."""

    path: Path
    frame: int | None  # of a file that holds several
    dataset: Any
    position: np.ndarray
    turn: np.ndarray  # (2, 3): directions of growing columns and rows
    pixel: tuple[float, float]  # mm: between rows, between columns
    slope: float
    inter: float


def is_dicom(path: Path) -> bool:
    """By its name, or by its mark where the name says nothing: scanners name files by UID."""
    suffix = path.suffix.lower()
    if path.name.upper() == "DICOMDIR" or path.is_dir():
        return False
    if suffix in SUFFIXES:
        return True  # a pipe or a link to nowhere of that name is a slice that is missing
    return is_regular(path) and (not suffix or _marked(path))


def read_series(paths: Sequence[Path], digest: Any = None) -> tuple[np.ndarray, Geometry]:
    """image (1, Z, Y, X) of the files of one series, slices in the order of their positions, and
    its grid. Raises ImageError for files that are no series, and for slices that lie on no grid of
    even steps."""
    datasets = [_dataset(path, read_bytes(path), digest) for path in paths]
    folder = paths[0].parent if len(paths) > 1 else paths[0]
    try:
        return _volume(folder, paths, datasets)
    except ImageError:
        raise
    except Exception as error:  # a tag that cannot be understood is so wherever it is asked for
        raise damaged(folder, _short(error)) from None


def _volume(
    folder: Path, paths: Sequence[Path], datasets: Sequence[Any]
) -> tuple[np.ndarray, Geometry]:
    _one_series(folder, paths, datasets)
    slices = [s for path, d in zip(paths, datasets, strict=True) for s in _slices(path, d)]
    shape = (len(slices), int(datasets[0].Rows), int(datasets[0].Columns))
    check_size(folder, shape, 4, sum(path.stat().st_size for path in paths))
    slices, affine = _grid(folder, slices)
    image = _values(slices, shape)
    spacing = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    rows = tuple(tuple(float(v) for v in row) for row in LPS @ affine)
    return image[None], Geometry(shape=shape, spacing=spacing[::-1], affine=rows)


def ordered_series(paths: Sequence[Path]) -> list[Any]:
    """The data sets of a series without their pixels, in the order in which `read_series` has their
    slices; of a file that holds all of them, that one. Raises ImageError."""
    slices = []
    for path in paths:
        d = header_of(path)
        if d is None:
            raise damaged(path, "no header")
        slices += _slices(path, d)
    folder = paths[0].parent if len(paths) > 1 else paths[0]
    ordered = _grid(folder, slices)[0]
    return list({id(plane.dataset): plane.dataset for plane in ordered}.values())


def header_of(path: Path, keys: Sequence[str] | None = None) -> Any:
    """The data set of one file without its pixels, or None where it cannot be read, which reading
    the series then explains."""
    import pydicom

    try:
        if not is_regular(path):
            return None
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=keys, force=True)
    except Exception:
        return None


def peek_slice(path: Path) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) of one file from its header. Raises anything."""
    d = header_of(path, ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"])
    frames, channels = int(d.get("NumberOfFrames", 1) or 1), int(d.get("SamplesPerPixel", 1))
    return channels, frames, int(d.Rows), int(d.Columns)


def slices_of(path: Path, data: bytes) -> tuple[Any, list[Slice]]:
    """The data set of one file and where its frames lie. Raises ImageError."""
    d = _dataset(path, data, None)
    if "PixelData" not in d or not (d.get("Rows") and d.get("Columns")):
        raise damaged(path, "no pixels in it")
    return d, _slices(path, d)


def grid_of(path: Path, slices: Sequence[Slice]) -> tuple[np.ndarray, list[int]]:
    """The matrix (LPS, mm) of the smallest grid that frames at any places lie on, several at one of
    them, and the slice each lies on. Raises ImageError where they lie on none."""
    first = slices[0]
    normal = np.cross(first.turn[0], first.turn[1])
    depths = np.array([frame.position @ normal for frame in slices])
    steps = np.diff(np.unique(depths.round(3)))
    step = float(steps.min()) if len(steps) else float(first.dataset.segfleet_step)
    places = (depths - depths.min()) / step
    lowest = slices[int(depths.argmin())].position
    off = np.array([frame.position - lowest for frame in slices])
    aside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1).max()
    turned = max(np.abs(frame.turn - first.turn).max() for frame in slices)
    if np.abs(places - np.rint(places)).max() > 0.05 or aside > ROUNDING or turned > 1e-3:
        raise ImageError(path, "frames", f"{path.name} on no grid", "even, parallel planes", AGAIN)
    affine = np.eye(4)
    affine[:3, 0] = first.turn[0] * first.pixel[1]
    affine[:3, 1] = first.turn[1] * first.pixel[0]
    affine[:3, 2], affine[:3, 3] = normal * step, lowest
    return affine, [int(n) for n in np.rint(places)]


def _marked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == MARK
    except OSError:
        return False


def _dataset(path: Path, data: bytes, digest: Any) -> Any:
    import pydicom

    if digest is not None:
        digest.update(data)
    if DEFLATED in data[:1024]:
        dataset, mend = f"{path.name}, packed as a whole (deflate)", "Convert the file."
        raise ImageError(path, "file", dataset, "another transfer syntax", mend)
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != MARK)
        if "Rows" not in dataset and "SOPClassUID" not in dataset:
            raise ValueError("no DICOM file")
        return dataset
    except Exception as error:
        raise damaged(path, _short(error)) from None


def _one_series(folder: Path, paths: Sequence[Path], datasets: Sequence[Any]) -> None:
    """Raises ImageError for what is not grey slices of one size and one series."""
    for path, d in zip(paths, datasets, strict=True):
        if kind := KINDS.get(str(d.get("SOPClassUID", ""))):
            mend = "Move it out of the folder of the images."
            raise ImageError(path, "file", f"{path.name}, {kind}", "an image", mend)
        if "PixelData" not in d or not (d.get("Rows") and d.get("Columns")):
            raise damaged(path, "no pixels in it")
        if int(d.get("SamplesPerPixel", 1)) != 1:
            found, mend = f"colours in {path.name}", "Export the series without colours."
            raise ImageError(folder, "image", found, "grey slices", mend)
    first, owners = datasets[0], {}
    for path, d in zip(paths, datasets, strict=True):
        owners.setdefault(str(d.get("SeriesInstanceUID", "")), path.name)
    if len(owners) > 1:
        mend = f"{OWN_FOLDER} Of different series are {', '.join(list(owners.values())[:3])}."
        raise ImageError(folder, "series", f"{len(owners)} in {folder.name}", "1", mend)
    for path, d in zip(paths, datasets, strict=True):
        if (d.Rows, d.Columns) != (first.Rows, first.Columns):
            sizes = " and ".join(f"{dataset.Columns}x{dataset.Rows}" for dataset in (first, d))
            found = f"{sizes} in {paths[0].name} and {path.name}"
            mend = f"Perhaps one is a scout: {OWN_FOLDER}"
            raise ImageError(folder, "size", found, "slices of one size", mend)


def _slices(path: Path, d: Any) -> list[Slice]:
    """The frames of a file. Raises ImageError where one does not say where it lies."""
    frames = int(d.get("NumberOfFrames", 1) or 1)
    shared = _first(d, "SharedFunctionalGroupsSequence")
    groups = d.get("PerFrameFunctionalGroupsSequence") or []
    if frames > 1 and len(groups) != frames:
        found = f"{frames} frames in {path.name} that do not say where they lie"
        mend = "Convert the file to single slices, or to NIfTI."
        raise ImageError(path, "frames", found, "positions of all frames", mend)
    if not groups and shared is None:
        return [_slice(path, d, None, (d,))]
    return [_slice(path, d, i, (own, shared, d)) for i, own in enumerate(groups)]


def _slice(path: Path, d: Any, frame: int | None, places: Sequence[Any]) -> Slice:
    """`places` are searched in this order: the frame's own groups, those shared, the file."""

    def find(group: str, key: str) -> Any:
        for place in places:
            inner = _first(place, group) if place is not d else d
            if inner is not None and inner.get(key) not in (None, ""):
                return inner.get(key)
        return None

    def numbers(group: str, key: str, count: int) -> np.ndarray:
        value = find(group, key)
        try:
            parsed = np.array([float(v) for v in value], np.float64)
        except (TypeError, ValueError):
            parsed = np.empty(0)
        if len(parsed) != count or not np.isfinite(parsed).all():
            found, expected = f"{value} in {path.name}", f"{count} numbers"
            mend = "A series without places is no volume: export it again."
            raise ImageError(path, key, found, expected, mend)
        return parsed

    turn = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
    pixel = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    position = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    lengths = np.linalg.norm(turn, axis=1)
    if not (np.abs(lengths - 1) < 0.01).all() or abs(turn[0] @ turn[1]) > 0.01 or pixel.min() <= 0:
        found = f"directions {turn.ravel().round(3).tolist()}, pixels of {pixel.tolist()} mm"
        raise ImageError(
            path, "ImageOrientationPatient", f"{found} in {path.name}", "a plane", AGAIN
        )
    group = "PixelValueTransformationSequence"
    slope, inter = find(group, "RescaleSlope"), find(group, "RescaleIntercept")
    slope, inter = (
        (1.0 if slope is None else float(slope)),
        (0.0 if inter is None else float(inter)),
    )
    if not (np.isfinite(slope) and np.isfinite(inter) and slope):
        found = f"slope {slope:g}, intercept {inter:g} in {path.name}"
        raise ImageError(path, "RescaleSlope", found, "finite numbers, no slope of 0", AGAIN)
    if "ModalityLUTSequence" in d:
        mend = "Convert the series with a tool that applies it."
        raise ImageError(path, "values", f"a table (Modality LUT) in {path.name}", "a slope", mend)
    thick = find("PixelMeasuresSequence", "SpacingBetweenSlices") or find(
        "PixelMeasuresSequence", "SliceThickness"
    )
    d.segfleet_step = float(thick) if thick else 1.0
    return Slice(
        path=path, frame=frame, dataset=d, position=position, turn=turn, pixel=tuple(pixel),
        slope=slope, inter=inter,
    )  # fmt: skip


def _grid(folder: Path, slices: list[Slice]) -> tuple[list[Slice], np.ndarray]:
    """The slices in the order of their places and the matrix from (x, y, z) of a voxel to mm in
    LPS. Raises ImageError where they are no grid: turned or sized differently, several at one
    place, uneven steps, or shifted against each other (a tilted gantry)."""
    first = slices[0]
    for plane in slices:
        if np.abs(plane.turn - first.turn).max() > 1e-3:
            found = f"{_name(first)} and {_name(plane)} lie in different planes"
            mend = f"Perhaps one is a scout: {OWN_FOLDER}"
            raise ImageError(folder, "orientation", found, "parallel slices", mend)
        if not np.allclose(plane.pixel, first.pixel, rtol=1e-3, atol=0):
            found = f"{_pixels(first)} and {_pixels(plane)}"
            raise ImageError(folder, "pixel spacing", found, "one for all slices", OWN_FOLDER)
    normal = np.cross(first.turn[0], first.turn[1])
    depths = np.array([plane.position @ normal for plane in slices])
    order = np.argsort(depths, kind="stable")
    slices, depths = [slices[i] for i in order], depths[order]
    step = np.zeros(3)
    if len(slices) > 1:
        steps = np.diff(depths)
        usual = float(np.median(steps[steps > ROUNDING / 2])) if steps.max() > ROUNDING / 2 else 0.0
        _no_copies(folder, slices, steps)
        _even(folder, slices, steps, usual)
        step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
        _straight(folder, slices, normal)
    else:
        step = normal * float(getattr(first.dataset, "segfleet_step", 1.0))
    affine = np.eye(4)
    affine[:3, 0] = first.turn[0] * first.pixel[1]
    affine[:3, 1] = first.turn[1] * first.pixel[0]
    affine[:3, 2] = normal * (normal @ step)
    affine[:3, 3] = slices[0].position
    return slices, affine


def _no_copies(folder: Path, slices: Sequence[Slice], steps: np.ndarray) -> None:
    same = np.flatnonzero(steps <= ROUNDING / 2)
    if not len(same):
        return
    at = int(same[0])
    twins = f"{_name(slices[at])} and {_name(slices[at + 1])}"
    places = len(slices) - len(same)
    found = f"{len(slices)} slices at {places} positions, such as {twins}"
    mend = (
        f"They look like {len(slices) // places} volumes (phases or times): {OWN_FOLDER}"
        if len(slices) % places == 0
        else "Remove the copies."
    )
    raise ImageError(folder, "slice position", found, "one slice at a position", mend)


def _even(folder: Path, slices: Sequence[Slice], steps: np.ndarray, usual: float) -> None:
    off = np.abs(steps - usual)
    if off.max() <= max(EVEN * usual, ROUNDING):
        return
    at = int(off.argmax())
    after = f"{_name(slices[at])} and {_name(slices[at + 1])}"
    missing = np.abs(steps / usual - np.rint(steps / usual)).max() < 0.05
    if missing:
        found = f"{steps[at]:.4g} mm before {_name(slices[at + 1])}"
        expected, mend = f"{usual:.4g} mm everywhere", "Copy the missing slices."
    else:
        kinds = sorted({f"{step:.3g}" for step in steps}, key=float)
        found = f"steps of {', '.join(kinds[:4])} mm ({steps[at]:.4g} mm between {after})"
        expected = "even steps, for no grid is true otherwise"
        mend = "Keep the part with even steps, or resample the series to one grid."
    raise ImageError(folder, "slice distance", found, expected, mend)


def _straight(folder: Path, slices: Sequence[Slice], normal: np.ndarray) -> None:
    off = np.array([plane.position - slices[0].position for plane in slices])
    along = off @ normal
    aside = np.linalg.norm(off - np.outer(along, normal), axis=1)
    at = int(aside.argmax())
    if aside[at] > max(SLANT * min(slices[0].pixel), ROUNDING):
        degrees = np.degrees(np.arctan2(aside[at], along[at]))
        found = (
            f"slices shifted against their normal by {degrees:.3g} degrees, {aside[at]:.3g} mm "
            f"at {_name(slices[at])}"
        )
        mend = "Convert the series with a tool that corrects the tilt, and draw the label on that."
        raise ImageError(folder, "gantry tilt", found, "slices straight above each other", mend)


def _values(slices: Sequence[Slice], shape: tuple[int, int, int]) -> np.ndarray:
    """(Z, Y, X): integers where all slopes and intercepts are, else float32."""
    whole = all(s.slope.is_integer() and s.inter.is_integer() for s in slices)
    out = np.empty(shape, np.int32 if whole else np.float32)
    frames: tuple[Any, np.ndarray] | None = None
    for z, plane in enumerate(slices):
        if frames is None or frames[0] is not plane.dataset:
            frames = (plane.dataset, frames_of(plane.path, plane.dataset, shape[1:]))
        stored = frames[1][plane.frame or 0]
        kind = np.int64 if whole and stored.dtype.kind in "iu" else np.float64
        values = stored.astype(kind) * kind(plane.slope) + kind(plane.inter)
        if whole and np.abs(values).max() >= 2**31:
            whole, out = False, out.astype(np.float32)
        out[z] = values
    if whole and out.min() >= -(2**15) and out.max() < 2**15:
        return out.astype(np.int16)
    return out


def frames_of(path: Path, d: Any, shape: tuple[int, int]) -> np.ndarray:
    """(frames, Y, X) as stored, black where the numbers are low. Raises ImageError."""
    try:
        syntax = d.file_meta.get("TransferSyntaxUID", "") if "file_meta" in dir(d) else ""
        pictures = _pictures(d) if syntax and syntax.is_compressed and syntax != RLE else []
        for picture in pictures:
            check_own_size(picture, shape[1], shape[0], "a frame", path)
            check_boxes(picture, path)
        stored = _by_imagecodecs(pictures, CODECS[syntax]) if syntax in CODECS else d.pixel_array
        stored = _significant(stored.reshape(-1, *shape), d)
    except ImageError:
        raise
    except Exception as error:
        raise damaged(path, _short(error)) from None
    if str(d.get("PhotometricInterpretation", "")).strip() == "MONOCHROME1":
        bits = int(d.get("BitsStored", 8 * stored.dtype.itemsize))
        return -1 - stored if stored.dtype.kind == "i" else stored.dtype.type(2**bits - 1) - stored
    return stored


def _pictures(d: Any) -> list[bytes]:
    """The frames as they are packed."""
    from pydicom.encaps import generate_frames

    count = int(d.get("NumberOfFrames", 1) or 1)
    return list(generate_frames(d.PixelData, number_of_frames=count))


def _by_imagecodecs(pictures: Sequence[bytes], decode: str) -> np.ndarray:
    import imagecodecs

    return np.stack([getattr(imagecodecs, decode)(picture) for picture in pictures])


def _significant(stored: np.ndarray, d: Any) -> np.ndarray:
    """Only the bits that count, with their sign: others may hold overlays."""
    width = 8 * stored.dtype.itemsize
    unused = width - int(d.get("BitsStored", width))
    signed = int(d.get("PixelRepresentation", 0)) == 1
    if stored.dtype.kind not in "iu" or not 0 <= unused < width:
        return stored
    stored = stored.view(f"{'i' if signed else 'u'}{stored.dtype.itemsize}")
    return (stored << unused) >> unused if unused else stored


def _first(place: Any, sequence: str) -> Any:
    items = place.get(sequence) if place is not None else None
    return items[0] if items else None


def _name(plane: Slice) -> str:
    return plane.path.name if plane.frame is None else f"frame {plane.frame + 1}"


def _pixels(plane: Slice) -> str:
    return f"{plane.pixel[0]:.4g}x{plane.pixel[1]:.4g} mm in {_name(plane)}"


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:120]
