"""Values and grids of every format, compared with libraries that the readers do not use for it."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from segfleet.preprocess.files.images import ImageError, peek, read_image, read_label
from segfleet.preprocess.files.itk import LPS
from segfleet.preprocess.files.writer import write_label
from segfleet.preprocess.readers.base import CaseRef, source_sha256

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TURNS = [
    np.array([[s if c == p[r] else 0 for c in range(3)] for r, s in enumerate(signs)], float)
    for p in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
grids = st.builds(
    lambda turn, angle, sizes, origin: (turn, angle, sizes, origin),
    st.sampled_from(TURNS),
    st.sampled_from([0.0, 0.0, 0.3, -1.1]),
    st.tuples(*[st.floats(0.2, 6).map(lambda v: round(v, 3))] * 3),
    st.tuples(*[st.integers(-200, 200)] * 3),
)


def affine_of(grid) -> np.ndarray:
    turn, angle, sizes, origin = grid
    c, s = np.cos(angle), np.sin(angle)
    tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ turn * sizes
    affine[:3, 3] = origin
    return affine


def itk_affine(picture: sitk.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(picture.GetDirection(), (3, 3)) * picture.GetSpacing()
    affine[:3, 3] = picture.GetOrigin()
    return LPS @ affine


@FEW
@given(
    grid=grids,
    dtype=st.sampled_from(["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8", "i8"]),
    order=st.sampled_from("<>"),
    version=st.sampled_from([1, 2]),
    unit=st.sampled_from([0, 1, 2, 3]),
    form=st.sampled_from(["sform", "qform", "both", "neither"]),
    slope=st.sampled_from([None, (1.0, 0.0), (2.5, -3.0), (0.0, 7.0), (np.nan, 1.0)]),
    packed=st.booleans(),
    data=st.data(),
)
def test_nifti_is_what_nibabel_and_itk_read(
    tmp_path, grid, dtype, order, version, unit, form, slope, packed, data
):
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    array = np.random.default_rng(0).integers(0, 120, shape).astype(order + dtype)
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(shape)
    affine = affine_of(grid)
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    if form in ("qform", "both"):
        header.set_qform(affine, 1)
    if form in ("sform", "both"):
        header.set_sform(affine, 2)
    header["qform_code"], header["sform_code"] = (
        form in ("qform", "both"),
        2 * (form in ("sform", "both")),
    )
    header["xyzt_units"] = unit
    if slope:
        header["scl_slope"], header["scl_inter"] = slope
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    gap = header.single_vox_offset - header.sizeof_hdr
    raw = header.binaryblock + bytes(gap) + array.tobytes(order="F")
    for old in tmp_path.iterdir():
        old.unlink()  # ITK takes a.nii for a.nii.gz
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    image, geometry = read_image([path])
    scale = {0: 1, 1: 1000, 2: 1, 3: 0.001}[unit]
    if not 1e-7 <= min(geometry.spacing) <= max(geometry.spacing) <= 1e4:
        return
    known = nib.load(path)
    assert np.allclose(image[0].T, known.get_fdata(), rtol=1e-6)
    expected = known.affine.copy()
    expected[:3] *= scale
    assert np.allclose(geometry.affine, expected, rtol=1e-5, atol=1e-4 * scale)
    zooms = np.array(known.header.get_zooms(), float) * scale
    assert np.allclose(geometry.spacing[::-1], zooms, rtol=1e-4)
    assert peek(path) == (1, *shape[::-1])
    if version == 2:  # which SimpleITK does not read
        return
    picture = sitk.ReadImage(str(path))
    unclear = bool(slope) and not slope[0] > 0  # ITK adds the intercept, the standard does not
    assert [w[0] for w in geometry.file.warnings] == ["scaling"] * unclear
    assert unclear or np.allclose(image[0], sitk.GetArrayFromImage(picture), rtol=1e-6)
    assert np.allclose(geometry.spacing[::-1], picture.GetSpacing(), rtol=1e-4)
    if form != "neither":
        assert np.allclose(geometry.affine, itk_affine(picture), rtol=1e-4, atol=1e-3 * scale)
    label = np.arange(np.prod(shape)).reshape(shape[::-1]) % 3
    write_label(tmp_path / "label.nii", label, geometry)
    written = sitk.ReadImage(str(tmp_path / "label.nii"))
    assert np.array_equal(sitk.GetArrayFromImage(written), label)
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, get)() == getattr(picture, get)()
    assert np.array_equal(nib.load(tmp_path / "label.nii").affine, known.affine)


@FEW
@given(
    grid=grids,
    dtype=st.sampled_from(
        ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
    ),
    kind=st.sampled_from([".nrrd", ".nhdr", ".mha", ".mhd"]),
    packed=st.booleans(),
    channels=st.sampled_from([1, 1, 3]),
)
def test_nrrd_and_metaimage_are_what_their_headers_say(
    tmp_path, grid, dtype, kind, packed, channels
):
    """pynrrd for the one, the header's own numbers for the other."""
    import nrrd

    shape = (3, 4, 5)
    array = np.random.default_rng(1).integers(0, 120, (*shape, channels)).astype(dtype)
    picture = sitk.GetImageFromArray(
        array if channels > 1 else array[..., 0], isVector=channels > 1
    )
    affine = LPS @ affine_of(grid)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    picture.SetSpacing(sizes.tolist())
    picture.SetDirection((affine[:3, :3] / sizes).ravel().tolist())
    picture.SetOrigin(affine[:3, 3].tolist())
    path = tmp_path / f"a{kind}"
    sitk.WriteImage(picture, str(path), packed)
    image, geometry = read_image([path])
    assert np.array_equal(image, np.moveaxis(array, -1, 0).astype(image.dtype))
    assert np.allclose(geometry.affine, affine_of(grid), atol=1e-5)
    assert peek(path) == (channels, *shape)
    if kind in (".nrrd", ".nhdr"):
        data, header = nrrd.read(str(path))
        assert np.array_equal(data.T.reshape(*shape, channels) if channels == 1 else data.T, array)
        columns = np.array(header["space directions"], float)[-3:].T
        assert np.allclose(LPS[:3, :3] @ columns, np.asarray(geometry.affine)[:3, :3], atol=1e-5)
    else:
        text = path.read_bytes()[:2000].decode("latin-1")
        said = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
        assert np.allclose(
            [float(v) for v in said["ElementSpacing"].split()], geometry.spacing[::-1]
        )
        assert np.allclose(
            LPS[:3, :3] @ [float(v) for v in said["Offset"].split()],
            np.asarray(geometry.affine)[:3, 3],
        )
        if not packed:
            voxels = (
                path.read_bytes()[-array.nbytes :]
                if kind == ".mha"
                else (tmp_path / said["ElementDataFile"].strip()).read_bytes()
            )
            assert np.array_equal(np.frombuffer(voxels, dtype).reshape(array.shape), array)


