"""What this process may use: cores and bytes, as the cgroup, SLURM and the machine grant them."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

RESERVE = 0.8  # share of what is free that a job takes for itself


def cpus(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Cores this process may use: the smallest of its affinity, the cgroup's quota and SLURM's
    allocation."""
    limits = [
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ]
    for granted in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        limits += [int(text)] if (text := environ.get(granted, "")).isdecimal() else []
    for folder in _cgroups(root, ""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.strip().isdecimal():
            limits.append(int(quota) // int(period))
    for folder in _cgroups(root, "cpu"):
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) // int(period))
    return max(1, min(limits))


def cpus_of_a_rank(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Cores for this rank alone: SLURM grants them to a task, other launchers to all ranks of a
    machine together, whose number LOCAL_WORLD_SIZE says."""
    if environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        return cpus(environ, root)
    ranks = environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cpus(environ, root) // max(1, int(ranks) if ranks.isdecimal() else 1))


def threads_of(environ: Mapping[str, str] = os.environ) -> int | None:
    """Threads that OMP_NUM_THREADS asks for: its first number, for nested loops have more (`4,2`).
    None: not said, or nothing that OpenMP would obey."""
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


# OpenMP's threads spin while they wait for each other. Where somebody else's process has the core
# of the one they wait for, that is most of what they do (benchmarks/waiting.py).
WAITING = "OMP_WAIT_POLICY"


def waiting(environ: Mapping[str, str] = os.environ) -> str:
    """How threads wait for each other where people share a machine, unless the environment says
    otherwise."""
    return environ.get(WAITING, "passive")


def wait_as_ranks_do(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let this process' threads wait for each other as those of local ranks. OpenMP looks once, so
    it comes before the first import of torch."""
    environ[WAITING] = waiting(environ)


def mig_slices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The slices of GPUs (NVIDIA's MIG) that this process may see, by name. CUDA shows a process
    the first of them alone, so each rank has to be given its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible if visible[0].startswith("MIG-") else []


def own_slice(local_rank: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a rank's environment needs for the MIG slice that is its own; nothing without slices."""
    slices = mig_slices(environ)
    return {"CUDA_VISIBLE_DEVICES": slices[local_rank % len(slices)]} if slices else {}


def memory_budget(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Bytes this process and its children may still take: 80 % of the least that machine, cgroup
    (v2, v1) and SLURM leave free."""
    free = []
    free += [
        int(line.split()[1]) * 1024
        for line in _text(root / "proc/meminfo").splitlines()
        if line.startswith("MemAvailable:")
    ]
    for folder in _cgroups(root, ""):
        free += _left(folder / "memory.max", folder / "memory.current", folder / "memory.stat")
    for folder in _cgroups(root, "memory"):
        free += _left(
            folder / "memory.limit_in_bytes",
            folder / "memory.usage_in_bytes",
            folder / "memory.stat",
        )
    if environ.get("SLURM_MEM_PER_NODE", "").isdecimal() and int(environ["SLURM_MEM_PER_NODE"]):
        free.append(int(environ["SLURM_MEM_PER_NODE"]) * 2**20)
    elif environ.get("SLURM_MEM_PER_CPU", "").isdecimal():
        on_node = environ.get("SLURM_CPUS_ON_NODE", environ.get("SLURM_CPUS_PER_TASK", "1"))
        free.append(
            int(environ["SLURM_MEM_PER_CPU"]) * (int(on_node) if on_node.isdecimal() else 1) * 2**20
        )
    return int(RESERVE * min(free, default=2 * 2**30))


def _left(limit: Path, used: Path, stat: Path) -> list[int]:
    """Bytes below a limit; page cache counts as free, since the kernel gives it back."""
    # "max", or version 1's way to say so
    if not _text(limit).isdecimal() or int(_text(limit)) > 2**60:
        return []
    cache = [
        int(line.split()[1])
        for line in _text(stat).splitlines()
        if line.startswith(("inactive_file ", "total_inactive_file "))
    ]
    usage = int(_text(used)) if _text(used).isdecimal() else 0
    return [max(0, int(_text(limit)) - usage + max(cache, default=0))]


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and all above it: version 2 for controller "", else
    version 1."""
    mount = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inner = mount / path.lstrip("/")
            return [inner, *(p for p in inner.parents if p.is_relative_to(mount))]
    return [mount]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
