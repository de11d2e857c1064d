"""What can be segmented: everything the layouts read."""

from __future__ import annotations

import os
import signal
import subprocess

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.core.parallel import Apart
from segfleet.core.partial import temporary_name
from segfleet.pipeline.inference.collect import collect
from segfleet.pipeline.inference.inputs import NOTES, Input, prepare_folder
from segfleet.preprocess.files.images import ImageError
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import Layout, open_reader
from segfleet.preprocess.stores.manifest import Plan
from segfleet.preprocess.transforms.case_transforms import check_room


def test_dicom_folders_are_images_of_their_own(tmp_path):
    root = PHANTOMS["dicom"](tmp_path / "raw", cases=2)
    reader = open_reader("dicom", root)
    images = reader.refs()[0].images[0].parents[1]
    for given, count in (([images], 2), ([images / reader.refs()[1].id], 1)):
        found = collect(given, 1)
        assert len(found) == count and all(one.output == f"{one.id}.nii.gz" for one in found)
    ref = reader.refs()[1]
    image, geometry = found[0].read()
    expected, known = reader.image(ref)
    assert found[0].id == ref.id and np.array_equal(image, expected) and geometry == known
    before = found[0].content()
    data = bytearray(ref.images[3].read_bytes())
    data[-1] ^= 1
    ref.images[3].write_bytes(data)
    assert found[0].content() != before


def test_arrays_and_detached_volumes_are_images(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(60, dtype=np.float32).reshape(4, 5, 3))
    np.save(tmp_path / "b.npy", np.arange(20, dtype=np.float32).reshape(4, 5))
    sitk.WriteImage(sitk.Image(4, 5, 6, sitk.sitkInt16), str(tmp_path / "c.mhd"))
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "d.jpg")
    found = {one.id: one for one in collect([tmp_path], 3)}
    assert [one.output for one in found.values()] == ["a.png", "b.png", "c.mha", "d.png"]
    shapes = [one.read()[0].shape for one in found.values()]
    assert shapes == [(3, 1, 4, 5), (1, 1, 4, 5), (1, 6, 5, 4), (1, 1, 4, 5)]
    before = found["c"].content()
    voxels = bytearray((tmp_path / "c.raw").read_bytes())
    voxels[0] ^= 1
    (tmp_path / "c.raw").write_bytes(voxels)
    assert found["c"].content() != before


@pytest.mark.parametrize("layout", sorted(PHANTOMS))
def test_a_data_set_is_its_cases_as_its_layout_reads_them(layout, tmp_path):
    root = PHANTOMS[layout](tmp_path / "raw") or tmp_path / "raw"
    reader = open_reader(layout, root)
    found = {one.id: one for one in collect([root], 1, layout=Layout(layout))}
    refs = {ref.id.replace("/", "_"): ref for ref in reader.refs()}
    assert found.keys() == refs.keys()
    name, ref = next(iter(refs.items()))
    expected, geometry = reader.image(ref)
    with Apart() as apart:
        image, grid = found[name].read_apart(apart)
    assert np.array_equal(image, expected) and grid == geometry
    assert len({one.output for one in found.values()}) == len(refs)
    with pytest.raises(InputError, match="data set: found 'mds'.*Did you mean 'msd'"):
        collect([root], 1, layout=Layout("mds"))


def test_what_nobody_knows_is_named(tmp_path):
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(InputError, match="file ending is none of"):
        collect([tmp_path / "a.xyz"], 1)
    with pytest.raises(InputError, match="or folders of DICOM files"):
        collect([tmp_path], 1)
    (tmp_path / "b.npy").write_bytes(b"x" * 99)
    with pytest.raises(ImageError, match="damaged"):
        collect([tmp_path / "b.npy"], 1)[0].read()


def test_a_spacing_that_would_fill_the_memory_is_one_message():
    plan = Plan(target_spacing=(1, 1, 1), patch=(8, 8, 8), normalisation=("ct",))
    check_room("a", (100, 512, 512), (5, 1, 1), plan)
    with pytest.raises(InputError, match="found 100x100x100 mm, .* GiB.* header's spacing"):
        check_room("a", (100, 512, 512), (100, 100, 100), plan)


def test_what_is_no_file_is_a_problem_of_its_own(tmp_path):
    """Never waited for, never left out silently."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.nii.gz").symlink_to("nowhere")
    (tmp_path / "c.png").symlink_to("c.png")
    found = {one.id: one.problem for one in collect([tmp_path], 1)}
    assert found == {
        "a": f"{tmp_path / 'a.png'}: found a pipe or device, expected a file",
        "b": f"{tmp_path / 'b.nii.gz'}: found a link to nowhere, which is not there, expected a "
        "file",
        "c": f"{tmp_path / 'c.png'}: found a link to c.png, which is not there, expected a file",
    }


def killed(one):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_picture_that_crashes_its_reader_is_one_sentence(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    (one,) = collect([tmp_path], 3)
    with Apart() as apart:
        assert np.array_equal(one.read_apart(apart)[0], one.read()[0])
        monkeypatch.setattr(Input, "read", killed)
        with pytest.raises(ImageError, match="found a.png, which ended the process that read it"):
            one.read_apart(apart)


def test_what_a_killed_prediction_left_goes_with_the_next_one(tmp_path):
    """Half a file, half a note; not what a process that lives is writing."""
    out, images = tmp_path / "out", tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.ones((8, 8), np.uint8)).save(images / "a.png")
    found = collect([images], 1)
    prepare_folder(out, found, "run")
    (out / NOTES).mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = []
    for number in (gone.pid, os.getpid()):
        for path in (out / "a.png", out / NOTES / "a.png.json"):
            name = temporary_name(path).name
            left.append(path.with_name(name.replace(f"-{os.getpid()}-", f"-{number}-")))
            left[-1].write_text("half")
    prepare_folder(out, found, "run")
    assert [path.exists() for path in left] == [False, False, True, True]