RGB = np.random.default_rng(2).integers(0, 255, (12, 17, 3)).astype(np.uint8)
RGB[2:9, 3:11] = (220, 180, 40)
MODES = {  # what is stored -> what it shows (a second library's word), how far it may be off
    "1": (Image.fromarray(RGB).convert("1"), 0),
    "L": (Image.fromarray(RGB).convert("L"), 0),
    "LA": (Image.fromarray(RGB).convert("LA"), 0),
    "P": (Image.fromarray(RGB).quantize(7), 0),
    "RGB": (Image.fromarray(RGB), 0),
    "RGBA": (Image.fromarray(RGB).convert("RGBA"), 0),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), 1),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), 1),
    "LAB": (Image.fromarray(RGB).convert("LAB"), 0),
    "I;16": (Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), 0),
}
HOLDS = {
    ".png": "1 L LA P RGB RGBA I;16",
    ".bmp": "1 L P RGB RGBA",
    ".tif": "1 L LA P RGB RGBA CMYK YCbCr LAB I;16",
    ".jpg": "L RGB CMYK",
}


def shown(picture: Image.Image) -> np.ndarray:
    """(C, Y, X) as Pillow shows it."""
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        picture = ImageCms.applyTransform(picture, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    modes = {"1": "L", "LA": "L", "P": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
    array = np.asarray(picture.convert(modes.get(picture.mode, picture.mode)))
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


CASES = [(kind, mode) for kind, modes in HOLDS.items() for mode in modes.split()]


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_a_picture_shows_the_same_in_every_container(kind, mode, orientation, tmp_path):
    picture, apart = MODES[mode]
    path, exif = tmp_path / f"a{kind}", Image.Exif()
    exif[0x0112] = orientation
    if kind == ".tif":
        picture.save(path, tiffinfo={274: orientation})
    elif kind == ".bmp":
        if orientation > 1:
            return
        picture.save(path)
    else:
        picture.save(
            path, exif=exif, **({"quality": 100, "subsampling": 0} if kind == ".jpg" else {})
        )
    image, geometry = read_image([path])
    stored = Image.open(path) if kind == ".jpg" else picture
    expected = np.stack([turned(channel, orientation) for channel in shown(stored)])
    assert image.shape[:1] + image.shape[2:] == expected.shape
    assert np.abs(image[:, 0].astype(int) - expected).max() <= apart
    assert geometry.shape[1:] == expected.shape[1:] == peek(path)[2:]


def turned(channel: np.ndarray, orientation: int) -> np.ndarray:
    """By Pillow, as the table of EXIF says."""
    names = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    flat = Image.fromarray(channel)
    if orientation == 1:
        return np.asarray(flat)
    return np.asarray(flat.transpose(Image.Transpose[names.split()[orientation - 2]]))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_keep_them(channels, tmp_path):
    import imagecodecs

    array = np.random.default_rng(3).integers(0, 65536, (5, 6, channels)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
    tifffile.imwrite(tmp_path / "a.tif", array[..., :3] if channels > 2 else array[..., 0])
    png, tif = (read_image([tmp_path / f"a{kind}"])[0] for kind in (".png", ".tif"))
    assert png.dtype == np.uint16 and np.array_equal(png, tif)


def test_palettes_of_tiffs_are_colours_for_images_and_classes_for_labels(tmp_path):
    index = np.arange(12, dtype=np.uint8).reshape(3, 4)
    table = np.random.default_rng(4).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", index, photometric="palette", colormap=table)
    image, _ = read_image([tmp_path / "a.tif"])
    assert np.array_equal(image[:, 0], (table // 257)[:, index])
    assert np.array_equal(read_label(tmp_path / "a.tif")[0][0], index)


def refused(path, text: str) -> None:
    with pytest.raises(ImageError, match=text) as caught:
        read_image([path])
    assert len(str(caught.value).splitlines()) == 1


def nifti(path, array=None, **fields) -> None:
    picture = nib.Nifti1Image(np.ones((3, 4, 5), np.int16) if array is None else array, np.eye(4))
    picture.to_filename(path)
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for key, value in fields.items():
        header[key] = value
    path.write_bytes(header.binaryblock + bytes(data[348:]))


SICK = {
    "pixdim of zero and no affine": ({"sform_code": 0, "pixdim": [1, 1, 0, 1, 1, 1, 1, 1]},
                                     "spacing: found 1x0x1"),
    "a negative pixdim and no affine": ({"sform_code": 0, "pixdim": [1, 1, -1, 1, 1, 1, 1, 1]},
                                        "spacing"),
    "a singular sform": ({"srow_x": [0, 0, 0, 0]}, "affine: found a matrix that is singular"),
    "an sform of nan": ({"srow_x": [np.nan, 0, 0, 0]}, "affine: found a matrix that is not finite"),
    "an endless slope": ({"scl_slope": np.inf, "scl_inter": 0}, "scaling: found slope inf"),
    "a slope with an intercept of nan": ({"scl_slope": 2, "scl_inter": np.nan}, "scaling"),
    "an unknown type": ({"datatype": 77}, "voxel type: found code 77"),
    "no axis": ({"dim": [0] * 8}, "dim: found"),
    "an axis of -1": ({"dim": [3, 3, -1, 5, 1, 1, 1, 1]}, "dim: found"),
    "more voxels than bytes": ({"dim": [3, 30, 30, 30, 1, 1, 1, 1]}, "damaged or truncated"),
    "voxels before the header's end": ({"vox_offset": 100}, "vox_offset: found 100"),
    "half of a pair": ({"magic": b"ni1"}, "half of a pair"),
    "spacing of 1e30": ({"srow_x": [1e30, 0, 0, 0], "pixdim": [1, 1e30, 1, 1, 1, 1, 1, 1]},
                        "spacing: found 1x1x1e"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SICK)
def test_headers_that_cannot_be_true_are_one_message(fault, tmp_path):
    fields, text = SICK[fault]
    nifti(tmp_path / "a.nii", **fields)
    refused(tmp_path / "a.nii", text)


DOUBTFUL = {
    "pixdim against sform": ({"pixdim": [1, 2, 1, 1, 1, 1, 1, 1]}, "spacing"),
    "pixdim of zero beside an sform": ({"pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}, "spacing"),
    "a negative pixdim beside an sform": ({"pixdim": [1, 1, -1, 1, 1, 1, 1, 1]}, "spacing"),
    "qform elsewhere": ({"qform_code": 1, "qoffset_x": 50}, "sform and qform"),
    "sheared": ({"srow_x": [1, 0.5, 0, 0], "pixdim": [1, 1, 1.118034, 1, 1, 1, 1, 1]}, "affine"),
    "a unit nobody knows": ({"xyzt_units": 5}, "xyzt_units"),
}


@pytest.mark.parametrize("doubt", DOUBTFUL)
def test_headers_that_contradict_themselves_are_warned_of(doubt, tmp_path):
    fields, field = DOUBTFUL[doubt]
    nifti(tmp_path / "a.nii", **fields)
    _, geometry = read_image([tmp_path / "a.nii"])
    (warning,) = geometry.file.warnings
    assert warning[0] == field
    assert np.allclose(
        geometry.spacing[::-1], np.linalg.norm(np.asarray(geometry.affine)[:3, :3], axis=0)
    )


def test_colours_of_nifti_are_channels(tmp_path):
    rgb = np.random.default_rng(5).integers(0, 255, (3, 4, 5, 3)).astype(np.uint8)
    fields = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb.view(fields).reshape(3, 4, 5), np.eye(4)), tmp_path / "a.nii.gz")
    image, _ = read_image([tmp_path / "a.nii.gz"])
    assert np.array_equal(image, rgb.T) and peek(tmp_path / "a.nii.gz") == (3, 5, 4, 3)
    known = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    assert np.array_equal(np.moveaxis(image, 0, -1), known)


def test_gzip_shows_in_the_bytes_not_in_the_name(tmp_path):
    data = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).to_bytes()
    (tmp_path / "a.nii").write_bytes(gzip.compress(data))
    (tmp_path / "b.nii.gz").write_bytes(data)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(data[:200]) + gzip.compress(data[200:]))
    images = [read_image([tmp_path / name])[0] for name in ("a.nii", "b.nii.gz", "c.nii.gz")]
    assert all(np.array_equal(image[0].T.ravel(), np.arange(60)) for image in images)
    spoilt = bytearray(gzip.compress(data))
    spoilt[-6] ^= 1  # of the checksum
    (tmp_path / "d.nii.gz").write_bytes(spoilt)
    refused(tmp_path / "d.nii.gz", "damaged or truncated")


def test_a_small_file_takes_no_more_memory_than_its_header_says(tmp_path):
    import tracemalloc

    data = nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)).to_bytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(data + bytes(2**28), 9))
    tracemalloc.start()
    refused(tmp_path / "bomb.nii.gz", "more bytes than its header speaks of")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    nifti(tmp_path / "huge.nii", dim=[3, 30000, 30000, 3000, 1, 1, 1, 1])
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress((tmp_path / "huge.nii").read_bytes()))
    refused(tmp_path / "huge.nii.gz", "damaged or truncated .its header speaks of")
    text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 99999 99999 9999\nencoding: gzip\n\nabc"
    (tmp_path / "huge.nrrd").write_text(text)
    refused(tmp_path / "huge.nrrd", "its header speaks of")
    tracemalloc.stop()


