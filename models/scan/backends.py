"""Which code runs a scan: chosen by device and availability, forced by argument or by
SEGFLEET_SCAN, and said once in the log."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch

from segfleet.models.registry import ModelError

VARIABLE = "SEGFLEET_SCAN"
MODULES = {
    "mamba_ssm": "external",
    "triton": "triton_backend",
    "native": "native",
    "chunked": "chunked",
}
NAMES = ("auto", *MODULES)
ORDER = {"cuda": ("mamba_ssm", "triton", "chunked"), "cpu": ("native", "chunked")}

log = logging.getLogger("segfleet.scan")
_logged: set[tuple[str, str]] = set()


def load(name: str) -> ModuleType:
    """The module of a back end: `unavailable(device)`, `forward`, `backward`."""
    return importlib.import_module(f"segfleet.models.scan.{MODULES[name]}")


def choose(wanted: str, device: torch.device, *, own_only: bool = False) -> str:
    """The back end for `device`. `wanted`: a name, or "auto" for the variable and then the best
    there is.

    own_only: leave out mamba_ssm, for what its kernels do not offer: compiled graphs, gradients of
    the last state. Under `torch.use_deterministic_algorithms` it is left out, too: its kernels add
    gradients as they come.

    Raises ModelError for an unknown name, or for a forced back end that cannot run here.
    """
    source, own_only = "backend", own_only or torch.are_deterministic_algorithms_enabled()
    if wanted == "auto":
        source, wanted = VARIABLE, os.environ.get(VARIABLE, "") or "auto"
    if wanted not in NAMES:
        raise ModelError(
            f"selective_scan: {source} is '{wanted}', expected one of: {', '.join(NAMES)}"
        )
    if own_only and wanted == "mamba_ssm" and device.type == "cuda":
        wanted = "auto"
    if wanted != "auto":
        if reason := load(wanted).unavailable(device):
            raise ModelError(
                f"selective_scan: {source} asks for '{wanted}', which cannot run on "
                f"{device.type}: {reason}"
            )
        _log_choice(device, wanted, f"forced by {source}")
        return wanted
    missing = []
    for name in ORDER.get(device.type, ("chunked",))[own_only and device.type == "cuda" :]:
        if not (reason := load(name).unavailable(device)):
            level = logging.WARNING if name == "chunked" and missing else logging.INFO
            _log_choice(device, name, "; ".join(missing) or "the best there is", level)
            return name
        missing.append(f"{name}: {reason}")
    raise AssertionError("the chunked back end runs everywhere")


def _log_choice(device: torch.device, name: str, why: str, level: int = logging.INFO) -> None:
    if (device.type, name) not in _logged:
        _logged.add((device.type, name))
        log.log(level, "selective scan on %s runs with back end '%s' (%s)", device.type, name, why)
