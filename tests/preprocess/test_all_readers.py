"""One suite over every raw layout: its phantom is read, checked and stored; broken variants are
named, and nothing is written."""

from __future__ import annotations

import io
import json
import locale
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from segfleet.core.errors import DataError, InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import check_case, survey
from segfleet.preprocess.files.images import ENDINGS
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.planning.splits import Member, disjoint
from segfleet.preprocess.readers.base import (
    CaseRef,
    RawReader,
    open_reader,
    reader_class,
    readers,
    source_sha256,
)
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.verify import verify

# those of descriptions without masks have tests of their own: test_new_layouts.py
NAMES = [name for name in readers() if name in PHANTOMS]
PICTURES = [name for name in NAMES if reader_class(name).facts.dims == "2D" and name != "npy"] + [
    "folder"
]
CASES = 6
RANDOM = np.random.default_rng(3)


def victim(reader: RawReader) -> CaseRef:
    """The case that is damaged: the second, so that it is neither first nor last."""
    return reader.refs()[1]


def load(path: Path) -> np.ndarray:
    """A picture, volume (x, y, z) or array as the file has it."""
    if path.suffix == ".npy":
        return np.load(path)
    if ".nii" in path.name:
        return np.asarray(nib.load(path).dataobj)
    return np.asarray(
        Image.open(path).convert("RGB") if path.suffix == ".jpg" else Image.open(path)
    )


def save(path: Path, array: np.ndarray) -> None:
    """In the file's own format; pictures as PNG under any name, which decoders see by content."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif ".nii" in path.name:
        affine = nib.load(path).affine
        path.unlink()
        nib.save(nib.Nifti1Image(array, affine), path)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        path.write_bytes(file.getvalue())


def missing_mask(reader: RawReader) -> None:
    for path in victim(reader).labels:
        path.unlink()


def missing_image(reader: RawReader) -> None:
    for path in victim(reader).images:
        path.unlink()


def wrong_size(reader: RawReader) -> None:
    path = victim(reader).labels[0]
    save(path, load(path)[:-3].copy())


def undeclared_label(reader: RawReader) -> None:
    """A class nobody declared; where masks are black and white: a picture in the mask's place."""
    path = victim(reader).labels[0]
    array = load(path)
    if ".nii" in path.name or path.suffix == ".npy":
        array = array.copy()
        array[2:4, 2:4] = 9
        save(path, array)
    else:
        save(path, RANDOM.integers(0, 256, array.shape[:2]).astype(np.uint8))


