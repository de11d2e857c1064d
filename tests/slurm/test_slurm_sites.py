"""Clusters as sites run them, on one real SLURM with accounting: limits that are enforced, a partition that is hidden, GPUs of
types, short arrays, and two people of one group."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from segfleet.slurm.sandbox.sandbox import Sandbox, missing

pytestmark = pytest.mark.long
ANN, BEN, GROUP = (
    "games",
    "backup",
    60,
)  # accounts that every Debian has; their homes are not theirs
SHORT = ("stages.0.epochs=1", "stages.0.steps=3", "stages.1.steps=2", "--no-check")
FURTHER = """\
AccountingStorageEnforce=associations,limits,qos
MaxArraySize=4
PartitionName=secret Nodes=ALL Hidden=YES MaxTime=INFINITE PriorityTier=10 State=UP"""


@pytest.fixture(scope="module")
def sandbox():
    if why := missing(accounting=True):
        pytest.skip(f"no SLURM with accounting: {why}")
    folder = Path(tempfile.mkdtemp(prefix="segfleet-slurm-"))
    made = Sandbox(folder, accounting=True, gpus={"a100": 2, "1g.10gb": 2}, further=FURTHER)
    try:
        made.start()
        call = made.call
        call("sacctmgr", "-i", "add", "account", "hearts")
        call("sacctmgr", "-i", "add", "qos", "two", "MaxSubmitJobsPerUser=2")
        for user in ("root", ANN, BEN):
            call("sacctmgr", "-i", "add", "user", user, "account=hearts")
            call("sacctmgr", "-i", "modify", "user", user, "set", "qos+=two")
        yield made
    finally:
        made.stop()
        assert not made.pids()
        shutil.rmtree(folder)


@pytest.fixture
def team(work):
    """A folder of a group, with umask 002 and setgid, and `as_user(name, words)`."""
    folder = Path(tempfile.mkdtemp(prefix="segfleet-team-", dir="/var/tmp"))
    recipe = (work / "tiny.yaml").read_text()
    store = next(line.split(": ")[-1] for line in recipe.splitlines() if "store:" in line)
    shutil.copytree(store.strip("'\""), folder / "store")
    (folder / "tiny.yaml").write_text(recipe.replace(store, str(folder / "store")))
    everybodys_python(folder / "venv")
    for path in (folder, folder / "tiny.yaml", folder / "store", *(folder / "store").rglob("*")):
        os.chown(path, pwd.getpwnam(ANN).pw_uid, GROUP)
        path.chmod(0o2775 if path.is_dir() else 0o664)
    yield folder
    shutil.rmtree(folder)


def everybodys_python(venv: Path) -> None:
    """An environment like this one whose Python others may run: root's own is often closed to them."""
    nobody = [
        "setpriv",
        f"--reuid={ANN}",
        f"--regid={GROUP}",
        "--clear-groups",
        "bash",
        "-c",
        "$0 -c 1",
    ]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (os.path.realpath(sys.executable), f"/usr/bin/python{version}"):
        tried = subprocess.run([*nobody, python], capture_output=True)
        if tried.returncode == 0:
            break
    else:
        pytest.skip(f"no Python {version} that other users may run")
    subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
    here = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in here]
    (venv / "lib" / f"python{version}" / "site-packages" / "here.pth").write_text("\n".join(lines))


def as_user(cluster, name: str, folder: Path, *words, code: int = 0) -> subprocess.CompletedProcess:
    command = [
        "setpriv", f"--reuid={name}", f"--regid={GROUP}", "--clear-groups",
        "bash", "-c", 'umask 002; exec "$@"', "bash",
        str(folder / "venv" / "bin" / "python"), "-P", "-m", "segfleet.cli.main", *map(str, words),
    ]  # fmt: skip
    environment = {**cluster.environment, "HOME": pwd.getpwnam(name).pw_dir, "USER": name}
    environment.pop("XDG_CACHE_HOME", None)  # a home that cannot be written is no obstacle
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_two_people_of_one_group(cluster, team):
    """One trains, in a hidden partition; the other sees it, may not cancel it, goes on with it and predicts."""
    long = ("stages.0.epochs=400", "stages.0.steps=50", "--no-check", "--partition", "secret")
    asked = as_user(cluster, ANN, team, "submit", "tiny.yaml", *long, "--json")
    made = json.loads(asked.stdout)
    cluster.wait_for_step(made, 20)
    [row] = json.loads(as_user(cluster, BEN, team, "status", "--json").stdout)
    assert row["state"] == "training" and row["job"] == made["job"], "a hidden partition, too"
    refused = as_user(cluster, BEN, team, "cancel", "tiny", code=2)
    assert f"job {made['job']} belongs to {ANN}; only they can cancel it" in refused.stderr
    assert "is training already" in as_user(
        cluster, BEN, team, "resume", "tiny", code=2
    ).stderr.replace("is running already", "is training already")
    assert cluster.queue(made["job"])[0] == "RUNNING"
    as_user(cluster, ANN, team, "cancel", "tiny")
    cluster.wait_for_state(made, "CANCELLED", "COMPLETED", "FAILED")
    before = [
        row["step"] for row in json.loads(as_user(cluster, BEN, team, "status", "--json").stdout)
    ]
    again = json.loads(as_user(cluster, BEN, team, "resume", "tiny", "--json").stdout)
    cluster.wait_for_step(again, before[0] + 20)
    assert cluster.resumed(again) and cluster.resumed(again)[-1] > 0
    owner = cluster.call("squeue", "-a", "-h", "-j", again["job"], "-o", "%u").strip()
    assert owner == BEN
    as_user(cluster, BEN, team, "cancel", "tiny")
    cluster.wait_for_state(again, "CANCELLED", "COMPLETED", "FAILED")
    closed = [path for path in (team / "runs").rglob("*") if not path.stat().st_mode & 0o040]
    assert not [path for path in closed if path.name != "address"], closed

    short = as_user(
        cluster, ANN, team, "train", "tiny.yaml", *SHORT[:3], "--runs", "short", "--json"
    )
    run = json.loads(short.stdout)["stages"][-1]
    from PIL import Image

    Image.new("L", (32, 32), 90).save(team / "picture.png")
    as_user(cluster, BEN, team, "predict", run, "picture.png", "--out", "predictions")
    assert [path for path in (team / "predictions").iterdir() if path.suffix == ".png"]
    as_user(cluster, BEN, team, "evaluate", run, "evaluation.overlap=0.25")


