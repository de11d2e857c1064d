"""What trained, and what it drew from the wall as far as the machine measures it."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch

from segfleet.core.machine import cpus

RAPL = Path("/sys/class/powercap")  # energy counters of processors, as a rule for root alone


def hardware(device: torch.device, ranks: int, proc: Path = Path("/proc")) -> str:
    """A few words: "2 x NVIDIA H200", or "8 cores of AMD EPYC 7763 64-Core Processor"."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    model = platform.machine()
    with suppress(OSError, StopIteration):
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = next(line for line in lines if line.lower().startswith("model name"))
        model = named.partition(":")[2].strip()
    return f"{cpus()} cores of {model}"


class Energy:
    """Joules since it was made: the processors of this machine by RAPL, and this process's GPU by
    NVML (where the package pynvml is there). None where neither can be read."""

    def __init__(self, device: torch.device, rapl: Path = RAPL):
        self.device, self.rapl = device, rapl
        self.begin = self._read()

    def joules(self) -> float | None:
        now, total = self._read(), 0.0
        for name, (value, wrap) in now.items():
            before = self.begin.get(name, (value, wrap))[0]
            total += value - before + (wrap if value < before else 0.0)  # counters start again
        return round(total, 3) if now else None

    def _read(self) -> dict[str, tuple[float, float]]:
        """Counter -> (joules, at which it starts again)."""
        counters: dict[str, tuple[float, float]] = {}
        for folder in sorted(self.rapl.glob("intel-rapl:[0-9]*")):
            if folder.name.count(":") == 1:  # a package; its parts are counted with it
                with suppress(OSError, ValueError):
                    value, most = (
                        int((folder / name).read_text()) / 1e6
                        for name in ("energy_uj", "max_energy_range_uj")
                    )
                    counters[folder.name] = value, most
        if self.device.type == "cuda":
            with suppress(Exception):  # no pynvml, or a GPU that does not count
                import pynvml

                pynvml.nvmlInit()
                uuid = str(torch.cuda.get_device_properties(self.device).uuid)
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
                counters["gpu"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0
        return counters
