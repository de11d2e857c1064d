"""Values and places of every format as two libraries of others give them: Pillow and ITK for
pictures, pynrrd and ITK for NRRD, pydicom and ITK for DICOM, over what files may differ in. NIfTI
(nibabel and ITK) stands in `test_formats.py`. Every reader of MetaImage for Python is ITK's own, so
the second word there is the header's.
"""

from __future__ import annotations

import zlib

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.pixels import apply_rescale
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from segfleet.preprocess.files.dicom import read_series
from segfleet.preprocess.files.images import peek, read_image
from segfleet.preprocess.files.itk import LPS
from tests.preprocess.test_dicom_series import PLANES, series
from tests.preprocess.test_formats import affine_of, grids, itk_affine

FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def by_itk(path) -> np.ndarray:
    """(C, Y, X), or (C, Z, Y, X) of several pages."""
    picture = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(picture)
    return np.moveaxis(array, -1, 0) if picture.GetNumberOfComponentsPerPixel() > 1 else array[None]


def by_pillow(path) -> np.ndarray:
    """(C, Y, X)."""
    array = np.asarray(Image.open(path))
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(len(shape))
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1e3, shape).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    noise = rng.integers(low, high, shape, endpoint=True)
    noise[..., : shape[-1] // 2] = high // 3  # something to pack
    return noise.astype(dtype)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as Pillow finds BigTIFF
@FEW
@given(
    dtype=st.sampled_from(["u1", "u2", "i2", "f4"]),
    channels=st.sampled_from([1, 1, 3]),
    packing=st.sampled_from([None, "lzw", "zlib", "packbits", "zstd"]),
    predictor=st.booleans(),
    tile=st.sampled_from([None, (16, 16), (32, 16)]),
    rows=st.sampled_from([None, 1, 5]),
    order=st.sampled_from("<>"),
    big=st.booleans(),
    white_is_low=st.booleans(),
    size=st.tuples(st.integers(1, 40), st.integers(2, 40)),
)
def test_tiff(  # noqa: PLR0913
    tmp_path, dtype, channels, packing, predictor, tile, rows, order, big, white_is_low, size
):
    array = values(dtype, (*size, 3) if channels > 1 else size)
    photometric = "rgb" if channels > 1 else "minisblack"
    if white_is_low and channels == 1 and dtype[0] == "u":
        photometric = "miniswhite"
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, array, photometric=photometric, compression=packing, tile=tile, bigtiff=big,
        predictor=predictor and packing in ("lzw", "zlib") and dtype != "f4", byteorder=order,
        rowsperstrip=None if tile else rows,
    )  # fmt: skip
    found = read_image([path])[0][:, 0]
    assert found.shape == (channels, *size) == (peek(path)[0], *peek(path)[2:])
    if packing != "zstd" and not tile:  # which ITK does not know, or reads as colours of 8 bits
        itk = by_itk(path)
        top = np.iinfo(dtype).max if photometric == "miniswhite" else 0  # ITK gives what is stored
        assert np.array_equal(found, top - itk if top else itk)
    # Pillow has no 16-bit colours, no integers below 0, and gives 16 bits upside down as they are
    known = [("u1", 1), ("u1", 3)]
    known += [("f4", 1)] if order == "<" or not packing else []  # else it turns the bytes twice
    known += [("u2", 1)] if photometric == "minisblack" else []
    if (dtype, channels) in known and not (big and order == ">"):  # which it does not open
        assert np.array_equal(found, by_pillow(path))


@FEW
@given(
    dtype=st.sampled_from(["u1", "u2", "f4"]),
    depth=st.integers(2, 6),
    packing=st.sampled_from([None, "lzw", "zlib"]),
)
def test_tiff_of_several_pages(tmp_path, dtype, depth, packing):
    array = values(dtype, (depth, 11, 9))
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", compression=packing)
    found = read_image([tmp_path / "a.tif"])[0]
    assert np.array_equal(found, by_itk(tmp_path / "a.tif"))
    with Image.open(tmp_path / "a.tif") as pages:
        for z in range(depth):
            pages.seek(z)
            assert np.array_equal(found[0, z], np.asarray(pages))