def test_a_limit_of_a_quality_is_waited_for_by_a_sweep_and_told_by_submit(cluster, tmp_path):
    held = (*SHORT, "--qos", "two", "--sbatch=--hold", "--runs", tmp_path)
    for seed in (1, 2):
        cluster.segfleet("submit", "tiny.yaml", f"seed={seed}", *held)
    told = cluster.segfleet("submit", "tiny.yaml", "seed=3", *held, code=2).stderr
    assert "SLURM refused the job" in told and "QOSMaxSubmitJobPerUserLimit" in told
    from segfleet.slurm.submitit_launcher import FULL

    assert any(sign in told for sign in FULL), "a sweep asks again"


def test_gpus_of_a_type_and_mig_slices(cluster, tmp_path):
    setup = ("--setup", "export SEGFLEET_DEVICE=cpu", "--sbatch=--hold", "--runs", tmp_path, *SHORT)
    seeds = iter(range(20, 30))
    for asked, tres in [
        (("--gpus-per-node", "a100:2"), "gres:gpu:a100:2"),
        (("--gpus-per-node", "1g.10gb:1"), "gres:gpu:1g.10gb:1"),
        (("--gpus", "a100:4"), "gres:gpu:a100:2"),
    ]:
        cluster.segfleet("submit", "tiny.yaml", *asked, *setup, f"seed={next(seeds)}")
        job = max(cluster.call("squeue", "-h", "-o", "%i").split(), key=int)
        shown = cluster.call("scontrol", "show", "job", "-o", job)
        assert f"TresPerNode={tres}" in shown, shown
        assert ("NumNodes=2" in shown) == (asked[0] == "--gpus")
    told = cluster.segfleet(
        "submit", "tiny.yaml", "--gpus-per-node", "a100:3", *setup, code=2
    ).stderr
    assert "found a100:3" in told and "a100:2, 1g.10gb:2" in told


def test_an_array_longer_than_an_array_may_be(cluster, tmp_path):
    """MaxArraySize=4: seven members are three arrays, each member a job that ends well."""
    made = json.loads(
        cluster.segfleet(
            "submit", "tiny.yaml", *SHORT, "--array", "seed=1..5", "--runs", tmp_path, "--json"
        ).stdout
    )
    jobs = {row["job"] for row in made}
    assert len(jobs) == 5 and len({job.partition("_")[0] for job in jobs}) == 2
    for row in made:
        cluster.wait_for_state(row, "COMPLETED")
    rows = json.loads(cluster.segfleet("status", tmp_path, "--json").stdout)
    assert {row["state"] for row in rows} == {"done"}


def test_a_sweep_on_a_ray_cluster_over_two_nodes(cluster, tmp_path):
    """It comes up inside one job, trains every point, and goes with it."""
    (tmp_path / "space.yaml").write_text(
        f"name: rays\nbase: {cluster.folder / 'tiny.yaml'}\n"
        "axes: {optimizer.weight_decay: [1.0e-4, 2.0e-4, 3.0e-4]}\n"
        "stages:\n  - {name: base, epochs: 1, steps: 5, lr: 1.0e-3}\n"
    )
    on = ("--on", "ray-in-slurm", "--nodes", 2, "--resource", "cpus=1", "--resource", "memory=3G")
    words = ("sweep", tmp_path / "space.yaml", *on, "--runs", tmp_path / "runs", "--json")
    made = json.loads(cluster.segfleet(*words).stdout)
    home = tmp_path / "runs" / "sweeps" / "rays"
    cluster.wait_for_state({**made, "log": str(home)}, "COMPLETED")
    outcome = json.loads((home / "outcome.json").read_text())
    assert len(outcome["ranking"]) == 3 and not outcome["failed"]
    told = "".join(path.read_text() for path in home.with_name("rays.jobs").rglob("*_log.out"))
    assert "127.0.0.12" in told, "the second node joined"
