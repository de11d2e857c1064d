"""What users' files really hold: every layout against some fifty quirks.

    python benchmarks/files_quirks.py            a table: layout x quirk -> what the check says
    python benchmarks/files_quirks.py table      the last result, as in docs/files.md

Result: benchmarks/results/files_quirks.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader, readers

RESULT = Path(__file__).parent / "results" / "files_quirks.json"


def header_edit(path: Path, **fields) -> None:
    data = bytearray(plain(path))
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for key, value in fields.items():
        header[key] = value
    data[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data)) if path.name.endswith(".gz") else bytes(data))


def plain(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def resave(path: Path, edit: Callable, affine: Callable = lambda a: a, cls=nib.Nifti1Image) -> None:
    old = nib.Nifti1Image.from_bytes(plain(path))
    data = cls(edit(np.asarray(old.dataobj)), affine(old.affine)).to_bytes()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def big_endian(path: Path) -> None:
    old = nib.Nifti1Image.from_bytes(plain(path))
    header = old.header.as_byteswapped(">")
    header["vox_offset"] = 352
    array = np.asarray(old.dataobj).astype(header.get_data_dtype())
    data = header.binaryblock + bytes(4) + array.tobytes(order="F")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def mirrored(affine: np.ndarray, length: int) -> np.ndarray:
    turn = np.diag([-1.0, 1, 1, 1])
    turn[0, 3] = length - 1
    return affine @ turn


def mirror(path: Path) -> None:
    length = nib.Nifti1Image.from_bytes(plain(path)).shape[0]
    resave(path, lambda a: a[::-1], lambda m: mirrored(m, length))


def odd_nan(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array.flat[0] = np.nan
    return array


def picture(path: Path, edit: Callable[[Image.Image], Image.Image], **how) -> None:
    with Image.open(path) as old:
        new = edit(old.copy())
    path.unlink()
    new.save(path, **how)


def palette(path: Path) -> None:
    with Image.open(path) as old:
        lit = np.asarray(old.convert("L")) > 0
    new = Image.fromarray((~lit).astype(np.uint8))
    new.putpalette([255, 255, 255, 0, 0, 0])
    path.unlink()
    new.convert("RGB").save(path) if path.suffix in (".jpg", ".jpeg") else new.save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    how = {"tiffinfo": {274: 3}} if path.suffix == ".tif" else {"exif": exif, "quality": 98}
    picture(path, lambda p: p.convert("RGB").rotate(180), **how)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def slope(path: Path) -> None:
    resave(path, lambda a: a.astype(np.int16))
    header_edit(path, scl_slope=2.0, scl_inter=-5.0)


def unit(path: Path) -> None:
    header_edit(path, xyzt_units=3)


def half_two(mask: Image.Image) -> Image.Image:
    """Classes 0, 1 and 2 in a mask: the left half of what was white is 2."""
    lit = np.asarray(mask.convert("L")) > 0
    right = np.cumsum(lit, axis=1) * 2 > lit.sum(axis=1, keepdims=True)
    return Image.fromarray((lit * (2 - right)).astype(np.uint8))


def deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def changed_array(path: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, edit(np.load(path)), allow_pickle=True)


def changed_slice(path: Path, **tags) -> None:
    d = pydicom.dcmread(path)
    for key, value in tags.items():
        setattr(d, key, value)
    d.save_as(path)


def inverted(path: Path) -> None:
    """MONOCHROME1: the same grey values, stored upside down."""
    d = pydicom.dcmread(path)
    bits = 2**d.BitsStored - 1
    low, sign = (d.pixel_array, -1) if d.PixelRepresentation else (bits - d.pixel_array, 1)
    if sign < 0:
        low = -1 - low
    d.PhotometricInterpretation, d.PixelData = "MONOCHROME1", low.astype(low.dtype).tobytes()
    d.save_as(path)


def moved(path: Path, by: float, axis: int) -> None:
    d = pydicom.dcmread(path)
    place = [float(v) for v in d.ImagePositionPatient]
    place[axis] += by
    d.ImagePositionPatient = place
    d.save_as(path)


def copied(path: Path) -> None:
    d = pydicom.dcmread(path)
    d.SOPInstanceUID = str(d.SOPInstanceUID) + ".9"
    d.save_as(path.with_name("copy" + path.name))


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


IMAGE, LABEL, ALL = "image", "label", "all"
SAME, PROBLEM = "the same arrays", "a problem"  # with a warning or without
WARNED, OTHER = "a warning and the same arrays", "other values, as the file says"
MAY = "a problem, or the same arrays"  # where layouts may differ
Quirk = tuple[str, str, Callable[[Path], None]]
ANY_QUIRKS: dict[str, Quirk] = {
    "image cut off": (IMAGE, PROBLEM, cut),
    "image of 0 bytes": (IMAGE, PROBLEM, lambda p: p.write_bytes(b"")),
    "image is a pipe": (IMAGE, PROBLEM, pipe),
    "image is a broken link": (IMAGE, PROBLEM, link),
    "image missing": (IMAGE, PROBLEM, lambda p: p.unlink()),
    "image is a web page": (IMAGE, PROBLEM, lambda p: p.write_bytes(b"<html>404</html>" * 99)),
}
VOLUME_QUIRKS: dict[str, Quirk] = {
    "NIfTI-2": (IMAGE, SAME, lambda p: resave(p, lambda a: a, cls=nib.Nifti2Image)),
    "packed or not, against its name": (
        IMAGE,
        SAME,
        lambda p: p.write_bytes(plain(p) if p.name.endswith(".gz") else gzip.compress(plain(p))),
    ),
    "big endian": (IMAGE, SAME, big_endian),
    "slope and intercept": (IMAGE, OTHER, slope),
    "micrometres": (ALL, SAME, unit),
    "pixdim against sform": (
        IMAGE, WARNED, lambda p: header_edit(p, pixdim=[1, 9, 9, 9, 1, 1, 1, 1]),
    ),
    "pixdim of zero": (IMAGE, WARNED, lambda p: header_edit(p, pixdim=[1, 1, 1, 0, 1, 1, 1, 1])),
    "singular affine": (IMAGE, PROBLEM, lambda p: header_edit(p, srow_x=0, sform_code=1)),
    "spacing of 1e30": (
        IMAGE, PROBLEM, lambda p: header_edit(p, srow_x=[1e30, 0, 0, 0], sform_code=1),
    ),
    "a voxel of nan": (IMAGE, PROBLEM, lambda p: resave(p, odd_nan)),
    "label mirrored with its header": (LABEL, MAY, mirror),
    "label of 0.99999": (
        LABEL, WARNED, lambda p: resave(p, lambda a: a.astype(np.float32) * 0.999999),
    ),
    "label of 0.7": (LABEL, PROBLEM, lambda p: resave(p, lambda a: a.astype(np.float32) * 0.7)),
    "undeclared class": (LABEL, PROBLEM, lambda p: resave(p, lambda a: np.where(a > 0, 77, a))),
    "label cut off": (LABEL, PROBLEM, cut),
    "dim of -1": (IMAGE, PROBLEM, lambda p: header_edit(p, dim=[3, -1, 5, 5, 1, 1, 1, 1])),
}  # fmt: skip
PICTURE_QUIRKS: dict[str, Quirk] = {
    "mask with a palette, white first": (LABEL, SAME, palette),
    "mask of 0, 1 and 2": (LABEL, MAY, lambda p: picture(p, half_two)),
    "mask in colours": (LABEL, SAME, lambda p: picture(p, lambda m: m.convert("RGB"))),
    "mask of another size": (
        LABEL, PROBLEM, lambda p: picture(p, lambda m: m.resize((9, 9), Image.Resampling.NEAREST)),
    ),
    "picture turned by EXIF": (IMAGE, SAME, turned),
    "picture with alpha": (IMAGE, SAME, lambda p: picture(p, lambda i: i.convert("RGBA"))),
    "grey picture": (IMAGE, OTHER, lambda p: picture(p, lambda i: i.convert("L"))),
    "picture with a palette": (IMAGE, OTHER, lambda p: picture(p, lambda i: i.quantize(64))),
    "picture of 16 bits": (IMAGE, PROBLEM, lambda p: picture(p, deep)),
}  # fmt: skip
DICOM_QUIRKS: dict[str, Quirk] = {
    "slice upside down (MONOCHROME1)": (IMAGE, SAME, inverted),
    "slope of one slice": (
        IMAGE, OTHER, lambda p: changed_slice(p, RescaleSlope=2, RescaleIntercept=3),
    ),
    "slope of 0": (IMAGE, PROBLEM, lambda p: changed_slice(p, RescaleSlope=0)),
    "slice moved along the normal": (IMAGE, PROBLEM, lambda p: moved(p, 0.9, 2)),
    "slice shifted aside": (IMAGE, PROBLEM, lambda p: moved(p, 7.0, 1)),
    "slice twice": (IMAGE, PROBLEM, copied),
    "slice of another series": (
        IMAGE, PROBLEM, lambda p: changed_slice(p, SeriesInstanceUID="1.2.3.4"),
    ),
    "slice of another size": (IMAGE, PROBLEM, lambda p: changed_slice(p, Rows=3)),
    "slice without its place": (
        IMAGE, PROBLEM, lambda p: changed_slice(p, ImagePositionPatient=None),
    ),
    "named without ending": (IMAGE, SAME, lambda p: p.rename(p.with_suffix(""))),
}  # fmt: skip
ARRAY_QUIRKS: dict[str, Quirk] = {
    "array in columns": (IMAGE, SAME, lambda p: changed_array(p, np.asfortranarray)),
    "array, big endian": (
        IMAGE, SAME, lambda p: changed_array(p, lambda a: a.astype(a.dtype.newbyteorder(">"))),
    ),
    "array of objects": (IMAGE, PROBLEM, lambda p: changed_array(p, lambda a: a.astype(object))),
    "array of complex numbers": (
        IMAGE, PROBLEM, lambda p: changed_array(p, lambda a: a.astype(complex)),
    ),
    "a value of nan": (IMAGE, PROBLEM, lambda p: changed_array(p, odd_nan)),
    "array of 4 axes": (IMAGE, PROBLEM, lambda p: changed_array(p, lambda a: a[None, None])),
    "label undeclared": (LABEL, PROBLEM, lambda p: changed_array(p, lambda a: a + 77)),
    "label of another size": (LABEL, PROBLEM, lambda p: changed_array(p, lambda a: a[:-3])),
}  # fmt: skip
QUIRKS = {**ANY_QUIRKS, **VOLUME_QUIRKS, **PICTURE_QUIRKS, **DICOM_QUIRKS, **ARRAY_QUIRKS}
assert len(QUIRKS) >= 30


def quirks_of(path: Path, what: str) -> dict[str, Quirk]:
    """Those that an image or label file can have, by its format."""
    name = path.name.lower()
    own: dict[str, Quirk] = {}
    if name.endswith((".nii", ".nii.gz")):
        own = VOLUME_QUIRKS
    elif name.endswith(".dcm"):
        own = DICOM_QUIRKS
    elif name.endswith(".npy"):
        own = ARRAY_QUIRKS
    elif name.endswith(PICTURES):
        own = {k: v for k, v in PICTURE_QUIRKS.items() if holds(name.rpartition(".")[2], k)}
    return {k: v for k, v in {**ANY_QUIRKS, **own}.items() if (v[0] == LABEL) == (what == LABEL)}


PICTURES = (".png", ".bmp", ".tif", ".jpg", ".jpeg")


def holds(kind: str, quirk: str) -> bool:
    """Whether a container can have it."""
    poor = {"picture with alpha", "picture of 16 bits", "picture with a palette"}
    return not (
        quirk in poor and kind in ("jpg", "jpeg")
        or kind == "bmp" and quirk in ("picture turned by EXIF", "picture of 16 bits")
    )  # fmt: skip


def bids(root: Path) -> None:
    """A data set of BIDS, of the volumes of another phantom."""
    PHANTOMS["msd"](root / "msd", cases=4, size=(8, 16, 16))
    for n, ref in enumerate(open_reader("msd", root / "msd").refs()):
        raw, done = root / f"sub-{n}/anat", root / f"derivatives/manual/sub-{n}/anat"
        for folder in (raw, done):
            folder.mkdir(parents=True)
        shutil.move(ref.images[0], raw / f"sub-{n}_T1w.nii.gz")
        shutil.move(ref.labels[0], done / f"sub-{n}_dseg.nii.gz")
    names = "index\tname\n1\tshell\n2\tcore\n"
    (root / "derivatives/manual/desc-manual_dseg.tsv").write_text(names)
    (root / "dataset_description.json").write_text("{}")
    shutil.rmtree(root / "msd")


def monai(root: Path) -> None:
    """A datalist of MONAI."""
    PHANTOMS["msd"](root, cases=4, size=(8, 16, 16))
    refs = open_reader("msd", root).refs()
    parts = [(("image", ref.images), ("label", ref.labels)) for ref in refs]
    listed = [{key: str(p[0].relative_to(root)) for key, p in part} for part in parts]
    labels = {"0": "background", "1": "shell", "2": "core"}
    (root / "dataset.json").unlink()
    (root / "dataset_0.json").write_text(
        json.dumps({"training": listed, "labels": labels, "modality": {"0": "MRI"}})
    )


def outlined(root: Path, layout: str) -> None:
    """Polygons on the pictures of another phantom."""
    folder = root / "images" if layout == "coco" else root
    folder.mkdir(parents=True)
    square = [[5, 6], [15, 6], [15, 20], [5, 20]]
    images, annotations = [], []
    for n in range(4):
        array = np.random.default_rng(n).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(array).save(folder / f"p{n}.png")
        shapes = [{"label": "cell", "points": square, "shape_type": "polygon"}]
        if layout == "labelme":
            text = json.dumps({"imagePath": f"p{n}.png", "shapes": shapes})
            (folder / f"p{n}.json").write_text(text)
        images.append({"id": n, "file_name": f"p{n}.png", "height": 40, "width": 50})
        flat = [v for point in square for v in point]
        annotations.append({"id": n, "image_id": n, "category_id": 1, "segmentation": [flat]})
    if layout == "coco":
        named = [{"id": 1, "name": "cell"}]
        document = {"images": images, "annotations": annotations, "categories": named}
        (root / "annotations.json").write_text(json.dumps(document))


LAYOUTS: dict[str, Callable[[Path], object]] = {
    **PHANTOMS,
    "bids": bids,
    "monai": monai,
    "coco": lambda root: outlined(root, "coco"),
    "labelme": lambda root: outlined(root, "labelme"),
}


def quirks() -> None:
    assert set(LAYOUTS) == set(readers())
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(LAYOUTS):
            table[name] = dict.fromkeys(QUIRKS, "does not apply")
            sound = Path(folder) / name
            LAYOUTS[name](sound)
            ref = open_reader(name, sound).refs()[0]
            for what, paths in ((IMAGE, ref.images), (LABEL, ref.labels)):
                for quirk, (which, expected, edit) in (
                    quirks_of(paths[0], what).items() if paths else ()
                ):
                    root = Path(folder) / "raw"
                    shutil.copytree(sound, root, symlinks=True)
                    table[name][quirk] = outcome(name, root, which, expected, edit)
                    shutil.rmtree(root)
            print(name, Counter(t.partition(":")[0] for t in table[name].values()), flush=True)
    kinds = Counter(text.partition(":")[0] for row in table.values() for text in row.values())
    expected = {quirk: how[1] for quirk, how in QUIRKS.items()}
    document = {"counts": dict(kinds), "quirks": len(QUIRKS), "expected": expected, "table": table}
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


def table() -> None:
    """What the last result says, a row for every quirk, as Markdown."""
    found = json.loads(RESULT.read_text())
    print("| what the file holds | what is right | layouts | says, for instance |")
    print("| --- | --- | --- | --- |")
    for quirk, expected in found["expected"].items():
        texts = [row[quirk] for row in found["table"].values() if row[quirk] != "does not apply"]
        right = sum(text.startswith("right") for text in texts)
        said = next((text.split(": ", 2)[2] for text in texts if text.count(": ") > 1), "")
        said = said.replace("|", "\\|")[:140]
        print(f"| {quirk} | {expected} | {right} of {len(texts)} | {said} |")


def outcome(name: str, root: Path, which: str, expected: str, edit: Callable) -> str:
    """right or WRONG, and what the check says of a data set in which one file has the quirk."""
    reader = open_reader(name, root)
    ref = reader.refs()[0]
    before = reader.read(ref)
    files = {IMAGE: ref.images[:1], LABEL: ref.labels[:1], ALL: (*ref.images, *ref.labels)}[which]
    lossy = files[0].suffix.lower() in (".jpg", ".jpeg")
    for path in files:
        edit(path)
    started = time.process_time()
    try:
        reader = open_reader(name, root)
        found = survey(reader, workers=1)
    except InputError as error:
        return f"{'right' if expected in (PROBLEM, MAY) else 'WRONG'}: refused: {str(error)[:120]}"
    except Exception as error:
        return f"WRONG: TRACEBACK: {type(error).__name__}: {error}"
    if time.process_time() - started > 60:
        return "WRONG: HANG"
    own = [p for p in (*found.problems, *found.warnings) if p.case in (ref.id, "all")]
    said = [p for p in own if p.field not in ("orientation", "patients", "image")]
    said = said or list(found.problems)
    text = f"{said[0].field}: found {said[0].found}, expected {said[0].expected}" if said else ""
    if found.problems:
        return f"{'right' if expected in (PROBLEM, MAY) else 'WRONG'}: problem: {text}"
    ref = next(one for one in reader.refs() if one.id == ref.id)
    after = reader.read(ref)
    same = alike(before.image_CZYX, after.image_CZYX, lossy)
    same &= alike(before.label_ZYX, after.label_ZYX, lossy)
    kind = (WARNED if said else SAME) if same else OTHER
    fits = kind == expected or same and expected in (SAME, MAY)
    return f"{'right' if fits else 'WRONG'}: {kind}{': ' if text else ''}{text}"


def alike(one: np.ndarray, other: np.ndarray, lossy: bool) -> bool:
    if one.shape != other.shape or not lossy:
        return np.array_equal(one, other)
    return float(np.abs(one.astype(float) - other.astype(float)).mean()) < 4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("quirks", "table"), nargs="?", default="quirks")
    table() if parser.parse_args().what == "table" else quirks()
