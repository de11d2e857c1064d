"""Raw layouts: what they yield, what they refuse, and labels written back exactly."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import ImageError, peek, read_image, read_label
from segfleet.preprocess.files.writer import write_label
from segfleet.preprocess.phantoms.phantom import (
    PHANTOMS,
    write_dsb_phantom,
    write_msd_phantom,
    write_nnunet_phantom,
)
from segfleet.preprocess.readers.base import (
    natural,
    open_reader,
    patient_of,
    readers,
    source_sha256,
)

RANDOM = np.random.default_rng(7)


def test_every_layout_is_found_by_its_file():
    assert {"msd", "nnunet", "dsb2018"} <= set(readers())
    with pytest.raises(
        InputError, match="found 'msdd', expected one of the layouts: acdc, bids, busi, .*dsb2018"
    ):
        open_reader("msdd", ".")


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_a_folder_of_another_kind_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="not a folder. Expected"):
        open_reader(name, tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no .* Expected"):
        open_reader(name, tmp_path)


def test_hippocampus_is_as_its_readme_says(shared_data):
    reader = open_reader("msd", shared_data("Task04_Hippocampus"))
    refs = reader.refs()
    assert len(refs) == 208 and not reader.problems()
    assert reader.dataset().labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    shapes = [peek(ref.images[0]) for ref in refs]
    assert {shape[0] for shape in shapes} == {1}
    assert (min(s[3] for s in shapes), max(s[3] for s in shapes)) == (31, 43)
    case = reader.read(refs[0])
    assert (
        case.id == "hippocampus_003"
        and case.geometry.spacing == (1, 1, 1)
        and set(np.unique(case.label_ZYX)) == {0, 1, 2}
    )
    assert case.extra["source_sha256"] == source_sha256(refs[0])


def test_brain_tumour_has_four_channels(shared_data):
    reader = open_reader("msd", shared_data("Task01_BrainTumour"))
    assert reader.dataset().channels == ("FLAIR", "T1w", "t1gd", "T2w")
    shapes = [reader.read(ref).image_CZYX.shape for ref in reader.refs()]
    assert shapes == [(4, 24, 160, 160), (4, 26, 160, 160)]
    raw = np.asarray(nib.load(reader.refs()[0].images[0]).dataobj)
    assert np.array_equal(reader.read(reader.refs()[0]).image_CZYX[2, 5, 60, 80], raw[80, 60, 5, 2])


def test_nuclei_are_as_their_readme_says(shared_data):
    reader = open_reader("dsb2018", shared_data("dsb2018"))
    refs = reader.refs()
    assert len(refs) == 402 and sum(len(ref.labels) for ref in refs) == 12127
    assert len(open_reader("dsb2018", shared_data("dsb2018") / "stage1_train").refs()) == 402
    case = reader.read(refs[0])
    assert (
        case.image_CZYX.shape == (3, 1, 256, 256)
        and case.image_CZYX.dtype == np.uint8
        and set(np.unique(case.label_ZYX)) == {0, 1}
    )
    union = sum((np.asarray(Image.open(path)) > 0).astype(int) for path in refs[0].labels)
    assert np.array_equal(case.label_ZYX[0], union > 0)


def test_msd_ignores_junk_and_keeps_the_geometry(tmp_path):
    reader = open_reader("msd", write_msd_phantom(tmp_path / "raw", cases=3))
    assert (tmp_path / "raw/imagesTr/._phantom_000.nii.gz").is_file()
    assert [ref.id for ref in reader.refs()] == [
        "phantom_000",
        "phantom_001",
        "phantom_002",
    ] and not reader.problems()
    case, image = (
        reader.read(reader.refs()[1]),
        nib.load(tmp_path / "raw/imagesTr/phantom_001.nii.gz"),
    )
    assert case.image_CZYX.shape[1:] == image.shape[::-1] and case.geometry.spacing[0] == 2.5
    assert np.allclose(case.geometry.affine, image.affine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("training"), "the key 'training' is missing"),
        (lambda d: d.update(training=[]), "training: found no case"),
        (lambda d: d.update(training=[{"image": "a.nii.gz"}]), r"training\[0\]: found .* expected"),
        (lambda d: d.update(labels={"0": "background"}), "at least one more"),
        (
            lambda d: d.update(labels={"0": "background", "one": "x"}),
            "value of 'x': found 'one', expected an integer",
        ),
        (lambda d: d.update(modality=["MRI"]), "modality: found .* expected object"),
        (lambda d: d.update(channel_names=d.pop("modality")), "Use the layout nnunet"),
    ],
)
def test_a_strange_msd_description_is_refused(change, message, tmp_path):
    root = write_msd_phantom(tmp_path / "raw", cases=1)
    rewrite(root / "dataset.json", change)
    with pytest.raises(InputError, match=message):
        reader = open_reader("msd", root)
        reader.dataset(), reader.refs()


def test_broken_json_names_line_and_column(tmp_path):
    (tmp_path / "dataset.json").write_text('{"name": "a",\n "labels": }')
    with pytest.raises(
        InputError, match=r"dataset.json: is not valid JSON: .* in line 2, column 12"
    ):
        open_reader("msd", tmp_path)


DIGITS = "9" * 5000  # more than Python turns into a number
DAMAGED = {
    "a number of thousands of digits": ("msd", "dataset.json", lambda t: t.replace("12", DIGITS)),
    "no list": ("nnunet", "dataset.json", lambda t: t.replace("channel_names", "modality").replace(
        '"numTraining"', '"training": 5, "numTraining"')),
    "a cell without an end": ("glas", "Grade.csv", lambda t: t + '"' + "x" * 200_000),
    "a cell as long in a list of frames": (
        "cvc_clinicdb", "metadata.csv", lambda t: t + '"' + "x" * 200_000),
    "a cell as long in the table of patients": ("ph2", "patients.csv",
                                                lambda t: '"' + "x" * 200_000),
    "a split of brackets": ("nnunet", "splits_final.json", lambda t: "[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_description_that_cannot_be_understood_is_one_sentence(case, tmp_path):
    layout, name, change = DAMAGED[case]
    root = PHANTOMS[layout](tmp_path / "raw")
    path = next(root.rglob(name), root / name)
    path.write_text(change(path.read_text() if path.is_file() else ""))
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        reader = open_reader(layout, root)
        reader.dataset(), reader.refs(), reader.problems(), reader.splits()
    assert "\n" not in str(caught.value)


def test_digits_that_are_no_numbers_are_letters(tmp_path):
    """Superscripts count as digits to Python's isdigit, not to int."""
    assert sorted(["a\u00b2", "a\u00b3", "a10", "a2"], key=natural)[:2] == ["a2", "a10"]
    root = PHANTOMS["acdc"](tmp_path / "raw")
    info = next(root.rglob("Info.cfg"))
    info.write_text(info.read_text() + "Weight: \u00b2\n")
    assert open_reader("acdc", root).refs()


