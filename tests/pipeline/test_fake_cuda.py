"""What a GPU would refuse or wait for, found on a CPU: see `fake_cuda_program.py`."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segfleet.models.registry import spec, specs
from segfleet.pipeline.losses.base import losses

HERE = Path(__file__).parent
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


CASES = [
    *(case(name, number) for number, name in enumerate(NAMES)),
    *(
        case("plain_unet_2d", 0, loss=loss, head=LOSSES[loss], precision=precision, ignore=2)
        for loss, precision in itertools.product(sorted(LOSSES), PRECISIONS)
    ),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *includes]
    command += [str(HERE / "fake_cuda.cpp"), "-o", str(made), *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    return made


@pytest.fixture(scope="module")
def answers(library):
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda_program.py"), str(library)],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_loss_is_here():
    assert set(LOSSES) == set(losses())


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{c['model']}-{c['loss']}-{c['precision']}" for c in CASES]
)
def test_a_step_a_checkpoint_and_a_score_stay_on_the_device(answers, number):
    asked, answer = CASES[number], answers[number]
    assert "error" not in answer, answer["error"]
    assert answer["loss"] == ["cuda:0", []] and answer["norm"] == "cuda:0"
    assert answer["devices"] == ["cuda:0"]
    device, (channels, *size) = answer["out"]
    assert device == "cuda:0"
    assert channels == asked["classes"] + (asked["head"] == "softmax")
    assert tuple(size)[-2:] == tuple(spec(asked["model"]).small_input)[-2:]
    assert answer["waits"] == [], "the host waits for the device in a step"
