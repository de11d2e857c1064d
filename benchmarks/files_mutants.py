"""Damaged files by the 100,000: tracebacks, hangs, crashes, memory.

    python benchmarks/files_mutants.py 120000
    python benchmarks/files_mutants.py 120000 --until 13:30    stops by the clock; goes on next time
    python benchmarks/files_mutants.py --again                 the faults that are saved, once more
    python benchmarks/files_mutants.py 200000 --only lzw.tif   one kind of file; nothing is saved

Three quarters are files of images, of every format and codec; the others are what describes a data
set, in every layout (`layout_mutants.py`).

Result: benchmarks/results/files_mutants.json.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pydicom.encaps
import SimpleITK as sitk
import tifffile
from files_quirks import LAYOUTS
from layout_mutants import Layout
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.preprocess.files.dicom import RTSTRUCT, read_series
from segfleet.preprocess.files.images import ENDINGS, peek, read_file, read_label
from segfleet.preprocess.files.masks import read_mask
from segfleet.preprocess.files.npy import read_npy
from segfleet.preprocess.files.segments import read_rtstruct, read_seg
from segfleet.preprocess.phantoms.phantom import PHANTOMS

RESULT = Path(__file__).parent / "results" / "files_mutants.json"


def seeds(folder: Path) -> dict[str, bytes]:
    """Small sound files of every kind: name -> bytes."""
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 300, (5, 6, 7)).astype(np.int16)
    flat = rng.integers(0, 255, (9, 11, 3)).astype(np.uint8)
    picture = nib.Nifti1Image(volume, np.diag([1, 1, 2, 1]))
    picture.header.set_qform(picture.affine, 1)
    nib.save(picture, folder / "a.nii")
    nib.save(picture, folder / "a.nii.gz")
    nib.save(nib.Nifti2Image(volume, np.eye(4)), folder / "b.nii.gz")
    scaled = nib.Nifti1Image(volume * 0.3, np.eye(4))
    scaled.set_data_dtype(np.int16)
    nib.save(scaled, folder / "c.nii")
    itk = sitk.GetImageFromArray(volume)
    for name, packed in (
        ("a.nrrd", 0),
        ("b.nrrd", 1),
        ("a.mha", 0),
        ("b.mha", 1),
        ("a.mhd", 0),
        ("a.nhdr", 0),
    ):
        sitk.WriteImage(itk, str(folder / name), bool(packed))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr"):
        shown = Image.fromarray(flat).convert(mode)
        shown.save(folder / f"{mode}.tif")
        if mode not in ("CMYK", "LAB", "YCbCr"):
            shown.save(folder / f"{mode}.png")
        if mode in ("1", "L", "P", "RGB"):
            shown.save(folder / f"{mode}.bmp")
        if mode in ("L", "RGB", "CMYK"):
            shown.save(folder / f"{mode}.jpg")
    Image.fromarray(flat[..., 0].astype(np.uint16) * 99).save(folder / "deep.png")
    for codec in ("lzw", "zlib", "jpeg", "packbits", "zstd", "lzma"):
        tifffile.imwrite(folder / f"{codec}.tif", flat, compression=codec, photometric="rgb")
    deep = rng.integers(0, 2**16, (33, 37)).astype(np.uint16)
    for codec in ("lzw", "zlib", "jpeg2000", "webp"):
        how = {"predictor": True} if codec in ("lzw", "zlib") else {}
        shown = np.tile(flat, (4, 4, 1)) if codec == "webp" else deep
        tifffile.imwrite(
            folder / f"{codec}-tiles.tif", shown, tile=(16, 16), compression=codec, **how
        )
    tifffile.imwrite(folder / "big.tif", flat, bigtiff=True, byteorder=">", photometric="rgb")
    tifffile.imwrite(folder / "stack.tif", volume, photometric="minisblack")
    np.save(folder / "a.npy", flat)
    PHANTOMS["dicom"](folder / "dicom", cases=1)
    first = sorted((folder / "dicom").rglob("*.dcm"))[0]
    shutil.copy(first, folder / "a.dcm")
    d = pydicom.dcmread(first)
    d.compress("1.2.840.10008.1.2.5")
    d.save_as(folder / "rle.dcm")
    for syntax, encode in (("70", "ljpeg"), ("80", "jpegls"), ("90", "jpeg2k")):
        (folder / f"{encode}.dcm").write_bytes(with_picture(first, syntax, encode))
    slicer = {"Segment0_Name": "a", "Segment0_LabelValue": "1", "Segment0_Layer": "0"}
    nrrd.write(str(folder / "a.seg.nrrd"), (volume > 150).astype(np.uint8), slicer)
    (folder / "seg.dcm").write_bytes(segmentation(first))
    (folder / "rt.dcm").write_bytes(structures(first))
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def with_picture(source: Path, syntax: str, encode: str) -> bytes:
    """A slice whose pixels are a picture: lossless JPEG, JPEG-LS, JPEG 2000."""
    d = pydicom.dcmread(source)
    pixels = d.pixel_array.astype(np.uint16)
    d.PixelRepresentation, d.BitsAllocated, d.BitsStored, d.HighBit = 0, 16, 16, 15
    picture = getattr(imagecodecs, f"{encode}_encode")(
        pixels, **({"level": 0} if encode == "jpeg2k" else {})
    )
    d.PixelData = pydicom.encaps.encapsulate([bytes(picture)])
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = pydicom.uid.UID(f"1.2.840.10008.1.2.4.{syntax}")
    with io.BytesIO() as file:
        d.save_as(file)
        return file.getvalue()


def segmentation(source: Path) -> bytes:
    """A DICOM SEG of one segment over one slice."""
    from highdicom.seg import Segmentation, SegmentDescription
    from highdicom.sr.coding import CodedConcept

    d = pydicom.dcmread(source)
    for key in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"):
        setattr(d, key, "")
    d.StudyID, d.ReferringPhysicianName, d.SliceThickness = "", "", 3
    code, uid = CodedConcept("1", "99X", "x"), str(d.SOPInstanceUID)
    segment = SegmentDescription(1, "a", code, code, "MANUAL")
    found = Segmentation(
        [d], (d.pixel_array > 0)[None], "BINARY", [segment], series_instance_uid=uid + ".1",
        series_number=2, sop_instance_uid=uid + ".2", instance_number=1, manufacturer="x",
        manufacturer_model_name="x", software_versions="x", device_serial_number="x",
    )  # fmt: skip
    with io.BytesIO() as file:
        found.save_as(file)
        return file.getvalue()


def structures(source: Path) -> bytes:
    """An RTSTRUCT of one square on a slice."""
    d = pydicom.dcmread(source)
    x, y, z = (float(v) for v in d.ImagePositionPatient)
    name, contour, region, found = (pydicom.Dataset() for _ in range(4))
    name.ROINumber, name.ROIName = 1, "a"
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.ContourData = [x, y, z, x + 5, y, z, x + 5, y + 5, z, x, y + 5, z]
    region.ReferencedROINumber, region.ContourSequence = 1, [contour]
    found.SOPClassUID, found.SOPInstanceUID = RTSTRUCT, d.SOPInstanceUID
    found.StructureSetROISequence, found.ROIContourSequence = [name], [region]
    found.file_meta = d.file_meta
    with io.BytesIO() as file:
        found.save_as(file)
        return file.getvalue()


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four faults, mostly in the first bytes, where headers are."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            break
        reach = len(out) if rng.random() < 0.4 else min(len(out), 700)
        at = int(rng.integers(0, reach))
        kind = rng.integers(0, 7)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            out[at] = int(rng.choice([0, 1, 127, 128, 255, 32, 45, 57]))
        elif kind == 2:
            out = out[:at]
        elif kind == 3:
            out[at : at + 4] = rng.choice(
                [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\x80\x7f"]
            )
        elif kind == 4:
            out[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 40))).astype(np.uint8))
        elif kind == 5:
            del out[at : at + int(rng.integers(1, 40))]
        else:
            other = int(rng.integers(0, len(out)))
            out[at : at + 8] = out[other : other + 8]
    return bytes(out)


def mutant(index: int, name: str, known: dict[str, bytes]) -> bytes:
    rng = np.random.default_rng(index)
    data = known[name]
    if name.endswith(".nii.gz") and rng.random() < 0.5:  # inside the packing
        return gzip.compress(mutated(gzip.decompress(data), rng), 1)
    return mutated(data, rng)


def described(index: int, layout: Layout) -> str:
    """How checking a data set ends, one of whose documents is damaged."""
    layout.damage(np.random.default_rng(index), mutated)
    peak, began = resident(), time.process_time()
    try:
        result = layout.look()
    finally:
        layout.mend()
    if (grown := resident() - peak) > 3 * LEAST:
        return f"MEMORY: {grown / 2**20:.0f} MiB"
    return (
        f"SLOW: {time.process_time() - began:.1f} s" if time.process_time() - began > 5 else result
    )


def opened(index: int, name: str, known: dict[str, bytes]) -> str:
    """How reading a damaged file in the working folder ends."""
    data = mutant(index, name, known)
    path = Path.cwd() / f"mutant-{name}"
    path.write_bytes(data)
    before, began = resident(), time.process_time()
    result = read(path)
    seconds = time.process_time() - began
    grown = resident() - before
    declared = 8 * int(np.prod(peek(path)))
    path.unlink()
    if grown > 3 * max(declared, LEAST):
        return f"MEMORY: {grown / 2**20:.0f} MiB for {declared / 2**20:.0f}"
    return f"SLOW: {seconds:.1f} s" if seconds > 5 else result


def resident() -> int:
    """Bytes that this process has had in memory at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read(path: Path) -> str:
    """How reading ends: "read", "refused" or the error that should not be."""
    try:
        peek(path)
        if path.suffix == ".npy":
            read_npy(path, 3)
        elif path.name.endswith(ENDINGS):
            (read_label if path.name.endswith(".seg.nrrd") else read_file)(path)
            if path.suffix in (".png", ".bmp", ".tif", ".jpg"):
                with suppress(InputError):  # these pictures are no masks
                    read_mask(path)
        elif path.name.endswith("seg.dcm"):
            read_seg(path, {"a": 1})
        elif path.name.endswith("rt.dcm"):
            read_rtstruct(path, read_series([path.with_name("a.dcm")])[1], {"a": 1})
        else:
            read_series([path])
        return "read"
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"TWO LINES: {error!r}"
    except BaseException as error:
        return f"TRACEBACK: {type(error).__name__}: {str(error)[:200]}"