def test_nnunet_regions_and_ignore_label(tmp_path):
    reader = open_reader("nnunet", write_nnunet_phantom(tmp_path / "raw", cases=4))
    dataset = reader.dataset()
    assert dataset.channels == ("CT", "PET") and dataset.dims == 3 and dataset.ignore_label == 3
    assert dataset.regions == {"whole": (1, 2), "core": (2,)} and dataset.region_order == (1, 2)
    assert list(dataset.labels.values()) == [0, 1, 2]
    refs = reader.refs()
    assert [ref.group for ref in refs] == ["patient000", "patient000", "patient001", "patient001"]
    assert reader.read(refs[0]).image_CZYX.shape == (2, 12, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("channel_names"), "the key 'channel_names' is missing"),
        (lambda d: d.update(channel_names={"0": "CT", "2": "PET"}), "without a gap"),
        (lambda d: d.update(file_ending=".jpg"), "file_ending: found '.jpg', expected one of"),
        (
            lambda d: d["labels"].update(ignore=2),
            "ignore: found 2, expected the highest integer, 3",
        ),
        (lambda d: d["labels"].update(core=[4]), "without a gap"),
        (lambda d: d["labels"].update(background=1), "background: found 1, expected 0"),
        (lambda d: d.pop("regions_class_order"), "the key 'regions_class_order' is missing"),
        (
            lambda d: d.update(regions_class_order=[1]),
            r"found 1 entries, expected 2: one for each of \['whole', 'core'\]",
        ),
        (lambda d: d.update(modality=d.pop("channel_names")), "Use the layout msd"),
    ],
)
def test_a_strange_nnunet_description_is_refused(change, message, tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=1)
    rewrite(root / "dataset.json", change)
    with pytest.raises(InputError, match=message):
        open_reader("nnunet", root).dataset()