@FEW
@given(
    kind=st.sampled_from([".png", ".bmp", ".jpg"]),
    mode=st.sampled_from(["L", "RGB", "RGBA", "I;16"]),
    level=st.sampled_from([0, 1, 9]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_png_bmp_and_jpeg(tmp_path, kind, mode, level, size):
    if mode == "I;16" and kind != ".png" or mode == "RGBA" and kind == ".jpg":
        mode = "L"
    channels = {"RGB": 3, "RGBA": 4}.get(mode, 1)
    array = values("u2" if mode == "I;16" else "u1", (*size, channels) if channels > 1 else size)
    path = tmp_path / f"a{kind}"
    how = {
        ".png": {"compress_level": level},
        ".jpg": {"quality": 60 + 4 * level, "subsampling": 0},
    }.get(kind, {})
    Image.fromarray(array).save(path, **how)
    found = read_image([path])[0][:, 0]
    itk, pillow = (read(path) for read in (by_itk, by_pillow))
    if kind == ".bmp" and channels == 1:
        itk = itk[:1]  # ITK gives the palette of greys as colours
    shown = 3 if channels == 4 else channels  # opacity is dropped
    assert found.shape == (shown, *size)
    assert np.array_equal(found, pillow[:shown])
    apart = 4 if kind == ".jpg" else 0  # two decoders of JPEG round differently
    assert np.abs(found.astype(int) - itk[:shown]).max() <= apart


SPACES = {  # what a NRRD header may call its axes -> what makes (right, anterior, superior) of them
    "left-posterior-superior": np.diag([-1.0, -1, 1]),
    "right-anterior-superior": np.eye(3),
    "left-anterior-superior": np.diag([-1.0, 1, 1]),
}


@FEW
@given(
    grid=grids,
    dtype=st.sampled_from(["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"]),
    packing=st.sampled_from(["raw", "gzip", "ascii"]),
    order=st.sampled_from(["little", "big"]),
    space=st.sampled_from(sorted(SPACES)),
    kind=st.sampled_from([".nrrd", ".nhdr"]),
)
def test_nrrd(tmp_path, grid, dtype, packing, order, space, kind):
    import nrrd

    affine, array = affine_of(grid), values(dtype, (5, 4, 3))
    if np.dtype(dtype).kind == "f":
        array = np.round(array)  # ASCII keeps few digits
    turn = SPACES[space]  # its own inverse
    header = {
        "space": space, "kinds": ["domain"] * 3, "encoding": packing, "endian": order,
        "space directions": (turn @ affine[:3, :3]).T, "space origin": turn @ affine[:3, 3],
    }  # fmt: skip
    path = tmp_path / f"a{kind}"
    nrrd.write(str(path), array, header, detached_header=kind == ".nhdr")
    image, geometry = read_image([path])
    picture, (read, said) = sitk.ReadImage(str(path)), nrrd.read(str(path))
    assert np.array_equal(image[0].T, read) and np.array_equal(read, array)
    assert np.array_equal(image[0], sitk.GetArrayFromImage(picture))
    assert np.allclose(geometry.affine, affine, atol=1e-4)
    assert np.allclose(geometry.affine, itk_affine(picture), atol=1e-4)
    columns = SPACES[said["space"]] @ np.array(said["space directions"], float).T
    assert np.allclose(np.asarray(geometry.affine)[:3, :3], columns, atol=1e-4)
    assert np.allclose(geometry.spacing[::-1], picture.GetSpacing())


METAIMAGE = {"u1": "UCHAR", "i1": "CHAR", "i2": "SHORT", "u2": "USHORT", "i4": "INT", "f4": "FLOAT",
             "f8": "DOUBLE"}  # fmt: skip


@FEW
@given(
    grid=grids,
    dtype=st.sampled_from(sorted(METAIMAGE)),
    packed=st.booleans(),
    big=st.booleans(),
    channels=st.sampled_from([1, 3]),
)
def test_metaimage(tmp_path, grid, dtype, packed, big, channels):
    """A file written by hand, as the format's description says."""
    shape, affine = (3, 4, 5), LPS @ affine_of(grid)
    array = values(dtype, (*shape, channels))
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    data = array.astype((">" if big else "<") + dtype).tobytes()
    data = zlib.compress(data) if packed else data

    def row(numbers) -> str:
        return " ".join(f"{v:.12g}" for v in numbers)

    lines = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True",
        "BinaryDataByteOrderMSB": str(big), "CompressedData": str(packed),
        **({"CompressedDataSize": str(len(data))} if packed else {}),
        # a row for every axis of the voxels: its direction
        "TransformMatrix": row((affine[:3, :3] / sizes).T.ravel()), "Offset": row(affine[:3, 3]),
        "ElementSpacing": row(sizes), "DimSize": row(shape[::-1]),
        **({"ElementNumberOfChannels": str(channels)} if channels > 1 else {}),
        "ElementType": f"MET_{METAIMAGE[dtype]}", "ElementDataFile": "LOCAL",
    }  # fmt: skip
    path = tmp_path / "a.mha"
    path.write_bytes("".join(f"{k} = {v}\n" for k, v in lines.items()).encode() + data)
    image, geometry = read_image([path])
    picture = sitk.ReadImage(str(path))
    read = sitk.GetArrayFromImage(picture).reshape(*shape, channels)
    assert np.array_equal(image, np.moveaxis(read, -1, 0).astype(image.dtype))
    assert np.array_equal(image, np.moveaxis(array, -1, 0).astype(image.dtype))
    assert np.allclose(geometry.affine, affine_of(grid), atol=1e-4)
    assert np.allclose(geometry.affine, itk_affine(picture), atol=1e-4)


@FEW
@given(
    plane=st.sampled_from(sorted(PLANES)),
    step=st.sampled_from([0.5, 2.5, 10.0]),
    slope=st.sampled_from([None, ("1", "-1024"), ("2", "5"), ("0.25", "-3"), ("-1", "0")]),
    signed=st.booleans(),
    bits=st.sampled_from([12, 16]),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless]),
)
def test_dicom(tmp_path, plane, step, slope, signed, bits, syntax):
    for old in tmp_path.iterdir():
        old.unlink()
    tags = {"PixelRepresentation": int(signed), "BitsStored": bits, "HighBit": bits - 1}
    if slope:
        tags |= {"RescaleSlope": slope[0], "RescaleIntercept": slope[1]}
    paths = series(tmp_path, PLANES[plane], step, **tags)
    for path in paths:
        d = pydicom.dcmread(path)
        if not signed or bits < 16:  # no bits beyond those stored
            low = -(2 ** (bits - 1)) if signed else 0
            whole = np.clip(
                d.pixel_array.astype(int) + (0 if signed else 900), low, low + 2**bits - 1
            )
            d.PixelData = whole.astype("<i2" if signed else "<u2").tobytes()
        if syntax == RLELossless:
            d.compress(RLELossless, generate_instance_uid=False)
        else:
            d.file_meta.TransferSyntaxUID = syntax
        d.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    image, geometry = read_series(paths)
    if syntax == RLELossless:  # of pydicom's, which ITK refuses
        for path in paths:
            d = pydicom.dcmread(path)
            d.decompress(generate_instance_uid=False)
            d.save_as(path)
    picture = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    assert np.allclose(image[0], sitk.GetArrayFromImage(picture), rtol=1e-6)
    assert np.allclose(geometry.affine, itk_affine(picture), atol=1e-4)
    assert geometry.spacing == pytest.approx(picture.GetSpacing()[::-1])
    normal = np.cross(PLANES[plane][:3], PLANES[plane][3:])
    files = [pydicom.dcmread(path) for path in paths]
    files.sort(key=lambda d: float(normal @ np.array(d.ImagePositionPatient, float)))
    own = np.stack([apply_rescale(d.pixel_array, d) for d in files])
    assert np.allclose(image[0], own, rtol=1e-6)
    assert np.allclose(
        np.asarray(geometry.affine)[:3, 3],
        (LPS[:3, :3] @ np.array(files[0].ImagePositionPatient, float)),
    )