SAVED = 500  # numbers after which the result is
LEAST = 64 * 2**20  # bytes of memory that any decoder may take
LAYOUT = "layout "


def work(start: int, stop: int, names, known, layouts, folder: str, at, out) -> None:
    place = Path(folder)
    for name, data in known.items():
        (place / name).write_bytes(data)  # voxels that lie beside a header
    for layout in layouts.values():  # as one that died may have left them
        layout.mend()
    os.chdir(place)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libraries speak of damage themselves
    for index in range(start, stop):
        at.value = index
        name = names[index % len(names)]
        try:
            tried = (
                described(index, layouts[name]) if name in layouts else opened(index, name, known)
            )
        except Exception as error:
            tried = f"FAULT OF THIS SCRIPT: {type(error).__name__}: {str(error)[:200]}"
        out.put((index, name, tried))
    out.put(None)


def mutants(count: int, until: str, only: str) -> None:
    """Those up to number `count` that the saved result has not; it is saved again every few
    hundred."""
    with tempfile.TemporaryDirectory() as folder:
        known = seeds(Path(folder))
    names = [name for name in known if not name.endswith(".raw")]
    names += [f"{LAYOUT}{name}" for name in sorted(LAYOUTS)]
    names = [name for name in names if only in ("", name)]
    results, per_kind, faults, start, before, mended = resumed(names)
    began = processor_time()
    with tempfile.TemporaryDirectory() as folder:
        own = [name for name in names if name.startswith(LAYOUT)]
        layouts = {n: Layout(n.removeprefix(LAYOUT), Path(folder) / n) for n in own}
        while start < count and not (until and time.strftime("%H:%M") >= until):
            stop = min(count, start + SAVED)
            start = batch(start, stop, (names, known, layouts), results, per_kind, faults)
            print(start, dict(results), len(faults), flush=True)
            document = {
                "files": start,
                "kinds": len(names),
                "results": dict(results),
                "faults": faults[:50],
                "mended": mended,  # faults that the code after them has no more
                "cpu_seconds": round(before + processor_time() - began),
                "by_kind": {name: dict(c) for name, c in per_kind.items()},
            }
            if not only:
                RESULT.write_text(json.dumps(document, indent=1) + "\n")