def test_nnunet_takes_an_explicit_file_list_and_splits(tmp_path):
    root = write_nnunet_phantom(tmp_path / "raw", cases=2)
    names = ["patient000_visit0", "patient000_visit1"]
    images = [[f"imagesTr/{name}_000{channel}.nii.gz" for channel in (0, 1)] for name in names]
    files = {
        f"case{i}": {"images": images[i], "label": f"labelsTr/{name}.nii.gz"}
        for i, name in enumerate(names)
    }
    rewrite(root / "dataset.json", lambda d: d.update(dataset=files))
    (root / "splits_final.json").write_text(
        json.dumps([{"train": ["case0"], "val": ["case1"]}, {"train": ["case9"], "val": ["case0"]}])
    )
    reader = open_reader("nnunet", root)
    assert [ref.id for ref in reader.refs()] == ["case0", "case1"] and reader.read(
        reader.refs()[1]
    ).image_CZYX.shape[0] == 2
    assert reader.splits()["nnunet"][0] == {"train": ("case0",), "val": ("case1",)}
    (problem,) = reader.problems()
    assert (problem.case, problem.field, problem.found) == ("splits_final.json", "fold 1", "case9")


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_nnunet_in_2d_with_all_colours_in_one_file(ending, tmp_path):
    (tmp_path / "imagesTr").mkdir(), (tmp_path / "labelsTr").mkdir()
    pixels = RANDOM.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    label = RANDOM.integers(0, 2, (9, 7), dtype=np.uint8)
    if ending == ".png":
        Image.fromarray(pixels).save(tmp_path / "imagesTr/a_0000.png")
        Image.fromarray(label).save(tmp_path / "labelsTr/a.png")
    else:
        tifffile.imwrite(tmp_path / "imagesTr/a_0000.tif", pixels, photometric="rgb")
        tifffile.imwrite(tmp_path / "labelsTr/a.tif", label)
    description = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "x": 1},
        "numTraining": 1,
        "file_ending": ending,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    reader = open_reader("nnunet", tmp_path)
    assert reader.dataset().dims == 2
    case = reader.read(reader.refs()[0])
    assert np.array_equal(case.image_CZYX[:, 0], pixels.transpose(2, 0, 1)) and np.array_equal(
        case.label_ZYX[0], label
    )


def test_dsb_drops_alpha_and_joins_masks(tmp_path):
    root = write_dsb_phantom(tmp_path / "raw", images=4)
    reader = open_reader("dsb2018", root)
    refs = reader.refs()
    assert len(refs) == 4 and Image.open(refs[0].images[0]).mode == "RGBA"
    case = reader.read(refs[0])
    assert len(case.image_CZYX) == 3 and case.label_ZYX.max() == 1
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(refs[0].labels[-1])
    with pytest.raises(ImageError, match="shape of mask .*: found 1x3x3, expected 1x64"):
        reader.read(refs[0])


def test_natural_order_and_patients():
    assert sorted(["c10", "c2", "C1"], key=natural) == ["C1", "c2", "c10"]
    assert patient_of("patient001_frame12") == "patient001" and patient_of("p3-ses-02") == "p3"
    assert patient_of("BRATS_009") == "" and patient_of("hippocampus_003") == ""


