"""Clusters as sites run them, on one real SLURM with accounting: limits that are enforced, a
partition that is hidden, GPUs of types, short arrays, two people of one group, a second cluster and
a federation, nodes that lack what a link leads to, clocks an hour apart."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from segfleet.slurm.sandbox.sandbox import NODES, Sandbox, missing

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


@pytest.fixture(scope="module")
def beta(sandbox):
    """A second real cluster of the same accounting database, with a partition of its own."""
    folder = Path(tempfile.mkdtemp(prefix="segfleet-slurm-"))
    further = f"{FURTHER}\nPartitionName=wide Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP"
    made = Sandbox(folder, accounting=True, further=further, name="beta", beside=sandbox)
    try:
        made.start()
        made.call("sacctmgr", "-i", "add", "account", "hearts", "cluster=beta")
        for user in ("root", ANN, BEN):
            made.call("sacctmgr", "-i", "add", "user", user, "account=hearts", "cluster=beta")
        yield made
    finally:
        made.stop()
        assert not made.pids()
        shutil.rmtree(folder)


@pytest.fixture
def federation(cluster, beta):
    """Both clusters as one federation."""
    both = ("both", "clusters=sandbox,beta")
    cluster.call("sacctmgr", "-i", "add", "federation", *both)
    cluster.wait(lambda: "beta" in cluster.call("scontrol", "show", "federation"), 30, "both")
    yield
    cluster.call("sacctmgr", "-i", "delete", "federation", "both")


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
    """An environment like this one whose Python others may run: root's own is often closed to
    them."""
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
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_two_people_of_one_group(cluster, team):
    """One trains, in a hidden partition; the other sees it, may not cancel it, goes on with it and
    predicts."""
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


def test_a_setup_line_that_fails_fails_the_run(cluster, tmp_path):
    line = "source /no/such/venv/bin/activate"
    made = cluster.submit(*SHORT, "--setup", line, runs=tmp_path)
    cluster.wait_for_state(made, "FAILED")
    row = cluster.row(made, tmp_path)
    assert row["state"] == "failed" and f"the setup line failed: {line}" in row["reason"]
    assert not list(tmp_path.rglob("done.json"))


LONG = ("stages.0.epochs=400", "stages.0.steps=50", "--no-check")


def test_a_second_cluster_behind_the_login_node(cluster, beta, tmp_path):
    """Asked for by name once: everything later finds the job there, whatever SLURM_CONF says."""
    wide = ("--clusters", "beta", "--partition", "wide")
    refused = cluster.segfleet("submit", "tiny.yaml", *LONG, *wide[2:], "--runs", tmp_path, code=2)
    assert "partition: found 'wide'; expected one of: main" in refused.stderr
    made = cluster.submit(*LONG, *wide, runs=tmp_path)
    cluster.of = "beta"
    cluster.wait_for_step(made, 10)
    assert cluster.queue(made["job"])[0] == "RUNNING" and not cluster.call("squeue", "-h").strip()
    row = cluster.row(made, tmp_path)
    assert (row["state"], row["queue"], row["job"]) == ("training", "RUNNING", made["job"])
    run = Path(made["run"])
    twice = cluster.segfleet("submit", "tiny.yaml", *LONG, "--runs", tmp_path, code=2).stderr
    assert f"is running already as job {made['job']}" in twice
    cluster.segfleet("cancel", run)
    cluster.wait_for_state(made, "CANCELLED")
    cluster.wait(lambda: cluster.stopped(made), 20, "the save")
    again = json.loads(cluster.segfleet("resume", run, "--json").stdout)
    cluster.wait(lambda: cluster.resumed(again), what="the second start")
    assert cluster.resumed(again) == cluster.stopped(made)
    cluster.segfleet("cancel", run)
    cluster.wait_for_state(again, "CANCELLED")
    cluster.wait(lambda: not cluster.helpers(again), 20, "the end")


def test_a_job_that_starts_in_another_cluster_of_the_federation(
    cluster, beta, federation, tmp_path
):
    """Submitted here, started there, because here all nodes are drained: neither lost nor
    cancelled."""
    names = f"nodename={','.join(NODES)}"
    cluster.call("scontrol", "update", names, "state=DRAIN", "reason=test")
    try:
        # as on nodes of that cluster, where SLURM_CONF is its own
        conf = ("--setup", f"export SLURM_CONF={beta.configuration}")
        made = cluster.submit(*LONG, *conf, runs=tmp_path)
        cluster.wait_for_step(made, 10)
        assert cluster.queue(made["job"])[0] == "REVOKED"
        row = cluster.row(made, tmp_path)
        assert (row["state"], row["queue"], row["node"]) == ("training", "RUNNING", NODES[0])
        twice = cluster.segfleet("resume", made["run"], code=2).stderr
        assert f"is running already as job {made['job']}" in twice
        cluster.segfleet("cancel", made["run"])
        cluster.wait(lambda: cluster.stopped(made), 30, "the save")
        cluster.wait(lambda: not cluster.helpers(made), 30, "the end")
        assert cluster.row(made, tmp_path)["state"] in ("cancelled", "stopped")
    finally:
        cluster.call("scontrol", "update", names, "state=RESUME")


def test_nodes_that_lack_what_a_link_leads_to(cluster, work):
    """/home/me is a link to /net/me, which nodes mount under /home alone, as automounters do."""
    folder, node = Path(tempfile.mkdtemp(prefix="segfleet-home-", dir="/var/tmp")), NODES[3]
    net, home = folder / "net" / "me", folder / "home" / "me"
    for path in (net, home.parent, folder / "kept"):
        path.mkdir(parents=True)
    home.symlink_to(net)
    text = (work / "tiny.yaml").read_text()
    store = next(line.split(": ")[-1] for line in text.splitlines() if "store:" in line)
    shutil.copytree(store.strip("'\""), net / "store")
    (net / "tiny.yaml").write_text(text.replace(store, "store"))
    os.kill(cluster.sandbox.pids()[f"slurmd {node}"], signal.SIGTERM)
    cluster.wait(lambda: f"slurmd {node}" not in cluster.sandbox.pids(), 20, "the node's end")
    mounts = (
        'mount --bind "$0/net/me" "$0/kept" && mount -t tmpfs tmpfs "$0/home" && mkdir "$0/home/me"'
        ' && mount --bind "$0/kept" "$0/home/me" && mount -t tmpfs tmpfs "$0/net" && exec "$@"'
    )
    apart = ("unshare", "--mount", "bash", "-c", mounts, str(folder), "slurmd", "-N", node)
    try:
        cluster.sandbox._daemon(*apart)
        here = type(cluster)(cluster.sandbox, home, {**cluster.environment, "PWD": str(home)})
        job = here.submit(*SHORT, "--nodelist", node)
        here.wait_for_state(job, "COMPLETED")
        assert here.row(job)["state"] == "done" and job["run"].startswith(str(home))
        for path in (path for path in net.rglob("*") if path.suffix in (".json", ".out", ".sh")):
            assert str(net) not in path.read_text(), path
    finally:
        pid = cluster.sandbox.pids().get(f"slurmd {node}")
        if pid:
            os.kill(pid, signal.SIGTERM)
            cluster.wait(lambda: f"slurmd {node}" not in cluster.sandbox.pids(), 20, "the end")
        shutil.rmtree(folder)


CLOCK = """\
import os, time
shift = float(os.environ.get("CLOCK") or (3600 if os.environ.get("SLURM_NODEID") == "1" else 0))
now = time.time
time.time = lambda: now() + shift
"""


def test_an_hour_between_the_clocks_of_two_nodes(cluster, straight, tmp_path):
    """And of whoever looks on: a save, a second start and the same weights."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    clocks = {"PYTHONPATH": str(tmp_path)}
    two = ("--nodes", "2", "--no-check", "--time", "6h")
    job = cluster.submit(*two, runs=tmp_path / "runs", **clocks)
    cluster.wait_for_step(job, 10)
    cluster.call("scancel", "--signal=USR2", job["job"])
    cluster.wait(lambda: cluster.queue(job["job"])[0] == "PENDING", 60, "requeue")
    for late in ("-3600", "3600"):
        told = cluster.segfleet("status", tmp_path / "runs", "--json", CLOCK=late, **clocks)
        [row] = json.loads(told.stdout)
        assert (row["state"], row["job"]) == ("queued", job["job"])
        twice = ("submit", "tiny.yaml", *two, "--runs", tmp_path / "runs")
        refused = cluster.segfleet(*twice, code=2, CLOCK=late, **clocks).stderr
        assert f"already as job {job['job']}" in refused
    cluster.release(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.resumed(job) == cluster.stopped(job)
    cluster.same_result(job, straight(2))