def resumed(names: list[str]) -> tuple[Counter, dict[str, Counter], list, int, float, list]:
    """What the saved result of the same kinds of files counts so far."""
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if list(found.get("by_kind", ())) != names:
        return Counter(), {name: Counter() for name in names}, [], 0, 0.0, []
    per_kind = {name: Counter(counts) for name, counts in found["by_kind"].items()}
    own = (found["faults"], found["files"], found["cpu_seconds"], found.get("mended", []))
    return Counter(found["results"]), per_kind, *own


def processor_time() -> float:
    """Of this process and those that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def used_by(pid: int) -> float:
    """Seconds of processors that a process has used; 0 of one that has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def tried_again() -> None:
    """The faults of the saved result, with the code of today: what ends well is counted as that and
    kept as mended."""
    document = json.loads(RESULT.read_text())
    with tempfile.TemporaryDirectory() as folder:
        known = seeds(Path(folder))
    names = list(document["by_kind"])
    results = Counter(document["results"])
    per_kind = {name: Counter(counts) for name, counts in document["by_kind"].items()}
    left: list = []
    with tempfile.TemporaryDirectory() as folder:
        own = [name for name in names if name.startswith(LAYOUT)]
        layouts = {n: Layout(n.removeprefix(LAYOUT), Path(folder) / n) for n in own}
        for index, name, kind, *_ in document["faults"]:
            count = len(left)
            batch(index, index + 1, (names, known, layouts), results, per_kind, left)
            was = kind.partition(":")[0]
            results[was] -= 1
            per_kind[name][was] -= per_kind[name][was] > 0
            if len(left) == count:
                document.setdefault("mended", []).append([index, name, kind])
            print(index, name, kind, left[count:] or "mended", flush=True)
    document["faults"], document["results"] = left, dict(+results)
    document["by_kind"] = {name: dict(+counts) for name, counts in per_kind.items()}
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


