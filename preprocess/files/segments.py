"""Labels as lists of named segments: DICOM SEG, RTSTRUCT and 3D Slicer's .seg.nrrd.

Such a label covers only the part of the image where something is; it lies where its own affine
says, and is laid onto the image's grid afterwards (`grids.settled`). Sources: DICOM PS3.3 A.51 and
C.8.8.6, 3D Slicer's segmentation file format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.preprocess.case import FileFacts, Geometry
from segfleet.preprocess.files.dicom import (
    LABELMAP,
    RTSTRUCT,
    SEG,
    frames_of,
    grid_of,
    header_of,
    slices_of,
)
from segfleet.preprocess.files.faults import ImageError, check_size, damaged, read_bytes
from segfleet.preprocess.files.itk import LPS
from segfleet.preprocess.files.itk import header_of as nrrd_header
from segfleet.preprocess.files.polygons import filled

MOST_EMPTY = 10_000  # planes without anything that may lie between two that are stored
FARTHEST = 1e6  # mm
MEND = "Name the segments in labels.json as they are named in the file."


def is_seg_nrrd(path: Path) -> bool:
    return path.name.lower().endswith(".seg.nrrd")


def kind_of(path: Path) -> str:
    """SEG, LABELMAP, RTSTRUCT or "" of a DICOM file."""
    header = header_of(path, ["SOPClassUID"])
    uid = str(header.get("SOPClassUID", "")) if header is not None else ""
    return uid if uid in (SEG, LABELMAP, RTSTRUCT) else ""


def from_seg_nrrd(
    path: Path, data: bytes, array_CZYX: np.ndarray, geometry: Geometry, values: Mapping[str, int]
) -> tuple[np.ndarray, Geometry]:
    """label (Z, Y, X) of the layers of a .seg.nrrd. A segment gets the value that its name has in
    `values`, or else the one it is stored with. Raises ImageError where two segments overlap."""
    header = nrrd_header(data, path)
    pairs = {k.lower(): v for k, v in header.items()}
    label = np.zeros(array_CZYX.shape[1:], np.uint8)
    try:
        names = _slicer_segments(pairs)
    except ValueError as error:
        raise damaged(path, str(error)[:120]) from None
    if not names:
        found = f"no segment in {path.name}"
        raise ImageError(
            path, "segments", found, "Segment0_LabelValue, ...", "Save it from Slicer."
        )
    for name, stored, layer in names:
        if not 0 <= layer < len(array_CZYX):
            raise damaged(path, f"segment {name} in layer {layer} of {len(array_CZYX)}")
        where = array_CZYX[layer] == stored
        _paint(label, where, values.get(name, stored), name, path)
    return label, replace(geometry, file=replace(geometry.file, lies="anywhere"))


def read_seg(
    path: Path, values: Mapping[str, int], digest: Any = None
) -> tuple[np.ndarray, Geometry]:
    """label (Z, Y, X) of a DICOM SEG on a grid of its own: the planes that are stored, and those
    between them. Raises ImageError."""
    data = read_bytes(path)
    if digest is not None:
        digest.update(data)
    try:
        d, slices = slices_of(path, data)
        numbers = _segment_numbers(d)
        described = {
            int(s.SegmentNumber): str(s.get("SegmentLabel", "")).strip() for s in d.SegmentSequence
        }
        affine, places = grid_of(path, slices)
        shape = (max(places) + 1, int(d.Rows), int(d.Columns))
        check_size(path, shape, 1, MOST_EMPTY * len(data))
        pixels = frames_of(path, d, shape[1:])
        most = float(d.get("MaximumFractionalValue", 1))
    except ImageError:
        raise
    except Exception as error:  # a tag that cannot be understood
        raise damaged(path, str(error)[:120]) from None
    label = np.zeros(shape, np.uint8)
    for frame, own, place in zip(pixels, numbers, places, strict=True):
        for number in [own] if own else sorted(set(np.unique(frame).tolist()) - {0}):
            name = described.get(number, "")
            where = frame > most / 2 if own else frame == number
            _paint(label[place], where, values.get(name, number), name or str(number), path)
    rows = tuple(tuple(float(v) for v in row) for row in LPS @ affine)
    spacing = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    file = FileFacts(lies="anywhere")
    return label, Geometry(shape=shape, spacing=spacing[::-1], affine=rows, file=file)


def read_rtstruct(
    path: Path, image: Geometry, values: Mapping[str, int], digest: Any = None
) -> tuple[np.ndarray, Geometry]:
    """label (Z, Y, X) on the image's grid: voxels whose centre lies inside a contour, contours
    inside each other alternately. Regions that `values` does not name are left out. Raises
    ImageError for contours that lie on no slice of the image."""
    import pydicom

    data = read_bytes(path)
    if digest is not None:
        digest.update(data)
    try:
        d = pydicom.dcmread(path, force=True)
        names = {int(s.ROINumber): str(s.ROIName).strip() for s in d.StructureSetROISequence}
        regions = [(names[int(r.ReferencedROINumber)], r) for r in d.ROIContourSequence]
    except Exception as error:
        raise damaged(path, str(error)[:120]) from None
    wanted = [(name, region) for name, region in regions if name in values]
    if not wanted:
        found, expected = ", ".join(sorted(names.values())[:8]) or "none", ", ".join(values)
        raise ImageError(path, "regions", found, f"one of {expected}", MEND)
    to_voxel = np.linalg.inv(LPS @ np.asarray(image.affine))
    label = np.zeros(image.shape, np.uint8)
    for name, region in wanted:
        inside = np.zeros(image.shape, bool)
        for points in _points(path, region):
            voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            plane = int(np.rint(voxels[:, 2].mean()))
            if np.abs(voxels[:, 2] - plane).max() > 0.1 or not 0 <= plane < image.shape[0]:
                found = f"a contour of {name} at slice {voxels[:, 2].mean():.2f} in {path.name}"
                mend = "Convert the structures with the series they were drawn on."
                raise ImageError(path, "contours", found, "slices of the image", mend)
            area = filled([voxels[:, :2] + 0.5], image.shape[1:])
            inside[plane, area.rows, area.columns] ^= area.inside
        _paint(label, inside, values[name], name, path)
    return label, image


def _points(path: Path, region: Any) -> list[np.ndarray]:
    """The contours (n, 3) of a region, mm. Raises ImageError."""
    try:
        contours = [
            np.asarray(contour.ContourData, float).reshape(-1, 3)
            for contour in region.get("ContourSequence") or ()
        ]
    except Exception as error:
        raise damaged(path, str(error)[:120]) from None
    if not all(len(points) and np.abs(points).max() < FARTHEST for points in contours):
        raise damaged(path, "a contour without points, or out of this world")
    return contours


def _paint(label: np.ndarray, where: np.ndarray, value: int, name: str, path: Path) -> None:
    if not 0 < value < 256:
        raise ImageError(path, "segments", f"{name} = {value}", "values from 1 to 255", MEND)
    if (other := label[where]).any() and (other[other > 0] != value).any():
        found = f"{name} over another segment in {path.name}"
        mend = "Segments that overlap are no classes: save them so that they do not."
        raise ImageError(path, "segments", found, "segments apart from each other", mend)
    label[where] = value


def _slicer_segments(header: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """(name, stored value, layer)."""
    segments = []
    for key in header:
        if match := re.fullmatch(r"segment(\d+)_labelvalue", key):
            part = f"segment{match[1]}_"
            name = header.get(part + "name", f"Segment_{match[1]}")
            segments.append((name, int(header[key]), int(header.get(part + "layer", 0))))
    return sorted(segments, key=lambda item: (item[2], item[1]))


def _segment_numbers(d: Any) -> list[int]:
    """The segment of every frame: of the frame's own, or what all share where there is but one
    segment. 0 where the pixels are segment numbers themselves. Raises anything."""
    frames = d.PerFrameFunctionalGroupsSequence
    if str(d.get("SegmentationType", "")).strip().upper() == "LABELMAP":
        return [0] * len(frames)
    shared = (d.get("SharedFunctionalGroupsSequence") or [None])[0]
    owners = [frame if "SegmentIdentificationSequence" in frame else shared for frame in frames]
    return [int(owner.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for owner in owners]
