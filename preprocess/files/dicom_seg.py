"""Labels as DICOM SEG on the series they were made of, written by highdicom (the extra `dicom`).

Source: DICOM PS3.3 A.51 (Segmentation IOD); segments are numbered from 1 in the order of values.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import replacing
from segfleet.preprocess.files.dicom import ordered_series
from segfleet.preprocess.files.names import colour

# what an anonymised file may lack, and a SEG has to repeat, empty or not
REPEATED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
STRUCTURE = ("123037004", "SCT", "Anatomical Structure")


def check_highdicom() -> None:
    """Raises InputError where what writes DICOM SEG is not installed."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise InputError(
            "format: dicom-seg needs the package highdicom: pip install 'segfleet[dicom]'"
        ) from None


def write_seg(
    path: Path, label_ZYX: np.ndarray, series: Sequence[Path], labels: Mapping[str, int]
) -> None:
    """`label_ZYX` on the grid of `read_series(series)` as one DICOM SEG with a segment for every
    class of `labels` (name -> value) but the background; the file appears whole or not at all.

    Raises InputError without highdicom, for a series that cannot carry a SEG, and for values that
    `labels` does not name.
    """
    check_highdicom()
    from highdicom.seg import Segmentation, SegmentationTypeValues

    named = sorted((value, name) for name, value in labels.items() if value)
    if unnamed := sorted(set(np.unique(label_ZYX).tolist()) - {0, *(v for v, _ in named)}):
        raise InputError(f"{path}: label values: found {unnamed[:5]}, expected a name for each")
    files = ordered_series(series)
    for d in files:
        for key in REPEATED:
            if key not in d:
                setattr(d, key, "")
        if not d.get("SliceThickness"):
            d.SliceThickness = float(getattr(d, "segfleet_step", 1.0))
    numbers = np.zeros(int(label_ZYX.max(initial=0)) + 1, np.uint8)
    for number, (value, _) in enumerate(named, 1):
        numbers[value : value + 1] = number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty predictions, which are stored as they are
        try:
            segmentation = Segmentation(
                source_images=files,
                pixel_array=numbers[label_ZYX],
                segmentation_type=SegmentationTypeValues.BINARY,
                segment_descriptions=[
                    _described(number, name, value) for number, (value, name) in enumerate(named, 1)
                ],
                series_instance_uid=_uid("series", files, path),
                series_number=1 + int(files[0].get("SeriesNumber") or 0) % 9998,
                sop_instance_uid=_uid("instance", files, path),
                instance_number=1,
                manufacturer="segfleet",
                manufacturer_model_name="segfleet predict",
                software_versions=_version(),
                device_serial_number="0",
            )
        except (AttributeError, ValueError, TypeError, KeyError) as error:
            text = " ".join(str(error).split())[:160]
            raise InputError(
                f"{series[0].parent}: found a series that cannot carry a DICOM SEG ({text}). "
                "Predict without --format, and convert the NIfTI file."
            ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, suffix=".dcm") as temporary:
        segmentation.save_as(temporary)


def _described(number: int, name: str, value: int) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from highdicom.sr.coding import CodedConcept

    structure = CodedConcept(*STRUCTURE)
    family = CodedConcept("123110", "DCM", "Artificial Intelligence")
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=structure,
        segmented_property_type=structure,
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name="segfleet", family=family, version=_version()
        ),
        display_color=CIELabColor(*_lab(colour(value)[:3])),
    )


def _lab(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    """CIE Lab (D65) of sRGB; the formulas of CIE 15."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)
    ]
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = (
        v ** (1 / 3) if v > 216 / 24389 else v * 841 / 108 + 4 / 29
        for v in to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _uid(what: str, files: Sequence[Any], path: Path) -> str:
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[what, str(files[0].SeriesInstanceUID), str(path.resolve())])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("segfleet")
    except PackageNotFoundError:
        return "0"
