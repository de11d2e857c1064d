"""`benchmarks/gpu.py` on the CPU at tiny sizes: every section runs, is kept row by row, and goes
on. What it says there means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(HERE))
import gpu  # noqa: E402
import gpu_sections  # noqa: E402

from segfleet.pipeline.devices import driver  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    results = gpu.Results(tmp_path_factory.mktemp("gpu") / "gpu.json")

    def known(section, row):
        return results.read()["sections"].get(section, {}).get(row, {})

    made = gpu_sections.Bench(
        device=torch.device("cpu"), quick=True, folder=results.path.parent, known=known
    )
    return made, results


@pytest.fixture(autouse=True)
def as_before():
    """Settings of the whole process that a section changes."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False


ROWS = {
    "resume": {"plain": {"bitwise"}, "deterministic": {"bitwise", "skipped"}},
    "yardstick": {
        "nnunet eager": {"voxels_per_s"},
        "segfleet eager": {"voxels_per_s"},
        "ratio": {"times_nnunet"},
    },
    "workers": {"0": {"voxels_per_s", "idle", "waiting"}, "1": {"idle"}},
    "loader": {"0": {"patches_per_s"}, "1": {"patches_per_s"}},
    "scan": {"256": {"chunked_ms"}},
    "window": {"auto": {"cases_per_s", "idle"}, "two tiles": {"idle"}, "mirrored": {"idle"}},
    "checkpoint": {"stall": {"stall_ms", "share"}},
    "networks": {"plain_unet_2d bf16 eager": {"ms", "tflops"}},
}


@pytest.mark.parametrize("section", sorted(ROWS))
def test_every_section_measures(section, bench):
    if section == "yardstick":
        pytest.importorskip("dynamic_network_architectures")
    made, results = bench
    found = {}
    for row, measure in gpu_sections.SECTIONS[section](made):
        found[row] = measure()
        results.keep(section, row, found[row])
        if section in ("networks", "scan"):
            break
    if section != "networks":
        assert set(found) == set(ROWS[section])
    for row, keys in ROWS[section].items():
        assert keys & set(found[row]), (row, found[row])
        for key in keys - {"bitwise", "skipped", "idle", "waiting", "share", "stall_ms"}:
            assert found[row][key] > 0
        for key in {"idle", "waiting", "share"} & set(found[row]):
            assert 0 <= found[row][key] <= 1
        if "bitwise" in found[row]:
            assert found[row]["bitwise"] == 1, "on a CPU a resumed run has the same bits"


def test_all_sections_have_their_time():
    assert list(gpu.SECONDS) == list(gpu_sections.SECTIONS)
    others = [seconds for name, seconds in gpu.SECONDS.items() if name != "networks"]
    assert sum(others) < 7 * 60
    assert all(row[0] in gpu.SECONDS for row in gpu.TARGETS.values())


def test_idle_is_what_no_kernel_covers():
    assert gpu_sections.idle([(0, 4), (2, 6), (9, 10)]) == pytest.approx(0.3)
    assert gpu_sections.idle([(0, 10), (2, 3)]) == 0
    assert gpu_sections.idle([]) == 1


def asked(out: Path, **more) -> Namespace:
    facts = {"device": "cpu", "quick": True, "minutes": 5, "only": ["scan"], "out": out}
    return Namespace(**facts | more)


def test_a_second_call_takes_only_what_is_missing(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(gpu.SECONDS, "scan", 250)  # on a loaded machine
    out = tmp_path / "results" / "gpu.json"
    gpu.run(asked(out), tmp_path)
    first = json.loads(out.read_text())
    assert first["sections"]["scan"]["256"]["chunked_ms"] > 0 and first["begun"] == {}
    assert "scan 256: " in capfd.readouterr().out
    gpu.run(asked(out), tmp_path)
    assert json.loads(out.read_text()) == first and "scan 256" not in capfd.readouterr().out


def test_a_figure_that_never_comes_back_is_given_up(tmp_path):
    results = gpu.Results(tmp_path / "gpu.json")
    assert [results.begin("networks", "x") for _ in range(3)] == [True, True, False]
    assert "did not come back" in results.read()["sections"]["networks"]["x"]["failed"]
    assert not results.missing("networks", "x") and results.missing("networks", "y")


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    results = gpu.Results(tmp_path / "gpu.json")
    results.of_machine({"gpu": "H200"})
    results.of_machine({"gpu": "H200"})
    with pytest.raises(SystemExit, match="figures of .*H200.*--again"):
        results.of_machine({"gpu": "A100"})
    gpu.Results(tmp_path / "gpu.json", again=True).of_machine({"gpu": "A100"})


@pytest.mark.parametrize(
    ("built", "fault", "said"),
    [(None, None, "built for CPUs"), ("13.0", "driver 470 is too old", "470 is too old"),
     ("13.0", None, "PyTorch sees no GPU here")],
)  # fmt: skip
def test_without_a_gpu_it_is_one_message(built, fault, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(driver, "fault", lambda: fault)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    words = capsys.readouterr().err
    assert ended.value.code == 2 and said in words and "--device cpu --quick" in words
    assert words.count("\n") == 1 and not (tmp_path / "gpu.json").exists()


def test_targets_stand_beside_their_figures(tmp_path):
    results = gpu.Results(tmp_path / "gpu.json")
    results.keep("yardstick", "ratio", {"times_nnunet": 1.2})
    results.keep("workers", "14", {"idle": 0.5})
    judged = {one["figure"]: one for one in results.read()["targets"]}
    assert judged["voxels/s against nnU-Net's"]["met"] is True
    assert judged["device idle while training, 14 workers"]["met"] is False
    assert judged["scan against mamba_ssm, 4096"] == {
        "figure": "scan against mamba_ssm, 4096",
        "value": None,
        "target": ">= 1",
        "met": None,
    }


def test_a_process_that_hangs_is_ended_with_what_it_started():
    process = subprocess.Popen(
        ["sh", "-c", "sleep 1000 & echo $!; wait"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child = int(process.stdout.readline())
    gpu.stop(process)
    process.stdout.close()
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("its child lives on")
