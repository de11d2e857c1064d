"""Predicted labels back into files that lie exactly on the raw image."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import replacing, write_atomically
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import LPS, ending, stem
from segfleet.preprocess.files.nifti import label_bytes

WRITABLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff", ".png", ".bmp")  # lossless

# Black for the background, then colours that the colour-blind tell apart (Okabe and Ito), repeated.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (255, 255, 255),
)
PALETTE = bytes([0, 0, 0, *(part for i in range(255) for part in COLOURS[i % len(COLOURS)])])


def write_label(path: Path, label_ZYX: np.ndarray, geometry: Geometry) -> None:
    """Write class numbers with the shape, spacing and affine of `geometry`; the file appears whole
    or not at all.

    Raises InputError for an ending that loses values or cannot hold a volume.
    """
    path, kind = Path(path), ending(path)
    if kind not in WRITABLE:
        raise InputError(
            f"{path}: {kind} is lossy, labels would change. Use one of: {', '.join(WRITABLE)}"
        )
    assert label_ZYX.shape == tuple(geometry.shape), (
        f"label {label_ZYX.shape} does not lie on the grid {geometry.shape}"
    )
    label = np.ascontiguousarray(
        label_ZYX, np.uint8 if label_ZYX.max(initial=0) < 256 else np.uint16
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, suffix=kind) as temporary:
        if kind in (".nii", ".nii.gz"):
            data = label_bytes(label, geometry)
            temporary.write_bytes(gzip.compress(data, 6, mtime=0) if kind == ".nii.gz" else data)
        elif kind in (".nrrd", ".mha"):
            _itk(temporary, label, geometry)
        elif kind in (".tif", ".tiff"):
            import tifffile

            tifffile.imwrite(
                temporary,
                label[0] if len(label) == 1 else label,
                compression="zlib",
                photometric="minisblack",
            )
            if len(label) > 1:
                write_atomically(
                    path.with_name(f"{stem(path)}.json"),
                    json.dumps({"spacing": list(geometry.spacing)}),
                )
        else:
            from PIL import Image

            if len(label) != 1 or kind == ".bmp" and label.dtype != np.uint8:
                raise InputError(
                    f"{path}: {kind} holds one slice of 8-bit classes, found {label.shape} "
                    f"{label.dtype}. Use .nii.gz"
                )
            picture = Image.fromarray(label[0])
            if label.dtype == np.uint8:  # the values stay; a viewer shows a colour for each
                picture.putpalette(PALETTE)
            picture.save(temporary)


def write_image(path: Path, image_CZYX: np.ndarray, geometry: Geometry) -> None:
    """Values as they are, one channel or 8-bit colours, as NIfTI or PNG on the grid of
    `geometry`. Raises InputError for another ending."""
    import nibabel as nib
    from PIL import Image

    path, kind = Path(path), ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".png":
        flat = np.moveaxis(image_CZYX[:, 0], 0, -1)
        Image.fromarray(flat[..., 0] if flat.shape[-1] == 1 else flat).save(path)
    elif kind in (".nii", ".nii.gz"):
        affine = (
            np.diag([*geometry.spacing[::-1], 1.0])
            if geometry.affine is None
            else np.asarray(geometry.affine)
        )
        picture = nib.Nifti1Image(image_CZYX[0].T, affine, dtype=image_CZYX.dtype)
        picture.header.set_xyzt_units("mm")
        data = picture.to_bytes()
        path.write_bytes(gzip.compress(data, 6, mtime=0) if kind == ".nii.gz" else data)
    else:
        raise InputError(f"{path}: images are written as .nii.gz, .nii or .png")


def _itk(path: Path, label: np.ndarray, geometry: Geometry) -> None:
    import SimpleITK as sitk

    flat = geometry.file.dims < 3 and len(label) == 1
    picture = sitk.GetImageFromArray(label[0] if flat else label)
    n = 2 if flat else 3
    spacing = np.asarray(geometry.spacing[::-1])[:n]
    picture.SetSpacing([float(s) for s in spacing])
    if geometry.affine is not None:
        affine = LPS @ np.asarray(geometry.affine)
        picture.SetDirection([float(v) for v in (affine[:n, :n] / spacing).ravel()])
        picture.SetOrigin([float(v) for v in affine[:n, 3]])
    sitk.WriteImage(picture, str(path), True)
