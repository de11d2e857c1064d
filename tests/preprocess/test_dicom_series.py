"""Series that are no plain stack: read as DICOM says, or refused with the reason."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

from segfleet.preprocess.files.dicom import read_series
from segfleet.preprocess.files.images import ImageError
from segfleet.preprocess.files.itk import LPS

CT = "1.2.840.10008.5.1.4.1.1.2"
VOLUME = np.random.default_rng(0).integers(-900, 900, (7, 5, 6)).astype(np.int16)


def write(path, pixels, place, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
    d.StudyInstanceUID = d.FrameOfReferenceUID = "1.2.3"
    d.SeriesInstanceUID, d.PatientID, d.Modality, d.InstanceNumber = "1.2.3.4", "p", "CT", 1
    d.ImagePositionPatient = [round(float(v), 6) for v in place]
    d.ImageOrientationPatient, d.PixelSpacing, d.SliceThickness = [1, 0, 0, 0, 1, 0], [0.7, 0.9], 2
    d.Rows, d.Columns = pixels.shape
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
    d.PixelData = pixels.astype("<i2").tobytes()
    for key, value in tags.items():
        setattr(d, key, value)
    d.save_as(str(path), enforce_file_format=True)
    return path


def series(folder, turn=(1, 0, 0, 0, 1, 0), step=2.5, **tags):
    """Files in an order that is not that of the slices."""
    normal = np.cross(turn[:3], turn[3:])
    places = [np.array((-10, 20, 30)) + normal * step * z for z in range(len(VOLUME))]
    names = np.random.default_rng(1).permutation(len(VOLUME))
    tags = {"ImageOrientationPatient": [round(float(v), 8) for v in turn], **tags}
    paths = [write(folder / f"{n}.dcm", VOLUME[z], places[z], **tags) for z, n in enumerate(names)]
    return sorted(paths)


ANGLE = np.deg2rad(25)
PLANES = {
    "axial": (1, 0, 0, 0, 1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "feet first": (-1, 0, 0, 0, 1, 0),
    "oblique": (np.cos(ANGLE), np.sin(ANGLE), 0, 0, 0, -1),
}


@pytest.mark.parametrize("plane", PLANES)
def test_series_lie_where_itk_puts_them(plane, tmp_path):
    paths = series(tmp_path, PLANES[plane], RescaleSlope="1", RescaleIntercept="-24")
    image, geometry = read_series(paths)
    picture = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    assert image.dtype == np.int16 and np.array_equal(image[0], sitk.GetArrayFromImage(picture))
    assert np.array_equal(image[0], VOLUME - 24)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(picture.GetDirection(), (3, 3)) * picture.GetSpacing()
    affine[:3, 3] = picture.GetOrigin()
    assert np.allclose(geometry.affine, LPS @ affine, atol=1e-4)
    assert geometry.spacing == pytest.approx((2.5, 0.7, 0.9))


def test_every_slice_has_its_own_slope(tmp_path):
    slopes = [1, 0.5, 0.0004, 2, 3, 4, 70.0]
    paths = [
        write(
            tmp_path / f"{z}.dcm",
            VOLUME[z],
            (0, 0, z),
            RescaleSlope=str(slope),
            RescaleIntercept="0",
        )
        for z, slope in enumerate(slopes)
    ]
    image, _ = read_series(paths)
    assert image.dtype == np.float32
    for z, path in enumerate(paths):
        one = pydicom.dcmread(path)
        assert np.allclose(image[0, z], one.pixel_array * float(one.RescaleSlope), rtol=1e-6)


def test_whole_values_beyond_16_bits_stay_whole(tmp_path):
    paths = series(tmp_path, RescaleSlope="300", RescaleIntercept="0")
    image, _ = read_series(paths)
    assert image.dtype == np.int32 and np.array_equal(image[0], VOLUME.astype(int) * 300)


def test_dark_is_bright_in_monochrome_1_and_unused_bits_do_not_count(tmp_path):
    paths = series(tmp_path, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_series(paths)[0][0], -1 - VOLUME.astype(int))
    itk = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    assert np.array_equal(read_series(paths)[0][0], sitk.GetArrayFromImage(itk))
    low = write(
        tmp_path / "a", (VOLUME[0] & 0x0FFF) | 0x3000, (0, 0, 0), BitsStored=12, HighBit=11,
        PixelRepresentation=0,
    )  # fmt: skip
    assert np.array_equal(read_series([low])[0][0, 0], VOLUME[0] & 0x0FFF)


def test_lossless_jpeg_is_unpacked(tmp_path):
    import imagecodecs
    from pydicom.encaps import encapsulate

    pixels = (VOLUME[0].astype(int) + 1000).astype(np.uint16)
    path = write(tmp_path / "a.dcm", pixels, (0, 0, 0), PixelRepresentation=0)
    d = pydicom.dcmread(path)
    d.PixelData = encapsulate([imagecodecs.ljpeg_encode(pixels)])
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    d.save_as(path)
    assert np.array_equal(read_series([path])[0][0, 0], pixels)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0], pixels)


@pytest.mark.parametrize("syntax, encode, mark", [
    ("1.2.840.10008.1.2.4.70", "ljpeg_encode", b"\xff\xc3"),
    ("1.2.840.10008.1.2.4.80", "jpegls_encode", b"\xff\xf7"),
])  # fmt: skip
def test_a_frame_that_says_it_is_larger_than_its_place_takes_no_memory(
    syntax, encode, mark, tmp_path
):
    import imagecodecs
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    pixels = (VOLUME[0].astype(int) + 1000).astype(np.uint16)
    path = write(tmp_path / "a.dcm", pixels, (0, 0, 0), PixelRepresentation=0)
    d = pydicom.dcmread(path)
    d.file_meta.TransferSyntaxUID = UID(syntax)
    data = bytearray(getattr(imagecodecs, encode)(pixels))
    for size in (None, b"\xff\xff\xff\x7f"):
        if size:
            at = data.index(mark) + 5
            data[at : at + 4] = size
        d.PixelData = encapsulate([bytes(data)])
        d["PixelData"].is_undefined_length = True
        d.save_as(path)
        if not size:
            assert np.array_equal(read_series([path])[0][0, 0], pixels)
    with pytest.raises(ImageError, match="a frame of 65407x65535 pixels where"):
        read_series([path])


@pytest.mark.parametrize(
    "length, fault", [(None, ""), (0, "a box without length"), (1, "damaged"), (7, "damaged")]
)
def test_boxes_that_lead_nowhere_do_not_hang(length, fault, tmp_path):
    import imagecodecs
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    pixels = (VOLUME[0].astype(int) + 1000).astype(np.uint16)
    path = write(tmp_path / "a.dcm", pixels, (0, 0, 0), PixelRepresentation=0)
    d = pydicom.dcmread(path)
    data = bytearray(imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="jp2"))
    assert data[16:20] == b"ftyp"
    if length is not None:
        data[12:16] = length.to_bytes(4)
    d.file_meta.TransferSyntaxUID = JPEG2000Lossless
    d.PixelData = encapsulate([bytes(data)])
    d["PixelData"].is_undefined_length = True
    d.save_as(path)
    if length is None:
        assert np.array_equal(read_series([path])[0][0, 0], pixels)
    else:
        with pytest.raises(ImageError, match=fault):
            read_series([path])


def places(*values):
    return [(0, 0, z) for z in values]


NO_GRID = {
    "uneven": ([(0, 0, z) for z in (0, 2.5, 5, 10, 15, 20)],
               "slice distance: found steps of 2.5, 5 mm"),
    "slowly growing": ([(0, 0, z + 0.05 * z * z) for z in range(7)], "slice distance"),
    "one missing": (places(0, 2, 4, 8, 10), "8 mm|found 4 mm before .*expected 2 mm everywhere"),
    "a copy": (places(0, 2, 4, 4, 6), "slice position: found 5 slices at 4 positions"),
    "two phases": (places(0, 2, 4, 0, 2, 4), "They look like 2 volumes"),
    "all in one place": (places(1, 1, 1), "3 slices at 1 positions"),
    "tilted": ([(0, 0.5 * z, 2 * z) for z in range(6)], "gantry tilt: found .* by 14 degrees"),
    "bent": ([(0, 0.3 * (z % 2), 2 * z) for z in range(7)], "gantry tilt"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_GRID)
def test_slices_that_lie_on_no_grid_are_refused(name, tmp_path):
    where, text = NO_GRID[name]
    paths = [write(tmp_path / f"{i}.dcm", VOLUME[0], p) for i, p in enumerate(where)]
    with pytest.raises(ImageError, match=text):
        read_series(paths)


ODD = {  # tags of the last slice
    "a scout": ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "lie in different planes.*scout"),
    "another size": ({"Rows": 3, "Columns": 10}, "size: found 6x5 and 10x3"),
    "another zoom": ({"PixelSpacing": [0.8, 0.8]}, "pixel spacing"),
    "another series": ({"SeriesInstanceUID": "1.2.9"}, "series: found 2 in"),
    "no place": ({"ImagePositionPatient": None}, "ImagePositionPatient"),
    "a slope of zero": ({"RescaleSlope": "0"}, "RescaleSlope: found slope 0"),
    "colours": ({"SamplesPerPixel": 3}, "colours"),
    "a segmentation": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "DICOM SEG"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_file_that_does_not_belong_is_named(name, tmp_path):
    tags, text = ODD[name]
    for z in range(4):
        write(tmp_path / f"{z}.dcm", VOLUME[z], (0, 0, 2 * z), **(tags if z == 3 else {}))
    with pytest.raises(ImageError, match=text) as caught:
        read_series(sorted(tmp_path.iterdir()))
    assert len(str(caught.value).splitlines()) == 1