def test_what_an_image_was_read_from_is_in_its_hash(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 8, 8), np.uint8))
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    for kind in (".mhd", ".nhdr"):
        sitk.WriteImage(sitk.Image(4, 5, 6, sitk.sitkInt16), str(tmp_path / f"b{kind}"))
    for name, beside in (("a.tif", "a.json"), ("b.mhd", "b.raw"), ("b.nhdr", "b.raw")):
        ref = CaseRef(id="a", images=(tmp_path / name,), labels=())
        before = source_sha256(ref)
        data = bytearray((tmp_path / beside).read_bytes())
        data[12] ^= 1
        (tmp_path / beside).write_bytes(data)
        assert source_sha256(ref) != before


def test_a_json_of_another_program_says_no_spacing(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint8))
    (tmp_path / "a.json").write_text(json.dumps({"version": "5.0", "shapes": []}))
    assert read_image([tmp_path / "a.tif"])[1].spacing == (1, 1, 1)
    (tmp_path / "a.json").write_text(json.dumps({"spacing": "x"}))
    refused(tmp_path / "a.tif", "spacing: found no such numbers in a.json")


def test_flat_images_get_flat_predictions(tmp_path):
    for kind in (".mha", ".nrrd", ".nii.gz"):
        picture = sitk.GetImageFromArray(np.zeros((4, 5), np.float32))
        picture.SetSpacing((0.5, 0.25))
        picture.SetOrigin((7, 8))
        sitk.WriteImage(picture, str(tmp_path / f"a{kind}"))
        _, geometry = read_image([tmp_path / f"a{kind}"])
        label = np.arange(20).reshape(1, 4, 5) % 3
        write_label(tmp_path / f"label{kind}", label, geometry)
        written = sitk.ReadImage(str(tmp_path / f"label{kind}"))
        assert np.array_equal(sitk.GetArrayFromImage(written), label[0])
        for get in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
            assert getattr(written, get)() == getattr(picture, get)(), get


