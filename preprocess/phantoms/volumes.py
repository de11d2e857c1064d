"""Synthetic 3D data sets in the layouts of their archives, quirks included, and REC-UNet's
slices."""

from __future__ import annotations

import json
import locale
from pathlib import Path

import numpy as np

from segfleet.preprocess.phantoms.drawing import ORIGIN, blobs, fresh, junk, write_nifti


def write_lits_phantom(
    root: str | Path, cases: int = 8, seed: int = 0, size: tuple[int, int, int] = (12, 32, 32)
) -> Path:
    """LiTS: two training batches, NIfTI not packed, int16 or float32 HU, air below -1000, later
    volumes flipped, one without tumour, a test volume without labels."""
    root = fresh(root)
    generator = np.random.default_rng(seed)
    for number in range(cases):
        shape = (size[0] + int(generator.integers(0, 4)), *size[1:])
        hu, label = _ct(generator, shape)
        if number == 1:
            label[label == 2] = 1
        batch = root / ("Training Batch 1" if number < (cases + 1) // 2 else "Training Batch 2")
        if number >= (cases + 1) // 2:
            hu, label = hu[:, ::-1], label[:, ::-1]
        spacing = (round(float(generator.uniform(1.0, 5.0)), 2), 0.8, 0.8)
        write_nifti(
            batch / f"volume-{number}.nii",
            hu.astype(np.float32 if number % 4 == 3 else np.int16),
            spacing,
        )
        write_nifti(batch / f"segmentation-{number}.nii", label, spacing)
        junk(batch)
    write_nifti(root / "test" / "test-volume-0.nii", hu.astype(np.int16), spacing)
    return root


def write_acdc_phantom(
    root: str | Path, cases: int = 8, seed: int = 0, size: tuple[int, int, int] = (8, 32, 32)
) -> Path:
    """ACDC: two volumes per patient, a 4D film, Info.cfg; three quarters of the patients in
    training, the rest in testing; the end-diastolic frame is not always 1. `cases` counts
    volumes."""
    root = fresh(root)
    generator = np.random.default_rng(seed)
    patients = max(1, cases // 2)
    training = max(1, patients - patients // 4)
    for index in range(patients):
        number = index + 1 if index < training else 101 + index - training
        name = f"patient{number:03d}"
        folder = root / ("training" if index < training else "testing") / name
        ed, es = (4, 11) if index % 4 == 2 else (1, 9 + index % 3)
        frames = {}
        for frame in (ed, es)[: max(1, min(2, cases - 2 * index))]:
            image, label = _heart(generator, size)
            frames[frame] = image
            write_nifti(folder / f"{name}_frame{frame:02d}.nii.gz", image, (10.0, 1.5, 1.5))
            write_nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", label, (10.0, 1.5, 1.5))
        write_nifti(folder / f"{name}_4d.nii.gz", np.stack(list(frames.values())), (10.0, 1.5, 1.5))
        lines = (
            f"ED: {ed}",
            f"ES: {es if len(frames) > 1 else ed}",
            "Group: DCM",
            "Height: 171.0",
            "NbFrame: 12",
            "Weight: 80.0",
        )
        (folder / "Info.cfg").write_text("\n".join(lines) + "\n", encoding="utf-8")
    junk(root / "training")
    return root


def write_npy_phantom(root: str | Path, cases: int = 12, seed: int = 0, size: int = 32) -> Path:
    """REC-UNet's slices: float64 H x W x 3 of volumes 1, 2, ... of four slices each; the last
    volume is the test part."""
    root = fresh(root)
    generator = np.random.default_rng(seed)
    volumes = max(1, -(-cases // 4))
    for index in range(cases):
        volume, slice_ = 1 + index // 4, 1 + index % 4
        if slice_ == 1:
            hu, label = _ct(generator, (12, size, size))
            scaled = np.clip(hu.astype(np.float64), -200, 200) / 200
        z = 4 + slice_
        part = "test" if volume == volumes and volumes > 1 else "train"
        for kind, array in (
            ("image", np.moveaxis(scaled[z - 1 : z + 2], 0, -1)),
            ("label", label[z]),
        ):
            (root / f"{part}_{kind}").mkdir(exist_ok=True)
            np.save(root / f"{part}_{kind}" / f"{volume}_{slice_}.npy", array)
    return root


def write_dicom_phantom(
    root: str | Path, cases: int = 5, seed: int = 0, size: tuple[int, int, int] = (10, 32, 32)
) -> Path:
    """A CT series per case, files in an order that is not that of the slices, with a NIfTI label
    each and labels.json."""
    root = fresh(root)
    generator = np.random.default_rng(seed)
    for index in range(cases):
        hu, label = _ct(generator, size)
        spacing = (3.0, 0.9, 0.9)
        folder = root / "images" / f"case{index:02d}"
        folder.mkdir(parents=True)
        for z, at in enumerate(generator.permutation(len(hu))):
            _dicom(
                folder / f"IM{at:04d}.dcm",
                hu[z],
                z,
                spacing,
                f"1.2.826.0.1.3680043.8.498.{seed}.{index}",
            )
        write_nifti(root / "labels" / f"case{index:02d}.nii.gz", label, spacing)
    (root / "labels.json").write_text(
        json.dumps({"background": 0, "organ": 1, "lesion": 2}) + "\n", encoding="utf-8"
    )
    return root


def _ct(
    generator: np.random.Generator, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """HU (Z, Y, X) int16 with padding of -3024 in the margin, and label 1 around 2."""
    image, label = blobs(generator, shape)
    return np.where(image > 0, np.rint(150 * image - 220), -3024).astype(np.int16), label


def _heart(
    generator: np.random.Generator, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """int16 and labels: 3 inside 2, and 1 beside them."""
    image, label = blobs(generator, shape)
    image = np.where(label == 1, image * 0.6, image)
    label = np.where(label == 2, 3, np.where(label == 1, 2, 0)).astype(np.uint8)
    right = np.zeros(shape, bool)
    right[shape[0] // 4 : -(shape[0] // 4), shape[1] // 2 - 3 : shape[1] // 2 + 3, 2:6] = True
    label[right & (label == 0)] = 1
    return np.rint(100 * np.where(label == 1, 2.4, image)).astype(np.int16), label


def _dicom(
    path: Path, slice_YX: np.ndarray, z: int, spacing: tuple[float, float, float], uid: str
) -> None:
    """One CT slice, the axes of the patient those of `write_nifti`; no dates, fixed uids: the same
    bytes every time."""
    import SimpleITK as sitk

    picture = sitk.GetImageFromArray(slice_YX[None])
    picture.SetSpacing(spacing[::-1])
    picture.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    origin = (-ORIGIN[0], -ORIGIN[1], ORIGIN[2] + z * spacing[0])
    picture.SetOrigin(origin)
    tags = {
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
        "0008|0018": f"{uid}.{z + 1}",
        "0008|0020": "20000101",
        "0008|0030": "120000",
        "0008|0060": "CT",
        "0010|0020": f"phantom{uid.rpartition('.')[2]}",
        "0020|000d": f"{uid}.1000",
        "0020|000e": f"{uid}.2000",
        "0020|0013": str(z + 1),
        "0020|0032": "\\".join(f"{v:g}" for v in origin),
        "0020|0052": f"{uid}.3000",
        "0020|0037": "-1\\0\\0\\0\\-1\\0",
        "0028|1052": "0",
        "0028|1053": "1",
    }
    for key, value in tags.items():
        picture.SetMetaData(key, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    before = locale.setlocale(locale.LC_ALL)
    try:
        writer.Execute(picture)
    finally:  # ITK leaves the C locale behind, in which Python opens files as ASCII
        locale.setlocale(locale.LC_ALL, before)
