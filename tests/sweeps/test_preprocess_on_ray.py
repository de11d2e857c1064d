"""A store made by the tasks of a running Ray cluster: the bytes of one machine, and nothing
twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segfleet.preprocess.building import shard_job
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import PHANTOMS

HEAD = """
import os, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20,
         _temp_dir=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture
def cluster(tmp_path_factory):
    """The address of a Ray cluster of two cores, somebody else's as far as segfleet knows."""
    import tempfile

    from segfleet.sweeps.ray.controller import SETTINGS, short_folder

    with tempfile.TemporaryDirectory(prefix="sfr-", dir=short_folder()) as folder:
        head = subprocess.Popen(
            [sys.executable, "-P", "-c", HEAD, folder],
            env={**os.environ, **SETTINGS, "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield head.stdout.readline().strip()
        finally:
            head.communicate(timeout=120)


def sums(store: Path) -> dict[str, str]:
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in store.rglob("*")
        if path.is_file()
    }


def segfleet(*words, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "XDG_CACHE_HOME": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_cluster_makes_the_bytes_of_one_machine_and_goes_on(cluster, tmp_path):
    raw = PHANTOMS["kvasir_seg"](tmp_path / "raw", cases=10)
    build(BuildRequest("kvasir_seg", raw, tmp_path / "here", workers=1))
    words = ("preprocess", "kvasir_seg", "--raw", raw, "--out", tmp_path / "there")
    words = (*words, "--on", "ray", "--address", cluster, "--json")
    # a first run that was killed when a member had looked at its cases
    store = {"reader_name": "kvasir_seg", "raw": str(raw), "out": str(tmp_path / "there")}
    job = {"do": "survey", "store": {**store, "workers": 1, "options": {}}, "share": [0, 2]}
    task = [sys.executable, "-P", "-m", "segfleet.sweeps.ray.preprocess"]
    environment = {**os.environ, "SEGFLEET_PARENT": str(os.getpid())}
    done = subprocess.run(
        task, input=json.dumps(job), env=environment, capture_output=True, text=True
    )
    assert done.stdout == "5 case(s) looked at\n", done.stderr
    (journal,) = (tmp_path / "there.partial" / shard_job.STATE).glob("survey-*")
    known = journal.read_bytes()
    made = segfleet(*words, cwd=tmp_path)
    assert made.returncode == 0 and "failed on the cluster" not in made.stderr, made.stderr
    found = json.loads(made.stdout)
    # the members had written all before the command itself began to
    assert found["status"] == "continued" and found["cases"] == 10
    assert sums(tmp_path / "there") == sums(tmp_path / "here") and known
    again = segfleet(*words, cwd=tmp_path)
    assert json.loads(again.stdout)["status"] == "up to date"


def test_what_a_share_says_when_it_fails_is_one_line(tmp_path):
    store = {"reader_name": "kvasir_seg", "raw": str(tmp_path), "out": str(tmp_path / "out")}
    job = {"do": "survey", "store": {**store, "workers": 1, "options": {}}, "share": [0, 1]}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "segfleet.sweeps.ray.preprocess"],
        input=json.dumps(job),
        env={**os.environ, "SEGFLEET_PARENT": str(os.getpid())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--on", "dask"), "--on: found 'dask'; expected --on ray"),
        (("--address", "127.0.0.1:1"), "--on: --address and --members say where"),
        (("--on", "ray", "--address", "127.0.0.1:1"), "preprocess: --address: nothing answers at"),
        (("--on", "ray", "--address", "nowhere"), "preprocess: --address: found 'nowhere'"),
    ],
)
def test_a_wrong_place_is_one_sentence(words, expected, tmp_path):
    raw = PHANTOMS["kvasir_seg"](tmp_path / "raw", cases=2)
    done = segfleet(
        "preprocess", "kvasir_seg", "--raw", raw, "--out", tmp_path / "o", *words, cwd=tmp_path
    )
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()