def batch(start, stop, what, results, per_kind, faults) -> int:
    """One worker's share; where it dies or hangs, the next number to look at."""
    context, names = multiprocessing.get_context("fork"), what[0]
    at, out = context.Value("q", start), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=work, args=(start, stop, *what, folder, at, out))
        process.start()
        seen, last, used = start, time.monotonic(), 0.0
        while True:
            try:
                item = out.get(timeout=1)
            except Exception:
                # the work's own time, for other jobs may have the machine
                stuck = time.monotonic() - last > 900 or used_by(process.pid) - used > 60
                if process.is_alive() and not stuck:
                    continue
                kind = "HANG" if process.is_alive() else f"CRASH: {process.exitcode}"
                process.kill()
                process.join()
                index = int(at.value)
                name = names[index % len(names)]
                results[kind.partition(":")[0]] += 1
                faults.append([index, name, kind])
                return index + 1
            last, used = time.monotonic(), used_by(process.pid)
            if item is None:
                break
            seen, name, result = item
            kind = result.partition(":")[0]
            results[kind] += 1
            per_kind[name][kind] += 1
            if kind not in ("read", "refused"):
                faults.append([seen, name, result])
        process.join()
    return stop


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=100_000)
    parser.add_argument("--until", default="", help="HH:MM, when to stop")
    parser.add_argument("--again", action="store_true", help="only the faults that are saved")
    parser.add_argument("--only", default="", help="one kind of file, as the result names it")
    options = parser.parse_args()
    if options.again:
        tried_again()
    else:
        mutants(options.count, options.until, options.only)
