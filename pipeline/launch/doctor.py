"""What this machine can do: versions, cores, memory, devices, and a 3D convolution timed and
checked in every precision."""

from __future__ import annotations

import platform
import shutil
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from segfleet.core.machine import cpus, memory_budget
from segfleet.pipeline.devices import driver
from segfleet.pipeline.engines.base import autocast
from segfleet.pipeline.ranks import pick_device

PACKAGES = (
    "segfleet",
    "torch",
    "numpy",
    "zarr",
    "h5py",
    "deepspeed",
    "submitit",
    "ray",
    "mamba-ssm",
    "triton",
    "tensorboardX",
)
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}  # relative error against float64
PROGRAMS = ("sbatch", "c++", "nvidia-smi")


def check_machine() -> dict[str, Any]:
    """Everything as plain data."""
    problem = driver.fault()
    device = torch.device("cpu") if problem else pick_device(0)
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "programs": {name: shutil.which(name) for name in PROGRAMS},
        "cores": cpus(),
        "memory_gib": round(memory_budget() / 2**30, 1),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": driver.kernel_module() or None,
        "driver_problem": problem or None,
        "convolutions": [
            _convolution(precision, last, device)
            for precision in TOLERANCE
            for last in (False, True)
        ],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _convolution(precision: str, channels_last: bool, device: torch.device) -> dict[str, Any]:
    """Median time of a 3x3x3 convolution, 16 -> 16 channels on 16 x 32 x 32 voxels, and its
    relative error."""
    generator = torch.Generator().manual_seed(0)
    image, weight = (
        torch.randn(1, 16, 16, 32, 32, generator=generator),
        torch.randn(16, 16, 3, 3, 3, generator=generator) / 20,
    )
    exact = torch.nn.functional.conv3d(image[:, :, :8, :8, :8].double(), weight.double(), padding=0)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    image, weight = (value.to(device).contiguous(memory_format=layout) for value in (image, weight))
    settings: dict[str, Any] = {"precision": precision, "channels_last": channels_last}
    try:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            with autocast(precision, device), torch.no_grad():
                output = torch.nn.functional.conv3d(image, weight, padding=1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        inner = output[:, :, 1:7, 1:7, 1:7].double().cpu()
        error = ((inner - exact).norm() / exact.norm()).item()
        return {
            **settings,
            "ms": round(statistics.median(seconds) * 1e3, 2),
            "error": error,
            "right": error < TOLERANCE[precision],
        }
    except RuntimeError as error:
        return {
            **settings,
            "ms": None,
            "error": None,
            "right": False,
            "why": str(error).splitlines()[0],
        }
