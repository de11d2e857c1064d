"""What a GPU would refuse or wait for, found on a CPU: see `fake_cuda_program.py`; what of an
inference stays there, and what crosses: `fake_cuda_inference.py`."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segfleet.models.registry import spec, specs
from segfleet.pipeline.losses.base import losses
from tests.networks import LIKE
from tests.pipeline.fake_cuda_program import STREAMING, WAITING

HERE = Path(__file__).parent
PATIENCE = float(os.environ.get("SEGFLEET_TEST_PATIENCE", 1))  # more on a loaded machine
TORCH = Path(torch.__file__).parent
NAMES = sorted(specs())
PRECISIONS = ("fp32", "bf16", "fp16")
HEADS = ("softmax", "sigmoid")
LOSSES = {"bce_dice": "sigmoid", "dice_ce": "softmax", "ss": "softmax"}

pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CUDA build needs no fake device"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


def case(model: str, number: int, **changes) -> dict:
    """A network's set-up; precisions, heads and optimizers take turns."""
    return {
        "model": model,
        "classes": 2,
        "head": HEADS[number % 2],
        "loss": "auto",
        "optimizer": ("adamw", "sgd")[number % 2],
        "precision": PRECISIONS[number % 3],
        **changes,
    }


# Without `engine.deterministic`, what CUDA adds up as it comes.
POOLS, SAMPLES = "avg_pool3d_backward", "grid_sampler_2d_backward"
UPSAMPLES = "upsample_bilinear2d_backward"
FREE = {
    "asc_seg": [SAMPLES, UPSAMPLES],
    "asc_seg_nomamba": [SAMPLES, UPSAMPLES],
    "nlie_unet_t": [SAMPLES],
    "nlie_unet_s": [SAMPLES],
    "nlie_unet_b": [SAMPLES],
    "nlie_unet_l": [SAMPLES],
    "primus_v3_m": [POOLS],
    "primus_v3_s": [POOLS],
    "resenc_unet_3d": [POOLS],
    "unext": [UPSAMPLES],
}

# Networks whose parts another one has, too; the long test below takes every one.
SAME_PARTS = {
    *("asc_seg_nomamba", "e2mi_seg_acdc", "e2mi_seg_mcl", "mednext_s5"),
    *("unet_lite_se", "unet_lite_spatial", "unet_lite_depthwise"),
}
# One of each kind of network, and every loss in every precision with one of them.
CASES = [
    *(case(name, number) for number, name in enumerate(NAMES) if name not in {*LIKE, *SAME_PARTS}),
    *(
        case("plain_unet_2d", 0, loss=loss, head=LOSSES[loss], precision=precision, ignore=2)
        for loss, precision in itertools.product(sorted(LOSSES), PRECISIONS)
    ),
]


# Elements of the weights that are averaged: no large tensor, and three.
AVERAGES = [[1000] * 20, [1000] * 20 + [2**20, 2**22, 2**24]]

# Launches of a network, by how it normalises.
COUNTED = {
    **{
        norms: {"counted": "asc_seg", "whole": True, "norms": norms} for norms in ("alone", "fused")
    },
    "views": {"counted": "plain_unet_3d", "norms": "views"},
    "no views": {"counted": "plain_unet_3d", "norms": "alone"},
}

ON_DEVICE = {"augment": {"device": "auto", "flip": [1], "rot90": True}}

