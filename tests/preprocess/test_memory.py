"""What preprocessing a volume takes is what the budget of the workers reckons with."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from segfleet.preprocess.checking.check import memory_of
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.manifest import load_manifest

SHAPE = (64, 192, 192)
MEASURE = """
import sys
from pathlib import Path
import SimpleITK, scipy.ndimage, nibabel, h5py, segfleet.preprocess.stores.zarr
from segfleet.preprocess.transforms import resample
from segfleet.preprocess.transforms import voxels
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.planning.plan import Overrides
resample.SLAB, resample.THINNEST, voxels.PIECE = 2**18, 16, 2**16  # in proportion to a small volume
words = lambda: Path("/proc/self/status").read_text().split()
# ru_maxrss would begin with that of whoever started us
peak = lambda: int(words()[words().index("VmHWM:") + 1]) * 1024
start = peak()
plan = Overrides(spacing=tuple(map(float, sys.argv[3].split(","))))
build(BuildRequest("nnunet", sys.argv[1], sys.argv[2], workers=1, overrides=plan))
print(peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("channel", "dtype", "spacing", "less_than"),
    [
        ("CT", np.int16, "1,0.9,0.9", 18),
        pytest.param("MRI", np.float64, "0.9,0.9,0.9", 24, marks=pytest.mark.long),
    ],
)
def test_the_peak_is_below_the_estimate(channel, dtype, spacing, less_than, tmp_path):
    """`less_than`: bytes per voxel of the raw grid."""
    draw = np.random.default_rng(0)
    image = (
        np.repeat(draw.integers(-500, 500, SHAPE[:2]), SHAPE[2], axis=1)
        .reshape(SHAPE)
        .astype(dtype)
    )
    label = np.ones(SHAPE, np.uint8)
    label[:, :60] = 2
    image[:12] = 0  # is cropped away
    for folder, array in (("imagesTr/c_0000", image), ("labelsTr/c", label)):
        path = tmp_path / "raw" / f"{folder}.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(array.T, np.eye(4)), path)
    labels = {"background": 0, "a": 1, "b": 2}
    facts = {
        "channel_names": {"0": channel},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(facts))
    command = [sys.executable, "-c", MEASURE, tmp_path / "raw", tmp_path / "store", spacing]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (case,) = load_manifest(tmp_path / "store").cases
    (ref,) = open_reader("nnunet", tmp_path / "raw").refs()
    assert np.prod(case.shape) > np.prod(SHAPE) * 0.8 and case.has_truth
    assert 4 * image.size < taken < memory_of(ref) + 2 * 3 * int(np.prod(case.shape))
    assert taken < less_than * image.size