TURNED = (
    (0.0, -0.75, 0.0, -11.0),
    (1.5, 0.0, 0.0, 4.25),
    (0.0, 0.0, 2.5, 7.0),
    (0.0, 0.0, 0.0, 1.0),
)
GEOMETRY = Geometry(shape=(3, 5, 4), spacing=(2.5, 0.75, 1.5), affine=TURNED)
LABEL = RANDOM.integers(0, 4, GEOMETRY.shape).astype(np.uint8)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_label_lies_where_it_lay(ending, tmp_path):
    write_label(tmp_path / f"a{ending}", LABEL, GEOMETRY)
    label, geometry = read_label(tmp_path / f"a{ending}")
    assert (
        label.dtype == np.uint8
        and np.array_equal(label, LABEL)
        and geometry.shape == GEOMETRY.shape
    )
    assert np.allclose(geometry.spacing, GEOMETRY.spacing) and np.allclose(
        geometry.affine, GEOMETRY.affine, atol=1e-6
    )
    assert peek(tmp_path / f"a{ending}") == (1, 3, 5, 4)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{ending}"]
    itk = sitk.ReadImage(str(tmp_path / f"a{ending}"))
    assert np.allclose(
        itk.TransformIndexToPhysicalPoint((1, 2, 1)),
        (-(-11 - 0.75 * 2), -(4.25 + 1.5), 7 + 2.5),
        atol=1e-5,
    )


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_a_flat_label_is_written_back(ending, tmp_path):
    write_label(tmp_path / f"a{ending}", LABEL[:1], Geometry(shape=(1, 5, 4)))
    label, geometry = read_label(tmp_path / f"a{ending}")
    assert (
        np.array_equal(label, LABEL[:1])
        and geometry == Geometry(shape=(1, 5, 4))
        # with a palette it shows colours to whoever takes it for an image
        and peek(tmp_path / f"a{ending}") == (1 if ending == ".tif" else 3, 1, 5, 4)
    )


SMOOTH = np.add.outer(np.arange(20), np.arange(30))
RGB = np.stack([SMOOTH, 2 * SMOOTH, 255 - SMOOTH], -1).astype(np.uint8)
MASK = (SMOOTH > 20) & (SMOOTH < 40)
PACKED = {  # Pillow's name of the compression, array, largest difference
    "tiff_lzw": [
        (RGB, 0),
        (RGB[..., 0], 0),
        (RGB[..., 0].astype(np.uint16) * 257, 0),
        (MASK, 0),
        (RGB[..., [0, 1, 2, 0]], 0),
    ],
    "group3": [(MASK, 0)],
    "group4": [(MASK, 0)],
    "jpeg": [(RGB, 8), (RGB[..., 0], 3)],
}


@pytest.mark.parametrize("compression", PACKED)
def test_packed_tiffs_have_the_pixels_of_plain_ones(compression, tmp_path):
    for array, apart in PACKED[compression]:
        for name, how in (("plain", None), ("packed", compression)):
            Image.fromarray(array).save(tmp_path / f"{name}.tif", compression=how)
        plain, packed = (read_image([tmp_path / f"{name}.tif"])[0] for name in ("plain", "packed"))
        assert (
            plain.shape == packed.shape == (*peek(tmp_path / "packed.tif"),)
            and plain.dtype == packed.dtype
        )
        shown = (
            array * np.uint8(255)
            if array.dtype == bool
            else array[..., :3]
            if array.ndim == 3
            else array
        )
        assert np.array_equal(
            plain.squeeze(), np.moveaxis(shown, -1, 0) if array.ndim == 3 else shown
        )
        assert np.abs(plain.astype(int) - packed).max() <= apart
    if compression == "group4":
        assert np.array_equal(read_label(tmp_path / "packed.tif")[0][0], MASK)


@pytest.mark.parametrize("compression", [None, "group4"])
def test_white_is_the_higher_value_of_a_tiff(compression, tmp_path):
    """Many programs write bilevel masks with 0 for white."""
    Image.fromarray(MASK).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].photometric.name == "MINISWHITE"
    with Image.open(tmp_path / "a.tif") as picture:
        assert np.array_equal(read_label(tmp_path / "a.tif")[0][0], np.asarray(picture))


def test_pages_and_turned_pictures_may_be_packed(tmp_path):
    pages = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    pages[0].save(
        tmp_path / "a.tif", compression="tiff_lzw", save_all=True, append_images=pages[1:]
    )
    image, _ = read_image([tmp_path / "a.tif"])
    assert np.array_equal(image, np.moveaxis(np.stack([RGB, 255 - RGB]), -1, 0))
    Image.fromarray(RGB).save(tmp_path / "b.tif", compression="tiff_lzw", tiffinfo={274: 6})
    image, _ = read_image([tmp_path / "b.tif"])
    assert np.array_equal(image[:, 0], np.moveaxis(np.rot90(RGB, -1), -1, 0))