# What a step may have besides a network and a loss.
SET_UPS = {
    "accumulate": case("unet_lite_standard", 0, more={"engine": {"accumulate": 2}}),
    "anchor": case("unet_lite_standard", 1, stage={"anchor": 0.1}),
    "freeze": case("unet_lite_standard", 0, more={"stages": [{"epochs": 1, "lr": 1,
                                                              "freeze": ["encoder"]}]}),
    "no clip, rates": case(
        "unet_lite_standard", 1,
        more={
            "optimizer": {"clip": 0},
            "stages": [{"epochs": 1, "lr": 1, "layer_decay": 0.9, "rates": {"head": 2}}],
        },
    ),
    "class weights, ignored voxels": case(
        "plain_unet_2d", 0, loss="dice_ce", ignore=2,
        more={"loss": {"options": {"class_weights": [1, 2, 3], "batch": True}}},
    ),
    "reconstruct": case("plain_unet_2d", 2, more={"task": "reconstruct"}),
    "augment on the device": case("unet_lite_standard", 1, more={"data": ON_DEVICE}),
    "augment on the device, 2D": case("plain_unet_2d", 0, more={"data": ON_DEVICE}),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *includes]
    command += [str(HERE / "fake_cuda.cpp"), "-o", str(made), *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    return made


def ask(library: Path, cases: list[dict], seconds: float) -> list[dict]:
    """What one process says of `cases`."""
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda_program.py"), str(library)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=seconds * PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(library):
    return ask(library, CASES, 280)


@pytest.fixture(scope="module")
def more_answers(library):
    """Of set-ups, of single lines, of averages, and of what networks launch."""
    lines = [{"line": line} for line in (*WAITING, *STREAMING)]
    averages = [{"average": sizes} for sizes in AVERAGES]
    found = iter(ask(library, [*SET_UPS.values(), *lines, *averages, *COUNTED.values()], 160))
    return (
        {name: next(found) for name in SET_UPS},
        {line: next(found) for line in (*WAITING, *STREAMING)},
        [next(found) for _ in AVERAGES],
        {name: next(found) for name in COUNTED},
    )


@pytest.mark.parametrize("name", SET_UPS)
def test_the_host_waits_in_no_step_whatever_is_asked_of_it(more_answers, name):
    answer = more_answers[0][name]
    assert "error" not in answer, answer["error"]
    assert answer["waits"] == [] and answer["loss"] == ["cuda:0", []]


@pytest.mark.parametrize("name", [name for name in SET_UPS if "on the device" in name])
def test_boxes_labels_and_what_was_drawn_are_all_that_goes_to_the_device(more_answers, name):
    """In a step whose batch is augmented there, by all changes there are."""
    answer = more_answers[0][name]
    assert answer["sent"] == ["float16", "uint8", "int64"]
    assert answer["without_order"] == [[], []]


def test_what_makes_the_host_wait_is_seen(more_answers):
    """By the recorder that the tests above rely on."""
    expected = dict.fromkeys(WAITING, True) | dict.fromkeys(STREAMING, False)
    assert more_answers[1] == expected


def test_large_weights_are_averaged_in_one_pass_and_small_ones_together(more_answers):
    small, large = more_answers[2]
    assert "error" not in large, large["error"]
    assert large["kernels"] == small["kernels"] + 3
    assert small["bytes"] < 20 * 1000 * 4 + 100, "one difference, no more"
    assert large["bytes"] == small["bytes"], "no second copy of a large weight"


def test_normalisation_over_ranks_is_eight_kernels_and_two_collectives_a_layer(more_answers):
    """A layer by itself is three kernels. asc_seg: 1,851 launches alone, 2,704 over ranks, and
    7,230 as CPUs do it ("apart")."""
    alone, fused = (more_answers[3][name] for name in ("alone", "fused"))
    assert "error" not in fused, fused["error"]
    layers = fused["layers"]
    assert layers > 100 and alone["collectives"] == 0
    assert fused["collectives"] == 2 * layers
    # some maps are laid out anew; counts are made once for a size
    assert fused["kernels"] - alone["kernels"] <= 5 * layers + 60


def test_instance_normalisation_lets_its_successor_work_in_place(more_answers):
    """PyTorch's own gives a view out, and the gradient is copied for what works in place on it."""
    ours, views = (more_answers[3][name] for name in ("no views", "views"))
    assert "error" not in ours, ours["error"]
    copies = [one["names"].get("copy_", 0) + one["names"].get("clone", 0) for one in (ours, views)]
    assert copies == [0, 3 * ours["layers"]]
    assert views["kernels"] - ours["kernels"] == 3 * ours["layers"]


def test_every_loss_is_here():
    assert set(LOSSES) == set(losses())


def stayed(asked: dict, answer: dict) -> None:
    assert "error" not in answer, answer["error"]
    assert answer["loss"] == ["cuda:0", []] and answer["norm"] == "cuda:0"
    assert answer["devices"] == ["cuda:0"]
    device, (channels, *size) = answer["out"]
    assert device == "cuda:0"
    assert channels == asked["classes"] + (asked["head"] == "softmax")
    assert tuple(size)[-2:] == tuple(spec(asked["model"]).small_input)[-2:]
    assert answer["waits"] == [], "the host waits for the device in a step"
    ordered, free = answer["without_order"]
    assert ordered == [], "engine.deterministic leaves what has no order"
    assert free == FREE.get(asked["model"], [])


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{c['model']}-{c['loss']}-{c['precision']}" for c in CASES]
)
def test_a_step_a_checkpoint_and_a_score_stay_on_the_device(answers, number):
    stayed(CASES[number], answers[number])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_in_every_precision_stays_on_the_device(library, name):
    """The whole product, of which the suite takes a part."""
    product = itertools.product(sorted(LOSSES), PRECISIONS, ("adamw", "sgd"))
    asked = [
        case(name, 0, loss=loss, head=LOSSES[loss], precision=precision, optimizer=optimizer)
        for loss, precision, optimizer in product
    ]
    for each, answer in zip(asked, ask(library, asked, 1700), strict=True):
        stayed(each, answer)


RAW = [20, 60, 50]
TILES = 4 * 4 * 4  # of 8 x 16 x 16 over 20 x 40 x 40, half overlapping


@pytest.fixture(scope="module")
def inferences(library):
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda_inference.py"), str(library)],
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_sums_stay_on_the_device_and_only_labels_cross(inferences):
    roomy, _, unnumbered = inferences
    assert roomy["device"] == "cuda:0" and roomy["size"] == [3, 20, 40, 40]
    assert roomy["sums"] == [], "the sliding window fetches something"
    assert roomy["labels"] == [["uint8", RAW]] and roomy["restored"] == RAW
    assert roomy["calibration"] == [], "probabilities cross for the calibration"
    assert unnumbered == roomy, 'device "cuda" is the first one'
    assert roomy["passes"] == [1, TILES], "the last tile fills the second pass up"


def test_what_does_not_fit_is_summed_on_the_host_pass_by_pass(inferences):
    _, scarce, _ = inferences
    assert scarce["device"] == "cpu"
    assert sum(scarce["passes"]) == TILES and set(scarce["passes"]) == {1}
    assert [kind for kind, _ in scarce["sums"]] == ["float32"] * TILES
    assert all(math.prod(size) == 3 * 8 * 16 * 16 for _, size in scarce["sums"])
