"""Jobs on a real SLURM as a user meets them: failures, arrays, cancelling, submitting from a job,
mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from segfleet.pipeline.run import lock_stage
from segfleet.slurm.prepare import prepare
from segfleet.slurm.sandbox.sandbox import Sandbox

SHORT = ("stages.0.epochs=1", "stages.0.steps=3", "stages.1.steps=2", "--no-check")
BROKEN = """
import os
if os.environ.get("SLURM_PROCID") == "1":
    from segfleet.pipeline.data import sampler
    def draw(*_): raise RuntimeError("broken on purpose")
    sampler.PatchSampler.draw = draw
"""


def test_a_failing_rank_ends_the_job_with_its_own_traceback(cluster, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    job = cluster.submit("--nodes", "2", "--no-check", runs="broken", PYTHONPATH=str(tmp_path))
    life = Path(job["log"]).parent / f"life-{job['job']}.0"
    cluster.wait(lambda: (life / "failed-1.json").exists(), what="the failure")
    failed = time.monotonic()
    cluster.wait_for_state(job, "FAILED")
    assert time.monotonic() - failed < 15
    row = cluster.row(job, "broken")
    assert (
        row["state"] == "failed"
        and "rank 1 failed" in row["reason"]
        and "broken on purpose" in row["reason"]
    )
    assert f"{job['code']}/segfleet/pipeline" in row["reason"], (
        "the frozen code runs, not the checkout"
    )
    cluster.wait(lambda: not cluster.helpers(job), 15, "the end of all ranks")
    ranks = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(Path(job["log"]).parent) in " ".join(p.info["cmdline"] or [])
    ]
    assert not ranks
    out = cluster.segfleet("logs", job["run"], "--rank", "1").stdout
    assert "broken on purpose" in out
    assert (
        "is failed: rank 1 failed: RuntimeError: broken on purpose"
        in cluster.segfleet("status", "broken").stdout
    )


def test_an_array_shares_a_node(cluster):
    """Two members with two ranks each on one node at once: no port collides; each has its own
    run."""
    node = ("--ranks-per-node", "2", "--nodelist", "127.0.0.13", "--array", "seed=1..2")
    document = json.loads(
        cluster.segfleet("submit", "tiny.yaml", *SHORT, *node, "--runs", "array", "--json").stdout
    )
    first, second = (row["job"] for row in document)
    assert (
        first.endswith("_0") and second.endswith("_1") and document[0]["run"] != document[1]["run"]
    )
    for row in document:
        cluster.wait_for_state(row, "COMPLETED")
        assert cluster.row(row, "array")["state"] == "done"
        assert json.loads((Path(row["run"]) / "evaluation.json").read_text())["summary"]
    lives = [Path(row["log"]).parent / f"life-{row['job']}.0" for row in document]
    begun, ended = (
        [json.loads((life / name).read_text())["time"] for life in lives]
        for name in ("life.json", "ended.json")
    )
    assert max(begun) < min(ended), "both ran at the same time"
    again = json.loads(
        cluster.segfleet("submit", "tiny.yaml", *SHORT, *node, "--runs", "array", "--json").stdout
    )
    assert [row["state"] for row in again] == ["done", "done"] and again[0]["job"] is None


def test_an_array_trains_the_stage_its_members_share_once(cluster):
    """Both find it taken, by this process, and wait; then one trains and the other finds it
    done."""
    shorter = "stages.0.epochs=1"
    words = (shorter, "--array", "stages.1.lr=1e-3,1e-4", "--no-check", "--runs", "sharing")
    recipe, root = str(cluster.folder / "tiny.yaml"), cluster.folder / "sharing"
    [(_, leaf)] = prepare(recipe, [shorter, "stages.1.lr=1e-3"], root)
    shared = leaf.parent
    shared.mkdir(parents=True)
    with lock_stage(shared):
        document = json.loads(cluster.segfleet("submit", "tiny.yaml", *words, "--json").stdout)
        assert {Path(row["run"]).parent for row in document} == {shared}
        for log in (Path(row["log"]) for row in document):
            cluster.wait(
                lambda log=log: (
                    log.exists() and f"{shared} is in use by process" in log.read_text()
                ),
                what="a member that waits",
            )
        assert not (shared / "events.jsonl").exists()
    for row in document:
        cluster.wait_for_state(row, "COMPLETED")
        assert cluster.row(row, "sharing")["state"] == "done"
    assert len(cluster.events(shared, "stage_start")) == 1 and not cluster.events(shared, "resumed")
    steps = [event["step"] for event in cluster.events(shared, "step")]
    assert steps == sorted(set(steps))


def test_cancel_saves_and_resume_goes_on(cluster):
    job = cluster.submit("--no-check", runs="cancelled")
    cluster.wait_for_step(job, 5)
    twice = cluster.segfleet(
        "submit", "tiny.yaml", "--no-check", "--runs", "cancelled", code=2
    ).stderr
    assert f"already as job {job['job']}" in twice
    assert json.loads(cluster.segfleet("cancel", job["run"], "--json").stdout)["cancelled"]
    cluster.wait_for_state(job, "CANCELLED")
    cluster.wait(lambda: cluster.stopped(job), 20, "the save")
    cluster.wait(lambda: not cluster.helpers(job), 20, "the end")
    row = cluster.row(job, "cancelled")
    assert row["state"] in ("cancelled", "stopped") and row["restarts"] == 0
    waiting = cluster.submit(
        "seed=9",
        *SHORT,
        "--after",
        cluster.submit("seed=8", *SHORT, runs="after")["run"],
        runs="after",
    )
    assert cluster.queue(waiting["job"]) == ("PENDING", "Dependency")
    resumed = json.loads(cluster.segfleet("resume", job["run"], "--time", "20", "--json").stdout)
    assert resumed["job"] != job["job"]
    cluster.wait_for_state(resumed, "COMPLETED")
    assert cluster.resumed(job) == cluster.stopped(job)
    cluster.wait_for_state(waiting, "COMPLETED")


def test_resume_leaves_out_what_is_bad_today(cluster):
    def excluded(job: dict) -> list[str]:
        facts = cluster.call("scontrol", "show", "job", "-o", job["job"])
        return cluster.call(
            "scontrol", "show", "hostnames", re.search(r"ExcNodeList=(\S+)", facts)[1]
        ).split()

    bad = cluster.folder / "bad" / ".bad-nodes" / "127.0.0.14"
    bad.parent.mkdir(parents=True)
    bad.write_text("no GPU")
    job = cluster.submit(*SHORT, "--exclude", "127.0.0.13", "--sbatch=--hold", runs="bad")
    assert excluded(job) == ["127.0.0.13", "127.0.0.14"]
    cluster.segfleet("cancel", job["run"])
    bad.unlink()
    again = json.loads(cluster.segfleet("resume", job["run"], "--json").stdout)
    assert excluded(again) == ["127.0.0.13"]


def test_a_job_may_submit_jobs(cluster, work):
    """From inside a job with other resources; the new one takes over none of them, and outlives the
    shell that submitted it."""
    inner = f"submit tiny.yaml {' '.join(SHORT)} seed=5 --ranks-per-node 2 --runs inner --json"
    (work / "outer.sh").write_text(
        f"#!/bin/bash\ncd {work} && python -m segfleet.cli.main {inner} > inner.json\n"
    )
    python = Path(cluster.python).parent
    outer = cluster.call(
        "sbatch", "--parsable", "-n1", "-c3", "--mem=500", "-t", "3", "-o", str(work / "outer.log"),
        f"--export=ALL,PATH={python}:/usr/bin:/bin,RANK=7,WORLD_SIZE=9,LOCAL_RANK=7",
        str(work / "outer.sh"),
    ).strip()  # fmt: skip
    cluster.wait(lambda: cluster.queue(outer)[0] in ("COMPLETED", "FAILED"), what="the outer job")
    assert cluster.queue(outer)[0] == "COMPLETED", (work / "outer.log").read_text()
    job = json.loads((work / "inner.json").read_text())
    cluster.wait_for_state(job, "COMPLETED")
    facts = cluster.call("scontrol", "show", "job", "-o", job["job"])
    assert "NumTasks=2" in facts and "CPUs/Task=1" in facts and "MinMemoryNode=500" not in facts


def test_a_job_outlives_the_shell_that_submitted_it(cluster, work):
    """A login session that is killed with all its processes as soon as the job is accepted; another
    shell attaches."""
    answer = work / "answer.json"
    submit = shlex.join(
        [
            cluster.python,
            "-m",
            "segfleet.cli.main",
            "submit",
            "tiny.yaml",
            *SHORT,
            "seed=11",
            "evaluation.every=1",
            "--runs",
            "shell",
            "--json",
        ]
    )
    script = f"{submit} > answer.partial && mv answer.partial answer.json; sleep 300"
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=work, env=cluster.environment, start_new_session=True
    )
    try:
        cluster.wait(answer.exists, what="the submission")
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    job = json.loads(answer.read_text())
    cluster.wait_for_state(job, "COMPLETED")
    row = cluster.row(job, "shell")
    assert row["state"] == "done" and row["job"] == job["job"]
    told = cluster.segfleet("logs", job["run"]).stdout
    for stage, steps in ((1, 3), (2, 2)):
        where = rf"stage {stage}, epoch 1, step {steps}/{steps}: "
        assert re.search(where + r"loss \d\.\d+, lr \S+, [\d.]+ samples/s\n", told), told
        assert re.search(rf"stage {stage}, step {steps}: validation, Dice ", told), told


def test_a_store_that_the_node_does_not_see(cluster, work, tiny_store):
    """Gone between submission and start, as on a disk that a node has not mounted: the job fails at
    once and says which store."""
    store = work / "elsewhere"
    shutil.copytree(tiny_store(dims=2), store)
    job = cluster.submit(*SHORT, f"data.store={store}", "--sbatch=--hold", runs="unseen")
    shutil.rmtree(store)
    cluster.call("scontrol", "release", job["job"])
    cluster.wait_for_state(job, "FAILED")
    row = cluster.row(job, "unseen")
    assert (
        row["state"] == "failed"
        and f"store: {store} holds no manifest.json" in row["reason"]
        and "Traceback" not in row["reason"]
    )


def test_ids_that_start_again_at_one(cluster, work, tmp_path):
    """A run failed as job 1 of a cluster that was set up anew; as job 1 of the new one it is done,
    and nothing of the first is shown."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN.replace('== "1"', '== "0"'))
    jobs, rows = [], []
    for broken in (True, False):
        folder = Path(tempfile.mkdtemp(prefix="segfleet-slurm-"))
        sandbox = Sandbox(folder, first_job=1)
        sandbox.start()
        try:
            there = type(cluster)(sandbox, work, sandbox.environment)
            jobs.append(
                there.submit(
                    *SHORT,
                    "seed=12",
                    runs="again",
                    **({"PYTHONPATH": str(tmp_path)} if broken else {}),
                )
            )
            there.wait_for_state(jobs[-1], "FAILED" if broken else "COMPLETED")
            rows.append(there.row(jobs[-1], "again"))
        finally:
            sandbox.stop()
            shutil.rmtree(folder)
    assert (
        [job["job"] for job in jobs] == ["1", "1"]
        and jobs[0]["run"] == jobs[1]["run"]
        and jobs[0]["log"] != jobs[1]["log"]
    )
    assert rows[0]["state"] == "failed" and "broken on purpose" in rows[0]["reason"]
    assert rows[1]["state"] == "done" and rows[1]["reason"] is None and rows[1]["restarts"] == 0


