"""What trained, and the energy it took, from files as Linux has them."""

from __future__ import annotations

import torch

from segfleet.pipeline.training.hardware import Energy, hardware


def counter(folder, name, joules, most=1000):
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (path / "max_energy_range_uj").write_text(f"{int(most * 1e6)}\n")


def test_energy_of_all_packages_once_and_over_the_counter_s_end(tmp_path):
    cpu = torch.device("cpu")
    assert Energy(cpu, tmp_path).joules() is None, "no counters, no number"
    counter(tmp_path, "intel-rapl:0", 990)
    counter(tmp_path, "intel-rapl:1", 20)
    counter(tmp_path, "intel-rapl:0:0", 500)  # the cores, which the package counts too
    energy = Energy(cpu, tmp_path)
    counter(tmp_path, "intel-rapl:0", 5)  # it began again at 1000
    counter(tmp_path, "intel-rapl:1", 27.5)
    counter(tmp_path, "intel-rapl:0:0", 900)
    assert energy.joules() == 15 + 7.5


def test_hardware_is_a_few_words(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast CPU 9000\n")
    assert hardware(torch.device("cpu"), 2, tmp_path).endswith("cores of Fast CPU 9000")
    assert " cores of " in hardware(torch.device("cpu"), 2, tmp_path / "nothing")