def test_labels_a_rounding_error_off_are_rounded_with_a_word(tmp_path):
    exact = np.zeros((4, 5, 6))
    exact[1], exact[2] = 1, 2
    for name, dtype, off in (("a", np.int16, 0), ("b", np.uint8, 0), ("c", np.float32, -6e-8)):
        picture = nib.Nifti1Image(np.where(exact == 1, 1 + off, exact), np.eye(4))
        picture.set_data_dtype(dtype)
        nib.save(picture, tmp_path / f"{name}.nii")
        label, geometry = read_label(tmp_path / f"{name}.nii")
        assert label.dtype == np.uint8 and np.array_equal(label.T, exact)
        assert [w[0] for w in geometry.file.warnings] == ["label values"]
    for value in (0.51, 0.994, np.nan):
        nib.save(nib.Nifti1Image(exact.astype("f4") * value, np.eye(4)), tmp_path / "d.nii")
        assert read_label(tmp_path / "d.nii")[0].dtype == np.float32, "the check tells"


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    for kind in (".nii", ".nii.gz", ".png", ".tif", ".mha", ".npy"):
        os.mkfifo(tmp_path / f"a{kind}")
        assert peek(tmp_path / f"a{kind}") == (0, 0, 0, 0)
        if kind != ".npy":
            refused(tmp_path / f"a{kind}", "a pipe or device")