MISTAKES = [
    (["--partition", "gpus"], "partition: found 'gpus'; expected one of: main, low, low0"),
    (["--gpus-per-node", "9"], "gpus_per_node: found 9, a node of partition main has 4"),
    (["--nodes", "9"], "nodes: found 9, partition main has 4"),
    (["--time", "2 days"], "time: found '2 days'"),
    (["--constraint", "a100"], "constraint: found 'a100', features in partition main: fake"),
    (["--after", "nothing"], "found no run 'nothing'"),
    (["data.store=nowhere"], "nowhere holds no manifest.json"),
    (["--sbatch=--licenses"], "SLURM refused the job"),
    (["--cluster", "alpha"], "--cluster: found 'alpha', but there is no file"),
    (["--array", "seed"], "--array: found 'seed', expected key.path=1,2,3"),
    (
        ["--array", "seed=4..0"],
        "--array: found 'seed=4..0', which holds no value; expected the smaller number first: "
        "seed=0..4",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=[words[:20] for _, words in MISTAKES]
)
def test_a_mistake_is_refused_before_submission(cluster, arguments, words):
    before = cluster.jobs()
    done = cluster.segfleet(
        "submit", "tiny.yaml", *arguments, "--no-check", "--runs", "mistakes", code=2
    )
    assert words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert cluster.jobs() <= before
    assert not list((cluster.folder / "mistakes").rglob("submission.json"))


def test_a_recipe_that_is_not_there(cluster):
    done = cluster.segfleet("submit", "nowhere.yaml", "--runs", "mistakes", code=2)
    assert "nowhere.yaml" in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_network_that_cannot_be_built_never_waits_in_a_queue(cluster):
    done = cluster.segfleet(
        "submit", "tiny.yaml", "model.options.wide=3", "--runs", "mistakes", code=2
    )
    assert "'wide' is no option of plain_unet_2d" in done.stderr and "Traceback" not in done.stderr
    for more in (
        ["--array", "model.name=plain_unet_2d,nosuchnet"],
        ["model.name=nosuchnet", "--dry-run"],
    ):
        done = cluster.segfleet("submit", "tiny.yaml", *more, "--runs", "mistakes", code=2)
        assert "nosuchnet" in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert not list((cluster.folder / "mistakes").rglob("submission.json"))


def test_a_dry_run_asks_the_controller(cluster):
    options = ("--nodes", "2", "--gpus-per-node", "2", "--dry-run", "--runs", "rehearsed", "--json")
    document = json.loads(cluster.segfleet("submit", "tiny.yaml", *options).stdout)
    assert (
        "#SBATCH --gpus-per-node=2" in document["script"]
        # for the loader: a GPU's share of a node's eight cores
        and "#SBATCH --cpus-per-task=2" in document["script"]
        and "8 processors on nodes" in document["controller"][0]
    )
    assert not (cluster.folder / "rehearsed").exists()
