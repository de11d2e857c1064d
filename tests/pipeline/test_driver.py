"""A driver that is too old for PyTorch's build is named, not passed over in silence."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from segfleet.cli.doctor import command, render
from segfleet.core.errors import InputError
from segfleet.pipeline.devices import driver
from segfleet.pipeline.launch import doctor
from segfleet.pipeline.ranks import device_of, pick_device

# as PyTorch says it, c10/cuda/CUDAFunctions.cpp
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)
NONE = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed "
    "a driver"
)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A CUDA build of PyTorch whose start says `words`."""
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
        "GCC version:  gcc version 9.3.0\n"
    )
    monkeypatch.setattr(driver.kernel_module, "__defaults__", (version,))
    monkeypatch.setattr(driver.fault, "__defaults__", (version,))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SEGFLEET_DEVICE", raising=False)

    def says(words):
        def init():
            raise RuntimeError(words)

        monkeypatch.setattr(torch.cuda, "init", init)

    return says


def test_both_versions_are_named_where_a_device_is_chosen(build, monkeypatch):
    build(TOO_OLD)
    with pytest.raises(InputError) as error:
        pick_device(0)
    for words in ("driver 470.57.02", "CUDA 11.4", "built for CUDA 12.8", "SEGFLEET_DEVICE=cpu"):
        assert words in str(error.value)
    monkeypatch.setenv("SEGFLEET_DEVICE", "cpu")
    assert pick_device(0).type == device_of("cpu").type == "cpu"


def test_a_machine_without_a_gpu_trains_on_its_cpu(build):
    build(NONE)
    assert driver.fault() == "" and pick_device(0).type == "cpu"


def test_doctor_says_so_and_goes_on(build, monkeypatch):
    build(TOO_OLD)
    monkeypatch.setattr(doctor, "_convolution", lambda *_: {
        "precision": "fp32", "channels_last": False, "ms": 1.0, "error": 0.0, "right": True
    })  # fmt: skip
    found = doctor.check_machine()
    assert found["driver"] == "470.57.02" and found["cuda"] == "12.8"
    assert "built for CUDA 12.8" in found["driver_problem"] and found["device"].startswith("CPU")
    import typer

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["driver_problem"]


def test_doctor_prints_it(build, capsys):
    build(TOO_OLD)
    facts = {"packages": {}, "programs": {}, "convolutions": [], "python": "3", "cores": 1}
    facts |= {"memory_gib": 1, "device": "CPU", "cuda": "12.8", "driver": "470.57.02"}
    render(facts | {"driver_problem": driver.fault()})
    assert "GPU: the NVIDIA driver 470.57.02 is too old" in capsys.readouterr().out
    render(facts | {"driver_problem": None})
    assert "CUDA 12.8, driver 470.57.02" in capsys.readouterr().out


def test_an_open_kernel_module_is_read_too(tmp_path):
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    assert driver.kernel_module(path) == "580.65.06"
    assert driver.kernel_module(tmp_path / "none") == ""
