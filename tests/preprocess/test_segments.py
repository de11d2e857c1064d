"""Labels as named segments: DICOM SEG, RTSTRUCT and .seg.nrrd on the grid of their image."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.files.dicom import RTSTRUCT
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.planning.plan import Overrides
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.base import open_store


@pytest.fixture
def dicom(tmp_path):
    """A folder of one series, its label as an array, and the geometry of both."""
    root = PHANTOMS["dicom"](tmp_path / "raw", cases=1)
    reader = open_reader("dicom", root)
    ref = reader.refs()[0]
    label, _ = reader.label(ref)
    _, geometry = reader.image(ref)
    values = {value: name for name, value in reader.dataset().labels.items()}
    ref.labels[0].unlink()
    return root, ref, label, geometry, values


def as_it_was(root, label) -> None:
    reader = open_reader("dicom", root)
    found = survey(reader, workers=1)
    assert not found.problems, found.problems
    assert np.array_equal(reader.read(reader.refs()[0]).label_ZYX, label)


def test_labels_on_a_turned_conversion_lie_where_they_say(dicom):
    root, ref, label, geometry, _ = dicom
    picture = nib.Nifti1Image(label.T, np.asarray(geometry.affine))
    turned = picture.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    nib.save(turned, root / f"labels/{ref.id}.nii.gz")
    as_it_was(root, label)


def test_dicom_seg_by_highdicom(dicom):
    hd = pytest.importorskip("highdicom")
    from highdicom.sr.coding import CodedConcept

    root, ref, label, _, values = dicom
    files = [pydicom.dcmread(path) for path in ref.images]
    files.sort(key=lambda d: float(d.ImagePositionPatient[2]))
    for d in files:
        d.PatientBirthDate = d.PatientSex = d.StudyDate = d.StudyTime = d.AccessionNumber = ""
        d.StudyID = d.ReferringPhysicianName = ""
        d.SliceThickness = 3
    code = CodedConcept("1", "99X", "x")
    segments = [
        hd.seg.SegmentDescription(
            segment_number=n, segment_label=name, segmented_property_category=code,
            segmented_property_type=code, algorithm_type="MANUAL",
        )
        for n, name in enumerate([values[2], values[1]], 1)
    ]  # fmt: skip
    masks = np.stack([label == 2, label == 1], -1).astype(np.uint8)
    z = [float(d.ImagePositionPatient[2]) for d in files]
    assert z == sorted(z)
    seg = hd.seg.Segmentation(
        source_images=files, pixel_array=masks, segmentation_type="BINARY",
        segment_descriptions=segments, series_instance_uid=generate_uid(), series_number=2,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x",
        manufacturer_model_name="x", software_versions="x", device_serial_number="x",
    )  # fmt: skip
    seg.save_as(root / f"labels/{ref.id}.dcm")
    assert int(seg.NumberOfFrames) < 2 * len(label), "only planes with something are stored"
    as_it_was(root, label)
    manifest = build(BuildRequest("dicom", root, root.with_name("store"), workers=1))
    assert set(manifest.cases[0].voxels) == {0, 1, 2}
    _, stored = open_store(root.with_name("store")).stored(manifest.cases[0])
    assert stored.any()


def contours(mask: np.ndarray, geometry, plane: int) -> list[list[float]]:
    """Squares around the voxels of one row each, in mm of LPS."""
    affine = np.diag([-1, -1, 1, 1]) @ np.asarray(geometry.affine)
    found = []
    for y in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.pad(mask[y].astype(int), 1)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            box = [
                (first - 0.5, y - 0.5),
                (last - 0.5, y - 0.5),
                (last - 0.5, y + 0.5),
                (first - 0.5, y + 0.5),
            ]
            found.append([float(v) for px, py in box for v in (affine @ [px, py, plane, 1])[:3]])
    return found


def test_rtstruct_paints_voxels_whose_centre_is_inside(dicom):
    root, ref, label, geometry, values = dicom
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTSTRUCT, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = RTSTRUCT, meta.MediaStorageSOPInstanceUID
    names, regions = [], []
    for value in (1, 2):
        name, region = Dataset(), Dataset()
        name.ROINumber, name.ROIName = value, values[value]
        region.ReferencedROINumber, region.ContourSequence = value, Sequence()
        for plane in range(len(label)):
            for points in contours(label[plane] == value, geometry, plane):
                one = Dataset()
                one.ContourGeometricType, one.ContourData = "CLOSED_PLANAR", points
                region.ContourSequence.append(one)
        names.append(name)
        regions.append(region)
    d.StructureSetROISequence, d.ROIContourSequence = Sequence(names), Sequence(regions)
    d.save_as(root / f"labels/{ref.id}.dcm", enforce_file_format=True)
    as_it_was(root, label)
    d.StructureSetROISequence[0].ROIName = d.StructureSetROISequence[1].ROIName = "somebody"
    d.save_as(root / f"labels/{ref.id}.dcm", enforce_file_format=True)
    (problem,) = survey(open_reader("dicom", root), workers=1).problems
    assert problem.field == "regions" and "labels.json" in problem.mend


@pytest.mark.parametrize("cropped", [False, True])
def test_segments_of_slicer(cropped, tmp_path):
    import nrrd

    shape = (10, 12, 8)
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:9, 2:5], label[6:8, 3:9, 2:5] = 1, 2
    affine = np.diag([-1.0, -1.5, 2, 1])
    affine[:3, 3] = (5, 6, 7)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    image = (label * 50).astype(np.int16)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "images/a.nii.gz")
    (tmp_path / "labels.json").write_text(json.dumps({"background": 0, "gland": 1, "lesion": 2}))
    box = (slice(1, 9), slice(3, 10), slice(2, 6)) if cropped else (slice(None),) * 3
    lps = np.diag([-1, -1, 1, 1]) @ affine
    origin = lps @ [*(part.start or 0 for part in box), 1]
    layers = np.stack([(label == 2)[box], (label == 1)[box] * 3]).astype(np.uint8)
    header = {
        "space": "left-posterior-superior", "space origin": origin[:3],
        "space directions": np.vstack([[np.nan] * 3, lps[:3, :3].T]),
        "kinds": ["list", "domain", "domain", "domain"],
        "Segment0_Name": "lesion", "Segment0_LabelValue": "1", "Segment0_Layer": "0",
        "Segment1_Name": "gland", "Segment1_LabelValue": "3", "Segment1_Layer": "1",
    }  # fmt: skip
    nrrd.write(str(tmp_path / "masks/a.seg.nrrd"), layers, header)
    assert sitk.ReadImage(str(tmp_path / "masks/a.seg.nrrd")).GetSize() == layers.shape[1:]
    reader = open_reader("folder", tmp_path)
    found = survey(reader, workers=1)
    assert not found.problems, found.problems
    assert np.array_equal(reader.read(reader.refs()[0]).label_ZYX.T, label)


@pytest.mark.parametrize("empty", [False, True])
def test_a_label_as_dicom_seg_comes_back(dicom, empty, tmp_path):
    """By highdicom itself, and by our own reader, onto the voxel; names, colours and the source."""
    hd = pytest.importorskip("highdicom")
    from segfleet.preprocess.files.dicom_seg import write_seg

    root, ref, label, geometry, values = dicom
    label = np.zeros_like(label) if empty else label
    label[label == 2] = 5  # a gap between the numbers
    labels = {"background": 0, values[1]: 1, values[2]: 5}
    path = root / f"labels/{ref.id}.dcm"
    write_seg(path, label, ref.images, labels)
    seg = hd.seg.segread(path)
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == [
        values[1], values[2],
    ]  # fmt: skip
    uids = [pydicom.dcmread(p) for p in ref.images]
    uids = [d.SOPInstanceUID for d in sorted(uids, key=lambda d: float(d.ImagePositionPatient[2]))]
    found = seg.get_pixels_by_source_instance(uids, combine_segments=True)
    if uids and float(geometry.affine[2][2]) < 0:
        found = found[::-1]
    assert np.array_equal(found, np.where(label == 5, 2, label))
    one, two = (seg.get_segment_description(n).RecommendedDisplayCIELabValue for n in (1, 2))
    assert list(one) != list(two)
    (root / "labels.json").write_text(json.dumps(labels))
    own = open_reader("dicom", root)
    assert np.array_equal(own.read(own.refs()[0]).label_ZYX, label)
    with pytest.raises(InputError, match="expected a name for each"):
        write_seg(path, label + 7, ref.images, labels)


def test_one_segment_and_label_maps_of_highdicom(dicom):
    """highdicom says of a single segment once, for all frames, which it is."""
    pytest.importorskip("highdicom")
    from segfleet.preprocess.files.dicom_seg import write_seg

    root, ref, label, _, values = dicom
    path = root / f"labels/{ref.id}.dcm"
    one = (label == 1).astype(np.uint8)
    write_seg(path, one, ref.images, {"background": 0, values[1]: 1})
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    assert not any("SegmentIdentificationSequence" in frame for frame in frames)
    as_it_was(root, one)


def test_label_maps_of_highdicom(dicom):
    """A SEG whose pixels are segment numbers (LABELMAP), as newer writers make it."""
    hd = pytest.importorskip("highdicom")
    from highdicom.sr.coding import CodedConcept

    root, ref, label, _, values = dicom
    files = [pydicom.dcmread(path) for path in ref.images]
    files.sort(key=lambda d: float(d.ImagePositionPatient[2]))
    for d in files:
        d.PatientBirthDate = d.PatientSex = d.StudyDate = d.StudyTime = d.AccessionNumber = ""
        d.StudyID = d.ReferringPhysicianName = ""
        d.SliceThickness = 3
    code = CodedConcept("1", "99X", "x")
    segments = [
        hd.seg.SegmentDescription(
            segment_number=n, segment_label=values[n], segmented_property_category=code,
            segmented_property_type=code, algorithm_type="MANUAL",
        )
        for n in (1, 2)
    ]  # fmt: skip
    seg = hd.seg.Segmentation(
        source_images=files, pixel_array=label.astype(np.uint8), segmentation_type="LABELMAP",
        segment_descriptions=segments, series_instance_uid=generate_uid(), series_number=2,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x",
        manufacturer_model_name="x", software_versions="x", device_serial_number="x",
    )  # fmt: skip
    assert seg.SegmentationType == "LABELMAP"
    seg.save_as(root / f"labels/{ref.id}.dcm")
    as_it_was(root, label)


def test_the_label_of_a_case_of_a_store_as_dicom_seg(dicom, capsys):
    """On the raw grid, whatever the store resampled; read back by highdicom's own reader."""
    hd = pytest.importorskip("highdicom")
    from segfleet.cli.export import command

    root, ref, label, geometry, values = dicom
    nib.save(
        nib.Nifti1Image(label.T, np.asarray(geometry.affine)), root / f"labels/{ref.id}.nii.gz"
    )
    store, out, series = root.with_name("store"), root.with_name("a.dcm"), ref.images[0].parent
    coarse = Overrides(spacing=(6.0, 2.0, 2.0))
    manifest = build(BuildRequest("dicom", root, store, workers=1, overrides=coarse))
    assert manifest.cases[0].shape != label.shape

    def export(where, to):
        command("dicom-seg", [str(store), ref.id, str(where)], to)

    export(series, out)
    assert str(out) in capsys.readouterr().out
    seg = hd.seg.segread(out)
    files = sorted(map(pydicom.dcmread, ref.images), key=lambda d: float(d.ImagePositionPatient[2]))
    uids = [d.SOPInstanceUID for d in files]
    found = seg.get_pixels_by_source_instance(uids, combine_segments=True)
    assert np.array_equal(found, label if float(geometry.affine[2][2]) > 0 else label[::-1])
    assert [seg.get_segment_description(n).segment_label for n in (1, 2)] == [values[1], values[2]]
    other = out.with_name("b.dcm")
    last = max(ref.images, key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))
    last.rename(root / "gone")
    for where, to, words in (
        (series, out, "expected a new file"),
        (series, other.with_suffix(".nii"), "NAME.dcm"),
        (root / "labels", other, "no DICOM file"),
        (root / "none", other, "no folder"),
        (series, other, "not that of case"),
    ):
        with pytest.raises(InputError, match=words):
            export(where, to)
    assert not other.exists()