def truncated(reader: RawReader) -> None:
    path = victim(reader).images[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


def not_an_image(reader: RawReader) -> None:
    victim(reader).labels[0].write_bytes(b"<html>404</html>")


def mixed_depth(reader: RawReader) -> None:
    """One picture of 16 bits among those of 8; one volume of real numbers among integers."""
    path = victim(reader).images[0]
    array = load(path)
    if ".nii" in path.name or path.suffix == ".npy":
        save(path, array.astype(np.float32))
    else:
        save(path, (array[..., 0] if array.ndim == 3 else array).astype(np.uint16) * 257)


def alpha(reader: RawReader) -> None:
    """The same picture and mask with an alpha channel that is not constant."""
    for path in (victim(reader).images[0], victim(reader).labels[0]):
        array = load(path)
        grey = np.repeat(array[..., None], 3, -1) if array.ndim == 2 else array[..., :3]
        grey = grey.astype(np.uint8) * (255 if array.dtype == bool else 1)
        opaque = RANDOM.integers(0, 256, (*array.shape[:2], 1)).astype(np.uint8)
        rgba = np.concatenate([grey, opaque], axis=-1)
        if path.suffix == ".tif":
            Image.fromarray(rgba).save(path)
        else:
            save(path, rgba)


def emptied(reader: RawReader) -> None:
    """The folders of an archive whose files never arrived."""
    for path in [p for p in reader.root.rglob("*") if p.is_file()]:
        path.unlink()


def twice(reader: RawReader, name: str) -> bool:
    """A second case of the same name. False where the layout cannot express one."""
    image, label = victim(reader).images[0], victim(reader).labels[0]
    if name == "lits":
        for path in (image, label):
            shutil.copy(path, reader.root / "Training Batch 2" / path.name)
    elif name == "acdc":
        shutil.copytree(image.parent, reader.root / "testing" / image.parent.name)
    elif name == "dicom":
        save_as = label.with_name(label.name.removesuffix(".gz"))
        nib.save(nib.load(label), save_as)
    elif name in ("folder", "cvc_clinicdb", "glas", "isic2017", "isic2018", "kvasir_seg"):
        shutil.copy(image, image.with_suffix(".jpeg"))
    elif name == "busi":
        other = next(p for p in image.parent.parent.iterdir() if p.is_dir() and p != image.parent)
        for path in (image, label):
            shutil.copy(path, other / path.name)
    elif name == "msd":
        description = json.loads((reader.root / "dataset.json").read_text())
        description["training"].append(description["training"][1])
        (reader.root / "dataset.json").write_text(json.dumps(description))
    else:
        return False
    return True


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """`phantoms(name)`: the folder of a small phantom, made once; not to be changed."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write(name, tmp_path_factory.mktemp("raw") / name)
        return made[name]

    return make


def write(name: str, root: Path, cases: int = CASES) -> Path:
    return PHANTOMS[name](root, **{"images" if name == "dsb2018" else "cases": cases})


@pytest.fixture
def broken(phantoms, tmp_path):
    """`broken(name, hurt)`: a copy of a phantom after `hurt(reader)`."""

    def make(name: str, hurt) -> Path:
        root = Path(shutil.copytree(phantoms(name), tmp_path / "raw"))
        hurt(open_reader(name, root))
        return root

    return make


def refused(name: str, root: Path, out: Path) -> InputError:
    """What the build says; nothing of it may be left."""
    with pytest.raises(InputError) as caught:
        build(BuildRequest(name, root, out, workers=1))
    assert caught.value.exit_code == 2 and not [
        p for p in out.parent.iterdir() if p.name.startswith(out.name)
    ], "something was written"
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name):
    cls = reader_class(name)
    assert name in PHANTOMS and cls.about.endswith(".") and cls.layout
    assert cls.facts.dims in ("2D", "3D", "2D, 3D") and cls.facts.modality
    public = name not in ("folder", "nnunet", "dicom", "npy")
    assert bool(cls.facts.licence) == public and (
        cls.facts.download.startswith("http") or not public
    )
    assert cls.facts.complete or not public or name == "msd"
    with pytest.raises(InputError, match="option: found 'colour', expected one of"):
        cls(Path("."), colour="red")


@pytest.mark.parametrize("name", NAMES)
def test_a_phantom_becomes_a_store(name, phantoms, tmp_path):
    reader = open_reader(name, phantoms(name))
    dataset, refs = reader.dataset(), reader.refs()
    assert len(refs) == CASES and len({ref.id for ref in refs}) == CASES and dataset.reader == name
    manifest = build(BuildRequest(name, reader.root, tmp_path / "store", workers=1))
    assert manifest.dataset == dataset and not verify(tmp_path / "store", chunks=True)
    groups = {entry.id: entry.group for entry in manifest.cases}
    members = [Member(id=case, group=group, foreground={}) for case, group in groups.items()]
    store = open_store(tmp_path / "store")
    for ref, entry in zip(refs, manifest.cases, strict=True):
        case = reader.read(ref)
        assert (
            len(case.image_CZYX) == len(dataset.channels)
            and case.image_CZYX.shape[1:] == case.label_ZYX.shape == entry.raw_shape
        )
        assert (entry.raw_shape[0] == 1) == (dataset.dims == 2)
        assert set(np.unique(case.label_ZYX)) <= {*dataset.labels.values(), dataset.ignore_label}
        assert len(np.unique(case.label_ZYX)) > 1 or reader.may_be_empty(ref)
        assert np.array_equal(
            store.truth(entry) if entry.has_truth else store.label(entry), case.label_ZYX
        )
        assert entry.group == (ref.group or ref.id) and np.isfinite(store.image(entry)).all()
    store.close()
    everybody = set(groups)
    for split, folds in manifest.splits.items():
        for fold in folds:
            assert fold["train"] and fold["val"] and {*fold["train"], *fold["val"]} <= everybody, (
                split
            )
            assert split == "all" or not {*fold["train"]} & {*fold["val"]}, split
    assert all(disjoint(fold, members) for fold in manifest.splits["kfold"])
    assert sorted(case for fold in manifest.splits["kfold"] for case in fold["val"]) == sorted(
        everybody
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_phantom_leaves_the_locale_alone(name, tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    write(name, tmp_path / "raw", cases=3)
    found = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, before)
    assert found == before


@pytest.mark.parametrize("name", NAMES)
def test_the_root_may_be_the_working_folder(name, phantoms, monkeypatch):
    whole = open_reader(name, phantoms(name))
    monkeypatch.chdir(whole.root)
    here = open_reader(name, ".")
    assert (
        here.dataset() == whole.dataset()
        and here.splits() == whole.splits()
        and here.problems() == whole.problems()
    )
    for one, other in zip(whole.refs(), here.refs(), strict=True):
        files = [[path.resolve() for path in (*ref.images, *ref.labels)] for ref in (one, other)]
        assert (one.id, one.group, files[0]) == (other.id, other.group, files[1])
        assert (
            np.array_equal(whole.label(one)[0], here.label(other)[0])
            and whole.read(one).extra == here.read(other).extra
        )


# what was done -> the field that is named, what is found, what is expected: parts of the texts
FAULTS = {
    missing_mask: ("label", "no file", ""),
    missing_image: (("image", "channel 0"), "no file", ""),
    wrong_size: (("label shape", "shape of mask"), "x", "x"),
    undeclared_label: (
        ("label values", "mask values"),
        "",
        ("declared", "black and white", "glands"),
    ),
    truncated: ("file", "truncated", "readable"),
    not_an_image: ("file", "truncated", ""),
}
OTHERWISE = {  # a layout may see the same fault otherwise
    (truncated, "npy"): ("file", "truncated", "array"),
    (truncated, "dicom"): (("file", "series"), "", ""),
    (missing_image, "dicom"): ("image", "no file", "*.dcm"),
    (wrong_size, "glas"): ("label shape", "x", "x"),
}


def parts(wanted) -> tuple[str, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_data_set_is_a_table_of_problems(name, fault, broken, phantoms, tmp_path):
    case = victim(open_reader(name, phantoms(name))).id
    root = broken(name, fault)
    error = refused(name, root, tmp_path / "store")
    assert isinstance(error, DataError), error
    field, found, expected = OTHERWISE.get((fault, name), FAULTS[fault])
    (problem,) = [
        p for p in error.problems if any(p.field.startswith(part) for part in parts(field))
    ]
    assert problem.case == case, "the case has its name"
    assert (
        found in problem.found
        and any(part in problem.expected for part in parts(expected))
        and problem.mend.endswith(".")
    )
    assert problem.found and problem.expected and str(root) not in problem.found
    assert {p.case for p in error.problems} <= {case, "numTraining"}, "the others are sound"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def socket_file(path: Path) -> None:
    import socket

    before = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_named_and_never_waited_for(name, phantoms, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(phantoms(name), root)
    reader = open_reader(name, root)
    ref = victim(reader)
    for make, found in (
        (pipe, "a pipe or device"),
        (broken_link, "a link to nowhere, which is not there"),
        (link_to_itself, "which is not there"),
        (socket_file, "a socket"),
        (Path.mkdir, "a folder"),
    ):
        for path in (ref.images[0], ref.labels[0]):
            kept = path.read_bytes()
            path.unlink()
            make(path)
            (problem,) = check_case(reader, reader.dataset(), 20, ref).problems
            assert found in problem.found and problem.mend
            with pytest.raises(FileNotFoundError):
                source_sha256(ref)
            open_reader(name, root).refs()
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(kept)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_descriptions_that_are_pipes_are_never_waited_for(name, phantoms, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(phantoms(name), root)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in (".json", ".csv", ".txt", ".cfg", ".tsv") and path.is_file():
            kept = path.read_bytes()
            path.unlink()
            os.mkfifo(path)
            try:
                reader = open_reader(name, root)
                reader.dataset(), reader.refs(), reader.splits(), reader.problems()
            except InputError as error:
                assert "\n" not in str(error)
            path.unlink()
            path.write_bytes(kept)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_archive_is_one_message(name, broken, tmp_path):
    error = refused(name, broken(name, emptied), tmp_path / "store")
    assert "Expected" in str(error) and "\n" not in str(error) and "holds no" in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_folder_level_is_one_message(name, phantoms, tmp_path):
    deep = tmp_path / "raw" / "download" / "unpacked" / "here"
    shutil.copytree(phantoms(name), deep)
    error = refused(name, tmp_path / "raw", tmp_path / "store")
    assert "Expected" in str(error) and "\n" not in str(error)
    assert name in (
        "msd",
        "nnunet",
    ) or f"It seems to be {tmp_path / 'raw' / 'download' / 'unpacked'}" in str(error)
    file = next(
        path for path in sorted(deep.rglob("*")) if path.is_file() and not path.name.startswith(".")
    )
    assert "is not a folder" in str(refused(name, file, tmp_path / "store"))


@pytest.mark.parametrize("name", ["busi", "cvc_clinicdb", "glas", "kvasir_seg", "ph2", "dsb2018"])
def test_one_level_up_and_down_are_understood(name, phantoms):
    root = phantoms(name)
    ids = [ref.id for ref in open_reader(name, root).refs()]
    (archive,) = [p for p in root.iterdir() if not p.name.startswith(".")]
    assert [ref.id for ref in open_reader(name, archive).refs()] == ids


@pytest.mark.parametrize("name", NAMES)
def test_a_second_case_of_the_same_name_is_told(name, phantoms, broken, tmp_path):
    did = []
    root = broken(name, lambda reader: did.append(twice(reader, name)))
    if did == [False]:
        assert name in ("dsb2018", "nnunet", "npy", "ph2"), (
            "names are those of files in one folder, or listed"
        )
        return
    error = refused(name, root, tmp_path / "store")
    problem = next(p for p in error.problems if p.field == "id")
    assert (
        problem.case in {ref.id for ref in open_reader(name, phantoms(name)).refs()}
        and "2 cases" in problem.found
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_another_depth_are_told(name, broken, tmp_path):
    error = refused(name, broken(name, mixed_depth), tmp_path / "store")
    assert [(p.field, p.found) for p in error.problems] == [
        ("voxel type", "uint16")
    ] and "uint8, as most" in error.problems[0].expected


@pytest.mark.parametrize("name", ["acdc", "lits", "msd", "nnunet", "npy"])
def test_volumes_of_another_depth_are_taken(name, broken, tmp_path):
    assert (
        len(
            build(
                BuildRequest(name, broken(name, mixed_depth), tmp_path / "store", workers=1)
            ).cases
        )
        == CASES
    )


@pytest.mark.parametrize("name", PICTURES)
def test_alpha_changes_nothing(name, broken, phantoms, tmp_path):
    root = broken(name, alpha)
    before, after = (open_reader(name, folder) for folder in (phantoms(name), root))
    one, other = before.read(victim(before)), after.read(victim(after))
    assert np.array_equal(one.image_CZYX, other.image_CZYX) and np.array_equal(
        one.label_ZYX, other.label_ZYX
    )
    assert not survey(after, workers=1).problems


@pytest.mark.parametrize("name", NAMES)
def test_endings_in_upper_case_change_nothing(name, phantoms, tmp_path):
    """Cameras, scanners and Windows write them."""
    root = tmp_path / "raw"
    shutil.copytree(phantoms(name), root, copy_function=os.link)
    before = open_reader(name, phantoms(name))
    for path in [p for p in root.rglob("*") if p.is_file()]:
        end = next((e for e in (*ENDINGS, ".npy", ".dcm") if path.name.endswith(e)), "")
        path.rename(path.with_name(path.name.removesuffix(end) + end.upper()))
    after = open_reader(name, root)
    assert [r.id for r in after.refs()] == [r.id for r in before.refs()]
    assert [r.group for r in after.refs()] == [r.group for r in before.refs()]
    found = survey(after, workers=1)
    assert not found.problems, found.problems[:3]
    assert after.dataset() == before.dataset().model_copy(update={"name": after.dataset().name})


@pytest.mark.parametrize("name", NAMES)
def test_the_same_image_twice_is_kept_on_one_side(name, phantoms, tmp_path):
    reader = open_reader(name, phantoms(name))
    first, last = reader.refs()[0], reader.refs()[-1]
    root = Path(shutil.copytree(reader.root, tmp_path / "raw"))
    images = zip(first.images, last.images, strict=True)
    for old, new in (*images, *((first.labels[0], label) for label in last.labels)):
        (root / new.relative_to(reader.root)).write_bytes(old.read_bytes())
    found = survey(open_reader(name, root), workers=1)
    assert not found.problems
    (warning,) = [w for w in found.warnings if w.case == first.id and w.field == "image"]
    assert last.id in warning.found and {ref.id: ref.group for ref in found.refs}[last.id] == (
        first.group or first.id
    )


def empty_image(reader: RawReader) -> None:
    victim(reader).images[0].write_bytes(b"")


def truncated_mask(reader: RawReader) -> None:
    path = victim(reader).labels[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


def folder_for_a_file(reader: RawReader) -> None:
    for path in victim(reader).labels:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "fault", [empty_image, truncated_mask, folder_for_a_file], ids=lambda fault: fault.__name__
)
@pytest.mark.parametrize("name", NAMES)
def test_further_faults_name_the_case(name, fault, broken, phantoms, tmp_path):
    case = victim(open_reader(name, phantoms(name))).id
    error = refused(name, broken(name, fault), tmp_path / "store")
    assert case in {p.case for p in error.problems} <= {case, "numTraining", "dataset.json"}, error
    assert all(p.found and p.mend for p in error.problems)


SIDECARS = (".json", ".csv", ".cfg", ".txt", ".xlsx")
JUNK = {
    "binary": b"\xff\xfe\x00\x9d" * 40,
    "nothing": b"",
    "half": b'{"training": [{"image"',
    "list": b"[1, 2, 3]\n",
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_description_is_a_message_or_no_matter(name, junk, phantoms, tmp_path):
    """Descriptions beside the images: JSON, lists, tables. Also those the phantom has none of, in
    every place a reader may look."""
    reader = open_reader(name, phantoms(name))
    there = [
        path.relative_to(reader.root)
        for path in reader.root.rglob("*")
        if path.suffix.lower() in SIDECARS
    ]
    inner = {
        path.parent.relative_to(reader.root)
        for ref in reader.refs()
        for path in (*ref.images, *ref.labels)
    }
    folders = {place for folder in inner for place in (folder, *folder.parents)}
    optional = (
        "labels.json",
        "splits_final.json",
        "metadata.csv",
        "train.txt",
        "val.txt",
        "Grade.csv",
        "dataset.json",
    )
    extra = [folder / file for folder in folders for file in optional]
    for number, path in enumerate(dict.fromkeys([*there, *extra])):
        root = tmp_path / f"raw{number}"
        shutil.copytree(reader.root, root, copy_function=os.link)
        (root / path).unlink(missing_ok=True)
        (root / path).write_bytes(JUNK[junk])
        try:
            found = open_reader(name, root)
            found.dataset(), found.refs(), found.problems(), found.splits()
        except InputError as error:
            assert path.name in str(error) or "holds no" in str(error), error
        shutil.rmtree(root)
