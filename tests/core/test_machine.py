"""Cores: the least of what the machine, the cgroup and SLURM grant."""

from __future__ import annotations

import pytest

from segfleet.core.machine import cpus, mig_slices, own_slice


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 64 cores whose files are below tmp_path."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


CGROUP = "proc__self__cgroup"


def test_nothing_but_the_machine(machine):
    assert cpus({}, machine()) == 64


def test_a_quota_of_version_2_counts_also_above_the_own_group(machine):
    root = machine(
        **{
            CGROUP: "0::/pod/container\n",
            "sys__fs__cgroup__pod__cpu_dot_max": "200000 100000\n",
            "sys__fs__cgroup__pod__container__cpu_dot_max": "max 100000\n",
        }
    )
    assert cpus({}, root) == 2


def test_a_quota_of_version_1(machine):
    group = "sys__fs__cgroup__cpu__job__cpu.cfs_"
    root = machine(
        **{
            CGROUP: "4:cpu,cpuacct:/job\n",
            f"{group}quota_us": "350000",
            f"{group}period_us": "100000",
        }
    )
    assert cpus({}, root) == 3
    machine(**{f"{group}quota_us": "-1"})
    assert cpus({}, root) == 64
    machine(**{f"{group}quota_us": "50000"})
    assert cpus({}, root) == 1  # half a core is still one to run on


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        ({"SLURM_CPUS_PER_TASK": ""}, 64),
    ],
)
def test_slurm(machine, environ, cores):
    assert cpus(environ, machine()) == cores


def test_sweeps_and_ranks_share_out_the_same_cores(monkeypatch):
    """One answer: nobody counts on his own."""
    from segfleet.core import machine as core
    from segfleet.pipeline.launch import local
    from segfleet.sweeps import run

    assert run.cpus is core.cpus and local.cpus is core.cpus
    monkeypatch.setenv("SEGFLEET_DEVICE", "cpu")
    monkeypatch.setattr(run, "cpus", lambda: 2)
    assert run.Resources(ranks=1).at_once == 2


def test_every_rank_has_a_mig_slice_of_its_own():
    """CUDA shows a process the first of those it may see."""
    seen = {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}
    assert [own_slice(rank, seen)["CUDA_VISIBLE_DEVICES"] for rank in range(3)] == [
        "MIG-a", "MIG-b", "MIG-a",
    ]  # fmt: skip
    for others in ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "GPU-x"}, {}):
        assert own_slice(1, others) == {} and mig_slices(others) == []