def test_pages_in_a_circle_do_not_hang(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint8))
    data = bytearray((tmp_path / "a.tif").read_bytes())
    first = int.from_bytes(data[4:8], "little")
    tags = int.from_bytes(data[first : first + 2], "little")
    end = first + 2 + 12 * tags
    data[end : end + 4] = data[4:8]  # the page after the first is the first
    (tmp_path / "a.tif").write_bytes(data)
    refused(tmp_path / "a.tif", "its pages follow each other in a circle")
    assert peek(tmp_path / "a.tif") == (0, 0, 0, 0)


SLIDE = (13_500, 13_500)  # 182 megapixels, more than Pillow takes of itself


def slide(kind, path, size) -> None:
    """A white picture with a black corner, a few kilobytes."""
    height, width = size
    if kind == "png":  # in bits, row by row: nothing of it is ever in memory
        pack, row = zlib.compressobj(9), b"\0" + b"\xff" * -(-width // 8)
        data = pack.compress(b"\0" + bytes(1) + row[2:])
        for _ in range(height // 500):
            data += pack.compress(row * 500)
        data += pack.compress(row * (height - 1 - height // 500 * 500)) + pack.flush()
        head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
            for name, part in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
        ))  # fmt: skip
        return
    white = np.full((512, 512), 255, np.uint8)
    first = white.copy()
    first[:1, :8] = 0
    tiles = -(-height // 512) * -(-width // 512)
    tifffile.imwrite(
        path, (first if n == 0 else white for n in range(tiles)), shape=size, dtype=np.uint8,
        tile=(512, 512), compression="zlib", photometric="minisblack",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_pictures_of_the_size_of_slides_are_read(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    slide(kind, path, SLIDE)
    assert path.stat().st_size < 2**20
    assert peek(path) == (1, 1, *SLIDE)
    image, geometry = read_image([path])
    assert geometry.shape == (1, *SLIDE) and image.dtype == np.uint8
    assert not image[0, 0, 0, :8].any() and image[0, 0, 0, 8] == image[0, 0, -1, -1] == 255
    assert int((image == 0).sum()) == 8


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_slides_that_fit_into_no_memory_are_one_message_that_says_what_to_do(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr("segfleet.preprocess.files.faults.memory_budget", lambda: 2**28)
    slide(kind, tmp_path / f"a.{kind}", SLIDE)
    with pytest.raises(ImageError) as raised:
        read_image([tmp_path / f"a.{kind}"])
    text = str(raised.value)
    assert "173.8 MiB of values" in text and "Cut the image into tiles" in text
    assert "\n" not in text and "damaged" not in text


def test_a_tile_that_says_it_is_larger_than_its_place_takes_no_memory(tmp_path):
    """Its own header is what a decoder asks memory for: 12 GiB for a picture of 9x11."""
    path = tmp_path / "a.tif"
    picture = np.random.default_rng(0).integers(0, 255, (9, 11, 3)).astype(np.uint8)
    tifffile.imwrite(path, picture, compression="jpeg", photometric="rgb")
    assert read_image([path])[0].shape == (3, 1, 9, 11)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5  # height and width in the start of the frame
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="a tile of 65407x65535 pixels where 11x9 belong"):
        read_image([path])
