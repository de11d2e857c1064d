"""Synthetic 2D data sets in the layouts of their archives, quirks included."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segfleet.preprocess.phantoms.drawing import blot, fresh, junk, write_picture

SKIN, LESION = (210, 170, 150), (110, 70, 60)
MUCOSA, POLYP = (180, 70, 60), (220, 140, 120)


def write_busi_phantom(root: str | Path, cases: int = 12, seed: int = 0, size: int = 48) -> Path:
    """BUSI: half benign, a third malignant, the rest normal with black masks; every fourth lesion
    image has two or three mask files; masks bilevel, grey, RGB or RGBA."""
    folder = fresh(root) / "Dataset_BUSI_with_GT"
    generator = np.random.default_rng(seed)
    kinds = {
        "benign": cases - cases // 3 - cases // 6,
        "malignant": cases // 3,
        "normal": cases // 6,
    }
    for kind, count in kinds.items():
        for index in range(1, count + 1):
            spots = 0 if kind == "normal" else 1 + (index % 4 == 0) + (index % 8 == 0)
            picture, numbers = blot(
                generator,
                (size, size + 8 * int(generator.integers(0, 3))),
                (120,) * 3,
                (40,) * 3,
                spots,
            )
            stem = folder / kind / f"{kind} ({index})"
            write_picture(stem.with_name(f"{stem.name}.png"), picture)
            for spot in range(max(1, spots)):
                mask = (numbers == spot + 1).astype(np.uint8) * 255 if spots else numbers
                name = f"{stem.name}_mask.png" if spot == 0 else f"{stem.name}_mask_{spot}.png"
                write_picture(stem.with_name(name), mask, ("1", "L", "RGB", "RGBA")[index % 4])
        if count:
            junk(folder / kind)
    return folder.parent


def write_cvc_phantom(root: str | Path, cases: int = 12, seed: int = 0, size: int = 48) -> Path:
    """CVC-ClinicDB: TIFF frames in folders whose name holds a blank, three frames a sequence
    (metadata.csv), masks of three channels."""
    folder = fresh(root) / "CVC-ClinicDB"
    generator = np.random.default_rng(seed)
    rows = ["sequence_id,frame_id,tif_image_path"]
    for frame in range(1, cases + 1):
        picture, numbers = blot(generator, (size, size + 16), MUCOSA, POLYP)
        write_picture(folder / "Original" / f"{frame}.tif", picture)
        write_picture(
            folder / "Ground Truth" / f"{frame}.tif", (numbers > 0).astype(np.uint8) * 255, "RGB"
        )
        rows.append(f"{1 + (frame - 1) // 3},{frame},TIF/Original/{frame}.tif")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    junk(folder / "Original", folder / "Ground Truth")
    return folder.parent


def write_kvasir_phantom(root: str | Path, cases: int = 10, seed: int = 0, size: int = 48) -> Path:
    """Kvasir-SEG: images of differing size and masks, both JPEG, so that the masks ring; the
    authors' lists; the bounding-box file."""
    folder = fresh(root) / "Kvasir-SEG"
    generator = np.random.default_rng(seed)
    names = []
    for index in range(cases):
        names.append(f"cju{index:02d}{generator.bytes(5).hex()}")
        picture, numbers = blot(
            generator, (size, size + 8 * int(generator.integers(0, 4))), MUCOSA, POLYP
        )
        write_picture(folder / "images" / f"{names[-1]}.jpg", picture)
        write_picture(
            folder / "masks" / f"{names[-1]}.jpg", (numbers > 0).astype(np.uint8) * 255, "RGB"
        )
    val = max(1, cases // 8)
    (folder / "train.txt").write_text("\n".join(names[val:]) + "\n", encoding="utf-8")
    (folder / "val.txt").write_text("\n".join(names[:val]) + "\n", encoding="utf-8")
    (folder / "kavsir_bboxes.json").write_text("{}\n", encoding="utf-8")
    junk(folder / "images", folder / "masks")
    return folder.parent


def write_glas_phantom(root: str | Path, cases: int = 12, seed: int = 0, size: int = 48) -> Path:
    """GlaS: half train, the rest test A and B, in one flat folder; masks are gland numbers; a
    patient of Grade.csv may be in all parts."""
    folder = fresh(root) / "Warwick QU Dataset (Released 2016_07_08)"
    generator = np.random.default_rng(seed)
    parts = {"train": cases - cases // 3 - cases // 6, "testA": cases // 3, "testB": cases // 6}
    rows = ["name, patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    for part, count in parts.items():
        for index in range(1, count + 1):
            picture, numbers = blot(
                generator,
                (size, size + 16),
                (220, 180, 210),
                (140, 80, 150),
                int(generator.integers(1, 4)),
            )
            write_picture(folder / f"{part}_{index}.bmp", picture)
            write_picture(folder / f"{part}_{index}_anno.bmp", numbers)
            rows.append(f"{part}_{index}, {1 + (index - 1) // 2}, benign, adenomatous")
    (folder / "Grade.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    junk(folder)
    return folder.parent


def write_isic2017_phantom(
    root: str | Path, cases: int = 12, seed: int = 0, size: int = 48
) -> Path:
    """ISIC 2017: JPEG images, superpixel files and a CSV between them, PNG masks, one of them spelt
    `_Segmentation`."""
    parts = {
        part: (f"ISIC-2017_{part}_Data", f"ISIC-2017_{part}_Part1_GroundTruth")
        for part in ("Training", "Validation", "Test_v2")
    }
    return _isic(fresh(root), parts, cases, seed, size, superpixels=True)


def write_isic2018_phantom(
    root: str | Path, cases: int = 12, seed: int = 0, size: int = 48
) -> Path:
    """ISIC 2018, task 1: JPEG images and PNG masks in folders with a licence and an attribution
    file each."""
    parts = {
        part: (f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth")
        for part in ("Training", "Validation", "Test")
    }
    return _isic(fresh(root), parts, cases, seed, size, superpixels=False)


def _isic(
    root: Path,
    parts: dict[str, tuple[str, str]],
    cases: int,
    seed: int,
    size: int,
    superpixels: bool,
) -> Path:
    generator = np.random.default_rng(seed)
    shares = (cases - 2 * (cases // 4), cases // 4, cases // 4)
    numbers_left = iter(np.sort(generator.choice(16000, cases, replace=False)))
    for (images, masks), count in zip(parts.values(), shares, strict=True):
        for index in range(count):
            name = f"ISIC_{next(numbers_left):07d}"
            shape = (
                size + 8 * int(generator.integers(0, 2)),
                size + 8 * int(generator.integers(0, 4)),
            )
            picture, numbers = blot(generator, shape, SKIN, LESION)
            write_picture(root / images / f"{name}.jpg", picture)
            suffix = "Segmentation" if superpixels and index == 1 else "segmentation"
            write_picture(
                root / masks / f"{name}_{suffix}.png", (numbers > 0).astype(np.uint8) * 255
            )
            if superpixels:
                write_picture(root / images / f"{name}_superpixels.png", picture[:, :, ::-1])
        for folder in (images, masks) if count else ():
            (root / folder / "LICENSE.txt").write_text("CC0\n", encoding="utf-8")
            (root / folder / "ATTRIBUTION.txt").write_text("Synthetic\n", encoding="utf-8")
    return root


def write_ph2_phantom(root: str | Path, cases: int = 8, seed: int = 0, size: int = 48) -> Path:
    """PH2: a folder per image with three folders of BMP files, lesions bilevel, ids with gaps, a
    table of diagnoses."""
    folder = fresh(root) / "PH2Dataset"
    generator = np.random.default_rng(seed)
    for number in np.sort(generator.choice(np.arange(2, 438), cases, replace=False)):
        name = f"IMD{number:03d}"
        case = folder / "PH2 Dataset images" / name
        picture, numbers = blot(
            generator, (size, size + 8 + int(generator.integers(0, 3))), SKIN, LESION
        )
        write_picture(case / f"{name}_Dermoscopic_Image" / f"{name}.bmp", picture)
        write_picture(
            case / f"{name}_lesion" / f"{name}_lesion.bmp",
            (numbers > 0).astype(np.uint8) * 255,
            "1",
        )
        for colour in range(int(generator.integers(0, 3))):
            write_picture(
                case / f"{name}_roi" / f"{name}_R{colour + 1}.bmp",
                (numbers > 0).astype(np.uint8) * 255,
                "1",
            )
    (folder / "PH2_dataset.txt").write_text("|| Name || Diagnosis ||\n", encoding="utf-8")
    junk(folder / "PH2 Dataset images")
    return folder.parent


def write_folder_phantom(root: str | Path, cases: int = 10, seed: int = 0, size: int = 48) -> Path:
    """images/ and masks/: grey, RGB and RGBA images, masks of 0/255, grey or in colours."""
    root = fresh(root)
    generator = np.random.default_rng(seed)
    for index in range(cases):
        picture, numbers = blot(
            generator, (size, size + 8 * int(generator.integers(0, 2))), SKIN, LESION
        )
        write_picture(
            root / "images" / f"image{index:02d}.png", picture, ("RGB", "RGBA", "L")[index % 3]
        )
        name = f"image{index:02d}{'_mask' if index % 2 else ''}.png"
        write_picture(root / "masks" / name, (numbers > 0).astype(np.uint8) * 255)
    junk(root / "images", root / "masks")
    return root
