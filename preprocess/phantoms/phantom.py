"""Synthetic data sets in real layouts: small, learnable, the same bytes every time. For trying
things out and for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

import segfleet.preprocess.phantoms.pictures as pictures
import segfleet.preprocess.phantoms.volumes as volumes
from segfleet.preprocess.phantoms.drawing import blobs, fresh, write_nifti


def write_msd_phantom(
    root: str | Path, cases: int = 12, seed: int = 0, size: Sequence[int] = (16, 40, 40)
) -> Path:
    """A Decathlon folder of 3D volumes of about `size` (z, y, x) voxels, 2.5 x 1 x 1 mm.

    Label 1 is a bright ellipsoid, label 2 a brighter one inside it; noise, a bias field, an empty
    margin, and an intensity scale that differs between cases by up to a thousand. A `._` file of
    macOS lies between the images.
    """
    root = fresh(root)
    generator = np.random.default_rng(seed)
    listed = []
    for index in range(cases):
        shape = tuple(int(n + generator.integers(-2, 3)) for n in size)
        spacing = (2.5, *(round(float(generator.uniform(0.95, 1.05)), 3),) * 2)
        image, label = blobs(generator, shape)
        image *= 10.0 ** generator.uniform(0, 3)
        name = f"phantom_{index:03d}.nii.gz"
        write_nifti(root / "imagesTr" / name, image.astype(np.float32), spacing)
        write_nifti(root / "labelsTr" / name, label, spacing)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    (root / "imagesTr" / "._phantom_000.nii.gz").write_bytes(b"\0\5\x16\7junk of another system")
    description = {
        "name": "Phantom",
        "description": "Synthetic ellipsoids",
        "licence": "CC0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "numTraining": cases,
        "numTest": 0,
        "training": listed,
        "test": [],
    }
    return _describe(root, description)


def write_nnunet_phantom(
    root: str | Path, cases: int = 8, seed: int = 0, size: Sequence[int] = (12, 32, 32)
) -> Path:
    """An nnU-Net v2 folder: CT and PET, the overlapping regions whole = {1, 2} and core = {2}, and
    an ignore label 3.

    Two visits of each patient, so that a split has something to keep together.
    """
    root = fresh(root)
    generator = np.random.default_rng(seed)
    for index in range(cases):
        shape, spacing = tuple(size), (3.5, 1.0, 1.0)
        image, label = blobs(generator, shape)
        second = generator.normal(0.2, 0.1, shape) + 2.0 * ndimage.gaussian_filter(
            (label == 2).astype(float), (0.5, 1, 1)
        )
        label[:, : max(1, shape[1] // 16), :] = 3
        name = f"patient{index // 2:03d}_visit{index % 2}"
        write_nifti(
            root / "imagesTr" / f"{name}_0000.nii.gz",
            np.rint(400 * image - 600).astype(np.int16),
            spacing,
        )
        write_nifti(root / "imagesTr" / f"{name}_0001.nii.gz", second.astype(np.float32), spacing)
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", label, spacing)
    description = {
        "name": "PhantomRegions",
        "licence": "CC0",
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    return _describe(root, description)


def write_dsb_phantom(root: str | Path, images: int = 16, seed: int = 0, size: int = 64) -> Path:
    """A Data Science Bowl folder: bright discs on black, every fourth image dark discs on a stained
    ground; a mask file per disc."""
    root = fresh(root)
    from PIL import Image

    generator = np.random.default_rng(seed)
    for index in range(images):
        height, width = size, size + 16 * int(generator.integers(0, 2))
        stained = index % 4 == 3
        ground, ink = (
            ((230, 200, 230), (110, 60, 140)) if stained else ((12, 12, 12), (150, 150, 150))
        )
        picture = np.tile(np.array(ground, np.float64), (height, width, 1))
        folder = root / "stage1_train" / f"{index:04d}{generator.bytes(6).hex()}"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        grid = np.indices((height, width))
        occupied = np.zeros((height, width), bool)
        for nucleus in range(int(generator.integers(3, 8))):
            radius = generator.uniform(size / 16, size / 7)
            centre = generator.uniform(radius, (height - radius, width - radius))
            disc = ((grid - centre[:, None, None]) ** 2).sum(0) < radius**2
            disc &= ~ndimage.binary_dilation(occupied)
            if disc.sum() < 12:
                continue
            occupied |= disc
            picture[disc] = np.array(ink) * generator.uniform(0.8, 1.2)
            Image.fromarray(disc.astype(np.uint8) * 255).save(
                folder / "masks" / f"{nucleus:02d}.png"
            )
        picture = ndimage.gaussian_filter(picture, (0.7, 0.7, 0)) + generator.normal(
            0, 6, picture.shape
        )
        alpha = np.full((height, width, 1), 255)
        rgba = np.concatenate([np.clip(np.rint(picture), 0, 255), alpha], axis=-1).astype(np.uint8)
        Image.fromarray(rgba).save(folder / "images" / f"{folder.name}.png")
    return root


PHANTOMS: dict[str, Callable[..., Path]] = {
    "acdc": volumes.write_acdc_phantom,
    "busi": pictures.write_busi_phantom,
    "cvc_clinicdb": pictures.write_cvc_phantom,
    "dicom": volumes.write_dicom_phantom,
    "dsb2018": write_dsb_phantom,
    "folder": pictures.write_folder_phantom,
    "glas": pictures.write_glas_phantom,
    "isic2017": pictures.write_isic2017_phantom,
    "isic2018": pictures.write_isic2018_phantom,
    "kvasir_seg": pictures.write_kvasir_phantom,
    "lits": volumes.write_lits_phantom,
    "msd": write_msd_phantom,
    "nnunet": write_nnunet_phantom,
    "npy": volumes.write_npy_phantom,
    "ph2": pictures.write_ph2_phantom,
}


def _describe(root: Path, description: dict) -> Path:
    (root / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return root
