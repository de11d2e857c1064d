"""Several processes make one store: each its share, nothing twice, the bytes of a store that one
process made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import segfleet.preprocess.building.shard_job as shard_job
import segfleet.preprocess.building.share as share
import segfleet.preprocess.checking.check as check
from segfleet.core.errors import DataError, InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.lock import locked
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import write_msd_phantom

SMALL = {"shard_bytes": 1, "workers": 1}  # a shard for every case


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_msd_phantom(tmp_path_factory.mktemp("raw") / "msd", cases=7, size=(8, 16, 16))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def counted(monkeypatch):
    """How often cases were looked at and shards made."""
    counts = {"looked": [], "made": []}
    look, make = check.check_case, shard_job.write_shard

    def looking(reader, dataset, samples, ref):
        counts["looked"].append(ref.id)
        return look(reader, dataset, samples, ref)

    def making(job):
        counts["made"].append(job.shard)
        return make(job)

    monkeypatch.setattr(check, "check_case", looking)
    monkeypatch.setattr("segfleet.preprocess.building.build.write_shard", making)
    return counts


def test_shares_make_the_store_of_one_process(raw, tmp_path, counted):
    straight = build(BuildRequest("msd", raw, tmp_path / "straight", **SMALL))
    counted["looked"].clear(), counted["made"].clear()
    for index in (2, 0, 1, 1):  # one member comes twice, as after a requeue
        share.survey_share(BuildRequest("msd", raw, tmp_path / "shared", workers=1), (index, 3))
    assert (
        sorted(counted["looked"]) == sorted(set(counted["looked"])) and len(counted["looked"]) == 7
    )
    assert [
        share.write_share(BuildRequest("msd", raw, tmp_path / "shared", **SMALL), (index, 3))
        for index in (1, 2, 1)
    ] == [2, 2, 2]
    assert len(counted["made"]) == 4 and not (tmp_path / "shared").exists()
    assert build(BuildRequest("msd", raw, tmp_path / "shared", **SMALL)).id == straight.id
    assert len(counted["looked"]) == 7 and len(counted["made"]) == 7, (
        "what the members did is not done again"
    )
    assert files(tmp_path / "shared") == files(tmp_path / "straight")
    assert (
        share.survey_share(BuildRequest("msd", raw, tmp_path / "shared"), (0, 3))
        == share.write_share(BuildRequest("msd", raw, tmp_path / "shared"), (0, 3))
        == 0
    )


def test_no_member_looks_at_what_another_left_undone(raw, tmp_path, counted):
    share.survey_share(BuildRequest("msd", raw, tmp_path / "store", workers=1), (0, 2))
    assert share.write_share(BuildRequest("msd", raw, tmp_path / "store", **SMALL), (0, 2)) == 0
    assert len(counted["looked"]) == 4 and not counted["made"]
    build(BuildRequest("msd", raw, tmp_path / "store", **SMALL))
    assert len(counted["looked"]) == 7


def test_all_problems_are_told_by_the_build(tmp_path, counted):
    raw = write_msd_phantom(tmp_path / "raw", cases=5, size=(8, 16, 16))
    for number in (0, 3):
        (raw / "imagesTr" / f"phantom_{number:03d}.nii.gz").write_bytes(b"no image")
    for index in (0, 1):
        share.survey_share(BuildRequest("msd", raw, tmp_path / "store", workers=1), (index, 2))
        share.write_share(BuildRequest("msd", raw, tmp_path / "store", **SMALL), (index, 2))
    with pytest.raises(DataError) as error:
        build(BuildRequest("msd", raw, tmp_path / "store", **SMALL))
    assert {problem.case for problem in error.value.problems} == {"phantom_000", "phantom_003"}
    assert len(counted["looked"]) == 5 and not (tmp_path / "store").exists()


def test_one_failing_shard_does_not_stop_the_others(raw, tmp_path, monkeypatch):
    make = shard_job.write_shard

    def broken(job):
        if job.shard.endswith("00000"):
            raise RuntimeError("broken on purpose")
        return make(job)

    monkeypatch.setattr("segfleet.preprocess.building.build.write_shard", broken)
    share.survey_share(BuildRequest("msd", raw, tmp_path / "store", workers=1), (0, 1))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        share.write_share(BuildRequest("msd", raw, tmp_path / "store", **SMALL), (0, 1))
    assert len(list((tmp_path / "store.partial" / ".state" / "done").glob("*.json"))) == 6


def test_members_share_the_claim_and_refuse_all_others(raw, tmp_path):
    out, partial = tmp_path / "store", tmp_path / "store.partial"
    with locked(partial, out, shared=True), locked(partial, out, shared=True):
        share.survey_share(BuildRequest("msd", raw, out, workers=1), (0, 2))
        with pytest.raises(InputError, match="another process is preprocessing into"):
            build(BuildRequest("msd", raw, out, **SMALL))
    with (
        locked(partial, out),
        pytest.raises(InputError, match="another process is preprocessing into"),
    ):
        share.survey_share(BuildRequest("msd", raw, out, workers=1), (0, 2))
    build(BuildRequest("msd", raw, out, **SMALL))


DISTURBED = """
import os, signal, subprocess, sys, threading, time
import psutil
from segfleet.core.parallel import run

def nap(_):
    time.sleep(0.5)
    return os.getpid()

def disturb():
    me = psutil.Process()
    pids = [me.pid, *(child.pid for child in me.children(recursive=True))]
    numbers = [int(number) for number in watched]
    code = f"import os; [os.kill(pid, number) for pid in {pids} for number in {numbers}]"
    subprocess.run([sys.executable, "-c", code], check=True)

if __name__ == "__main__":
    heard, watched = [], (signal.SIGTERM, signal.SIGUSR2)
    for number in watched:
        signal.signal(number, lambda number, _: heard.append(number))
    found = run(nap, range(6), weights=[1] * 6, names=list("abcdef"), workers=2, budget=10)
    pids = [next(found)[1]]
    thread = threading.Thread(target=disturb)
    thread.start()
    pids += [pid for _, pid in found]
    thread.join()
    print(len(pids), len(set(pids)), set(heard) == set(watched))
"""


def test_signals_to_all_processes_reach_only_the_parent(tmp_path):
    """As SLURM sends them: workers and their servers go on, the parent's handler decides. In a
    process that started no servers before."""
    (tmp_path / "disturbed.py").write_text(DISTURBED)
    done = subprocess.run(
        [sys.executable, tmp_path / "disturbed.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.split() == ["6", "2", "True"] and not done.stderr, (
        done.stderr
    )
