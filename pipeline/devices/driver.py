"""Why PyTorch finds no GPU though it was built for one: a driver that is too old."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
TOO_OLD = re.compile(r"driver on your system is too old \(found version (\d+)\)")


def fault(proc: Path = KERNEL_MODULE) -> str:
    """One sentence that names both versions if the driver is older than this PyTorch needs; else
    empty, also where no GPU is."""
    if torch.version.cuda is None:
        return ""
    with warnings.catch_warnings():  # which says the half of it
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return ""
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            match = TOO_OLD.search(str(error))
        else:
            return ""
    if not match:
        return ""
    number = int(match[1])  # 11040 is 11.4
    newest = f"{number // 1000}.{number % 1000 // 10}"
    driver = kernel_module(proc)
    return (
        f"the NVIDIA driver{f' {driver}' if driver else ''} is too old: it runs CUDA {newest} and "
        f"older, and this PyTorch {torch.__version__} was built for CUDA {torch.version.cuda}. "
        f"Update the driver, or install a PyTorch that was built for CUDA {newest}"
    )


def kernel_module(proc: Path = KERNEL_MODULE) -> str:
    """The driver's own version, such as 470.57.02; empty if the kernel does not say."""
    try:
        text = proc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    version = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", text)
    return version[1] if version else ""