def test_a_truncated_packed_tiff_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "c.tif", compression="tiff_lzw")
    (tmp_path / "c.tif").write_bytes((tmp_path / "c.tif").read_bytes()[:2000])
    with pytest.raises(ImageError, match="damaged or truncated"):
        read_image([tmp_path / "c.tif"])


def test_a_tiff_volume_keeps_its_spacing_in_a_sidecar(tmp_path):
    write_label(tmp_path / "a.tif", LABEL, GEOMETRY)
    label, geometry = read_label(tmp_path / "a.tif")
    assert np.array_equal(label, LABEL) and geometry.spacing == GEOMETRY.spacing


def test_a_lossy_or_flat_ending_is_refused_for_labels(tmp_path):
    with pytest.raises(InputError, match=".jpg is lossy"):
        write_label(tmp_path / "a.jpg", LABEL, GEOMETRY)
    with pytest.raises(InputError, match="holds one slice"):
        write_label(tmp_path / "a.png", LABEL, GEOMETRY)
    with pytest.raises(InputError, match="none of: .nii.gz"):
        write_label(tmp_path / "a.xyz", LABEL, GEOMETRY)
    assert not list(tmp_path.iterdir())


def test_a_hippocampus_label_written_back_has_the_original_header(shared_data, tmp_path):
    reader = open_reader("msd", shared_data("Task04_Hippocampus"))
    ref = reader.refs()[0]
    case = reader.read(ref)
    write_label(tmp_path / "p.nii.gz", case.label_ZYX, case.geometry)
    ours, theirs = nib.load(tmp_path / "p.nii.gz"), nib.load(ref.labels[0])
    assert (
        np.array_equal(ours.affine, theirs.affine)
        and ours.header.get_zooms() == theirs.header.get_zooms()
    )
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))


def test_channels_must_share_a_grid(tmp_path):
    for name, shape, spacing in (
        ("a", (3, 5, 4), 1.0),
        ("b", (3, 5, 4), 1.2),
        ("c", (3, 5, 5), 1.0),
    ):
        write_label(
            tmp_path / f"{name}.nii",
            np.ones(shape, np.uint8),
            Geometry(shape=shape, spacing=(spacing, 1.0, 1.0)),
        )
    image, _ = read_image([tmp_path / "a.nii", tmp_path / "a.nii"])
    assert image.shape == (2, 3, 5, 4)
    with pytest.raises(
        ImageError,
        match="spacing of channel b.nii: found 1.2x1x1 mm, expected 1x1x1 mm as in a.nii",
    ):
        read_image([tmp_path / "a.nii", tmp_path / "b.nii"])
    with pytest.raises(ImageError, match="shape of channel c.nii: found 3x5x5, expected 3x5x4"):
        read_image([tmp_path / "a.nii", tmp_path / "c.nii"])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif"])
def test_a_truncated_file_is_noticed(ending, tmp_path):
    path, flat = tmp_path / f"a{ending}", ending in (".png", ".tif")
    label = RANDOM.integers(0, 200, (1 if flat else 40, 50, 60)).astype(np.uint8)
    write_label(path, label, Geometry(shape=label.shape))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    with pytest.raises(ImageError, match=f"found a{ending} damaged or truncated"):
        read_label(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=f"found a{ending} with 0 bytes"):
        read_label(path)


def test_one_flipped_byte_in_a_gzip_stream_is_noticed(tmp_path):
    path = tmp_path / "a.nii.gz"
    write_label(path, LABEL.repeat(9, 0), Geometry(shape=(27, 5, 4)))
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1  # in the checksum, which lazy reading never looks at
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="damaged"):
        read_label(path)


def test_an_image_error_crosses_processes(tmp_path):
    error = pickle.loads(pickle.dumps(ImageError(Path("a"), "f", "x", "y", "Mend.")))
    assert str(error) == "a: f: found x, expected y. Mend." and error.problem("c").case == "c"


def rewrite(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
