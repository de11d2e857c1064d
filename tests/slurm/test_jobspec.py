"""What a job asks for: parsing, profiles, and the text of the sbatch script for every option."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import typing
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from segfleet.core.errors import InputError
from segfleet.pipeline.launch.job import Command, Train
from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.building.request import BuildRequest, Preprocess, Survey, Write
from segfleet.slurm import (
    cluster,
    health,
    jobspec,
    rank,
    snapshot,
    submission,
    submitit_launcher,
)
from segfleet.slurm import job as slurm_job
from segfleet.slurm.job import SlurmJob
from segfleet.slurm.jobspec import JobSpec, make_spec, minutes
from segfleet.slurm.prepare import members
from segfleet.slurm.sandbox.sandbox import Sandbox
from segfleet.slurm.submitit_launcher import (
    SlurmLauncher,
    after,
    are_shares,
    cleaned_environment,
    without_bad_nodes,
)

RUN, ROOT = Path("/runs/aaa/bbb"), Path("/runs")
LINES = [
    ({"nodes": 3}, ["#SBATCH --nodes=3"]),
    ({"gpus_per_node": 4}, ["#SBATCH --gpus-per-node=4", "#SBATCH --ntasks-per-node=4"]),
    ({"ranks_per_node": 2}, ["#SBATCH --ntasks-per-node=2"]),
    ({"cpus": 6}, ["#SBATCH --cpus-per-task=6", "--cpus-per-task=6 bash"]),
    ({"memory": "64G"}, ["#SBATCH --mem=64G"]),
    ({"time": "1-02:00:00"}, ["#SBATCH --time=1560", "#SBATCH --signal=USR2@120"]),
    ({"time": 3}, ["#SBATCH --signal=USR2@60"]),
    ({"time": "12h", "warning": 300}, ["#SBATCH --signal=USR2@300"]),
    ({"partition": "gpu"}, ["#SBATCH --partition=gpu"]),
    ({"account": "hearts"}, ["#SBATCH --account=hearts"]),
    ({"qos": "high"}, ["#SBATCH --qos=high"]),
    ({"constraint": "a100&nvme"}, ["#SBATCH --constraint='a100&nvme'"]),
    ({"exclude": "n[1-3]"}, ["#SBATCH --exclude='n[1-3]'"]),
    ({"nodelist": "n7"}, ["#SBATCH --nodelist=n7"]),
    ({"reservation": "course"}, ["#SBATCH --reservation=course"]),
    ({"mail": "a@b.org"}, ["#SBATCH --mail-user=a@b.org", "#SBATCH --mail-type=END,FAIL"]),
    (
        {"mail": "a@b.org", "mail_on": "REQUEUE"},
        ["#SBATCH --mail-user=a@b.org", "#SBATCH --mail-type=REQUEUE"],
    ),
    (
        {"dependency": "afterok:12"},
        ["#SBATCH --dependency=afterok:12", "#SBATCH --kill-on-invalid-dep=yes"],
    ),
    (
        {"sbatch": ("--licenses=x:2", "--exclusive")},
        ["#SBATCH --licenses=x:2", "#SBATCH --exclusive\n"],
    ),
    (
        {"setup": ("module load CUDA/12", "ulimit -n 65536")},
        ["\nmodule load CUDA/12\n[ $? = 0 ] || {", "\nulimit -n 65536\n[ $? = 0 ] || {"],
    ),
    ({"clusters": "beta"}, ["#SBATCH --clusters=beta"]),
    ({"gpus_per_node": "a100:2"}, ["#SBATCH --gpus-per-node=a100:2", "--ntasks-per-node=2"]),
    ({"whole_nodes": True, "gpus_per_node": 4}, ["--ntasks-per-node=1", "--gpus-per-node=4"]),
    ({"gpus": "a100:4", "nodes": 2}, ["#SBATCH --gpus-per-node=a100:2", "#SBATCH --nodes=2"]),
    ({"gpus_per_node": "1g.10gb:1"}, ["#SBATCH --gpus-per-node=1g.10gb:1"]),
    ({"gpus_per_node": 2, "gpu_type": "h100"}, ["#SBATCH --gpus-per-node=h100:2"]),
    ({"srun": ("--mpi=none",)}, ["--wait=0 --mpi=none bash"]),
    (
        {"container": "apptainer exec --nv i.sif"},
        ["rank apptainer exec --nv i.sif python3 -P -u -m submitit.core._submit"],
    ),
    (
        {"python": "/opt/my env/python"},
        ["rank '/opt/my env/python' -P -u -m submitit.core._submit"],
    ),
    (
        {},
        [
            "#SBATCH --requeue",
            "--kill-on-bad-exit=1",
            "#SBATCH --open-mode=append",
            "\nexit $code",
            "PYTHONPATH=/runs/.code/",
            "#SBATCH --time=60",
        ],
    ),
]


@pytest.mark.parametrize(
    ("options", "expected"), LINES, ids=[",".join(options) or "always" for options, _ in LINES]
)
def test_every_option_is_in_the_script(options, expected):
    script = SlurmLauncher().script(RUN, ROOT, make_spec(options, places=()))
    for line in expected:
        assert line in script, script
    ours = script[: script.index("# setup")]
    for name in (
        "partition",
        "account",
        "qos",
        "mem",
        "mail-user",
        "reservation",
        "dependency",
        "wckey",
        "clusters",
    ):
        assert f"--{name}=" not in ours or any(f"--{name}=" in line for line in expected), (
            "nothing is set that nobody asked for"
        )


def test_every_option_has_its_line(tmp_path):
    # of an array's script, below; of the job that every rank reads
    elsewhere = {
        "throttle",
        "fruitless",
        "stage_to",
    }
    assert {name for options, _ in LINES for name in options} | elsewhere == set(
        JobSpec.model_fields
    )
    spec = make_spec({"fruitless": 7, "time": 3, "stage_to": "$TMPDIR"}, places=())
    asked = Train(recipe={}, root=tmp_path)
    job, kept = submission.read_job(submission.write_job(tmp_path, asked, spec))
    assert job == asked.model_copy(update={"stage_to": "$TMPDIR", "lines": True})
    assert kept.spec.model_dump() == {"gpus_per_node": 0, "lead": 60, "fruitless": 7}


@pytest.mark.parametrize("killed_returns", [False, True])
def test_a_killed_member_who_shares_a_store_comes_back(killed_returns, tmp_path):
    """What the end of the script does, for every exit code of the ranks."""
    store = BuildRequest("msd", tmp_path, tmp_path / "store")
    jobs = [Survey(store=store, share=(0, 2)), Write(store=store, share=(1, 2))]
    assert are_shares(jobs) and not are_shares([*jobs, Preprocess(store=store)])
    assert not are_shares([Train(recipe={}, root=tmp_path)])
    life = tmp_path / "life-7_1.0"
    life.mkdir()
    (life / "life.json").touch()
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\ncase $* in *requeue*) echo $* >> {tmp_path}/said;; "
        "*) echo JobState=$JOBSTATE EndTime=x;; esac\n"
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("scontrol", "sleep"):
        (tmp_path / name).chmod(0o755)
    lines = "\n".join(after(killed_returns))

    def comes_back(code, state="RUNNING"):
        (tmp_path / "said").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-c", f"job=7_1; (exit {code})\n{lines}"],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                submission.LIFE: str(life),
                "JOBSTATE": state,
            },
        )
        assert done.returncode == code
        return (tmp_path / "said").exists()

    assert [comes_back(code) for code in (0, 1, 2, 75)] == [False, False, False, True]
    assert [comes_back(code) for code in (137, 139)] == [killed_returns] * 2
    assert not comes_back(137, "CANCELLED"), "a person ended it"
    if killed_returns:
        comes_back(137)
        assert (tmp_path / "said").read_text() == "requeue 7_1\n", "alone"


def test_an_array_and_live_code_in_the_script():
    script = SlurmLauncher(live=True).script(
        RUN, ROOT, make_spec({"throttle": 3}, places=()), members=7
    )
    assert (
        "#SBATCH --array=0-6%3" in script
        and "%A_%a_%t_log.out" in script
        and "PYTHONPATH" not in script
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time": "tomorrow"}, "time: found 'tomorrow'"),
        ({"time": 0}, "more than nothing"),
        ({"nodes": 0}, "nodes: found 0"),
        ({"memory": "much"}, "for example 64G"),
        ({"mail_on": "EVER"}, "'EVER' is none of: NONE, BEGIN"),
        ({"sbatch": ("licenses=x",)}, "expected --option or --option=value"),
        ({"sbatch": ("--output=x",)}, "--output is set by segfleet itself"),
        (
            {"sbatch": ("--mem=4G",), "memory": "64G"},
            "'--mem=4G': give --memory instead (memory in clusters.yaml)",
        ),
        ({"sbatch": ("--ntasks-per-node=3",), "gpus_per_node": 4}, "give --ranks-per-node instead"),
        ({"sbatch": ("--ntasks=3",)}, "give --ranks-per-node instead"),
        ({"sbatch": ("--cpus-per-task=3",)}, "give --cpus instead"),
        ({"sbatch": ("--mail-type=ALL",)}, "give --mail-on instead (mail_on in clusters.yaml)"),
        ({"sbatch": ("--gpus-per-node=3",)}, "give --gpus-per-node instead"),
        ({"sbatch": ("--clusters=b",)}, "give --clusters instead"),
        ({"clusters": "a,b"}, "clusters: found 'a,b'"),
        ({"setup": ("a\nb",)}, "one shell line per item"),
        ({"partition": "a b"}, "partition: found 'a b'"),
        ({"gpu": 1}, "gpu: unknown key; expected one of: nodes, gpus_per_node"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(InputError) as error:
        make_spec(options, places=())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (5, 5),
        ("90", 90),
        ("0:15", 1),
        ("1:00:00", 60),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("12h", 720),
        ("1d6h", 1800),
        ("90m", 90),
    ],
)
def test_time_limits(text, expected):
    assert minutes(text) == expected


def test_profiles(tmp_path):
    place = tmp_path / "clusters.yaml"
    place.write_text(
        "default: alpha\nclusters:\n  alpha: {partition: gpu, gpus_per_node: 4}\n  beta: {time: "
        "5}\n"
    )
    assert make_spec({"nodes": 2}, places=(place,)) == JobSpec(
        nodes=2, partition="gpu", gpus_per_node=4
    )
    assert make_spec({"time": 7}, "beta", (place,)).minutes == 7
    for text, expected in [
        ("12:00:00", 720),
        ("1:30:00", 90),
        ("90", 90),
        ("1-06:00:00", 1800),
        ("10:30", 11),
    ]:
        place.write_text(f"default: a\nclusters:\n  a: {{time: {text}, nodes: 2}}\n")
        assert (
            make_spec({}, places=(place,)).minutes == expected
            and make_spec({}, places=(place,)).nodes == 2
        )
    for text, words in [
        ("clusters: {alpha: {parttion: gpu}}", "parttion: unknown key"),
        ("clusters: {alpha: 3}", "clusters.alpha: found 3"),
        ("cluster: {}", "found no mapping `clusters`"),
        ("clusters: {}\nfoo: 1", "found the key 'foo'"),
        ("default: x\nclusters: {a: {}}", "found no cluster 'x'; expected one of: a"),
        ("clusters: [", "is no YAML document"),
    ]:
        place.write_text(text)
        with pytest.raises(InputError, match=words.split("'")[0].replace("(", ".")) as error:
            make_spec({}, places=(place,))
        assert words in str(error.value)


def test_a_surrounding_job_leaves_nothing_in_the_environment(monkeypatch):
    for name in (
        "SLURM_JOB_ID",
        "SLURM_CPU_BIND",
        "SBATCH_PARTITION",
        "SRUN_DEBUG",
        "PMI_RANK",
        "RANK",
        "WORLD_SIZE",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("MINE", "1")
    with cleaned_environment():
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf" and os.environ["MINE"] == "1"
        assert not [
            name
            for name in os.environ
            if name.startswith(("SLURM_J", "SLURM_CPU", "SBATCH", "SRUN", "PMI"))
            or name in cluster.RANKS
        ]
    assert os.environ["RANK"] == "7"


def test_members_of_an_array():
    assert members([]) == [[]]
    assert members(["seed=1,2", "data.fold=0..1"]) == [
        ["seed=1", "data.fold=0"], ["seed=1", "data.fold=1"], ["seed=2", "data.fold=0"],
        ["seed=2", "data.fold=1"],
    ]  # fmt: skip
    with pytest.raises(
        InputError, match="found 'data.fold=4..0', which holds no value; .* data.fold=0..4"
    ):
        members(["data.fold=4..0"])


def test_bad_nodes_are_left_out_for_a_week(tmp_path):
    assert without_bad_nodes(JobSpec(), tmp_path).exclude is None
    health.remember(tmp_path, "n3", "no GPU")
    health.remember(tmp_path, "n4", "no GPU")
    os.utime(tmp_path / ".bad-nodes" / "n4", (0, time.time() - 8 * 24 * 3600))
    os.utime(tmp_path / ".bad-nodes" / "n3", (0, time.time() + 3600))  # its clock is early
    assert without_bad_nodes(JobSpec(exclude="n1"), tmp_path).exclude == "n1,n3"


def test_a_granted_gpu_that_torch_does_not_see_is_a_bad_node(monkeypatch):
    import torch

    from segfleet.pipeline.ranks import Ranks

    monkeypatch.delenv("SEGFLEET_DEVICE", raising=False)
    ranks = Ranks(torch.device("cpu"))
    health.check_node(ranks, 0, "n1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(
        InputError,
        match=r"n1: 2 GPU\(s\) were granted, but torch .* is built for CPUs; install a CUDA build",
    ):
        health.check_node(ranks, 2, "n1")  # no node's fault
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(health.BadNode, match="node n1: 2 GPU"):
        health.check_node(ranks, 2, "n1")


@pytest.mark.parametrize("steps", [[0, 5, 5, 5, 5], [0, 0, 0, 5, 5, 5, 5], [5, 5, 5, 5]])
def test_restarts_without_progress_end(tmp_path, monkeypatch, steps):
    """The third restart in a row that finds the steps of the start before them is the last."""
    told = iter(steps)
    monkeypatch.setattr(submission, "steps_done", lambda run: next(told))
    for life in range(len(steps)):
        folder = tmp_path / f"life-12.{life}"
        folder.mkdir()
        if life < len(steps) - 1:
            rank.begin(folder, Train(recipe={}, run=tmp_path, root=tmp_path), 3)
        else:
            with pytest.raises(rank.Fruitless, match="restarted 3 times at step 5"):
                rank.begin(folder, Train(recipe={}, run=tmp_path, root=tmp_path), 3)


def test_a_start_whose_note_was_lost_with_its_node_keeps_none_from_coming_back(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(submission, "steps_done", lambda run: 5)
    for life in range(4):
        folder = tmp_path / f"life-12.{life}"
        folder.mkdir()
        rank.begin(folder, Train(recipe={}, run=tmp_path, root=tmp_path), 3)
        if life == 1:
            (folder / "life.json").write_bytes(b"")


def test_results_of_another_job_of_the_same_id_never_count(tmp_path):
    """A new cluster counts from one again; a requeued job had failures in an earlier life."""
    facts = {
        "launcher": "slurm",
        "spec": JobSpec(),
        "code": None,
        "commit": None,
        "name": "x",
        "id": "1",
    }
    first, second = (
        submission.record(f, logs=f, **facts)
        for f in (submission.new_folder(tmp_path), submission.new_folder(tmp_path))
    )
    life = Path(first.logs) / "life-1.0"
    life.mkdir()
    (life / "failed-0.json").write_text(
        json.dumps({"rank": 0, "time": 1, "exit_code": 1, "message": "old", "peer_failure": False})
    )
    assert first.outcome() == ("failed", "old") and second.outcome() == (None, None)
    (Path(first.logs) / "life-1.10").mkdir()
    assert first.outcome() == (None, None)
    assert submission.latest(tmp_path) == second


def test_the_first_own_failure_is_shown(tmp_path):
    """First by the clock of the disk: rank 2's node is an hour late."""
    for number, (lost, moment) in enumerate([(True, 1.0), (False, 3.0), (False, 2.0)]):
        report = {
            "rank": number,
            "time": moment + 3600 * number,
            "exit_code": 1,
            "message": f"rank {number}",
            "peer_failure": lost,
        }
        path = tmp_path / f"failed-{number}.json"
        path.write_text(json.dumps(report))
        os.utime(path, (moment, moment))
    assert submission.failure(tmp_path)["message"] == "rank 2"


def test_code_is_frozen_once(tmp_path):
    first = snapshot.freeze_code(tmp_path)
    assert snapshot.freeze_code(tmp_path) == first
    assert (first / "segfleet" / "slurm" / "rank.py").read_bytes() == Path(
        rank.__file__
    ).read_bytes()
    assert (first / "segfleet" / "pipeline" / "recipes").is_dir()
    # and compiled once, not by every rank at every start
    for path in (first / "segfleet").rglob("*.py"):
        assert Path(importlib.util.cache_from_source(path)).is_file(), path
    look = (
        "from segfleet.pipeline.stop import StopRequest as it; print(it.asked.__code__.co_filename)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-v", "-c", look],
        env={**os.environ, "PYTHONPATH": str(first)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(first / "segfleet/pipeline/stop.py")
    compiled = importlib.util.cache_from_source(first / "segfleet/pipeline/stop.py")
    assert f"# code object from '{compiled}'" in done.stderr
    # what runs is the source, whose hash the job checks: a changed one is compiled again
    source = first / "segfleet/pipeline/stop.py"
    source.write_text(source.read_text(encoding="utf-8") + "\nCHANGED = True\n", encoding="utf-8")
    look = "from segfleet.pipeline.stop import CHANGED; print(CHANGED)"
    again = [sys.executable, "-P", "-c", look]
    done = subprocess.run(
        again, env={**os.environ, "PYTHONPATH": str(first)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_a_deadline_asks_to_stop_in_time(monkeypatch):
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        now = [1000.0]
        monkeypatch.setattr("segfleet.pipeline.stop.time", SimpleNamespace(time=lambda: now[0]))
        stop = StopRequest()
        stop.deadline, stop.margin = 2000.0, 60.0
        # the longest pause was 820 s, and a third of the time is 333 s
        for now[0] in (
            1010.0,
            1050.0,
            1870.0,
        ):
            asked = stop.asked()
        assert asked and stop.reason == "the time limit"
        calm = StopRequest()
        calm.deadline, calm.margin = 3000.0, 60.0
        for now[0] in range(1870, 2939):
            assert not calm.asked()
        now[0] = 2941.0
        assert calm.asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_submitting_loads_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from segfleet.cli import submit, resume, logs, cancel, status, submit_words, "
        "preprocess, evaluate, predict\n"
        "from segfleet.slurm import submitit_launcher, prepare; import "
        "segfleet.pipeline.inference.inputs, segfleet.preprocess.jobs"
    )
    code += "; import segfleet.slurm.status; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


def test_silence_of_slurm_is_not_the_end_of_a_job(tmp_path, monkeypatch, capsys):
    """Told once for all runs; only what a job itself wrote down as its end counts meanwhile."""
    from segfleet.cli import status as words
    from segfleet.slurm import job as slurm_job

    facts = {"launcher": "slurm", "spec": JobSpec(), "code": None, "commit": None, "name": "x"}
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    jobs = []
    for number in range(4):
        folder = submission.write_job(
            tmp_path / f"run{number}", Train(recipe={}, root=tmp_path), JobSpec()
        )
        made = submission.record(folder, id=str(number), logs=folder, **facts)
        jobs.append(slurm_job.SlurmJob(tmp_path / f"run{number}", made))
    for number, name in enumerate(["ended.json", "failed-0.json"]):
        life = tmp_path / f"run{number}" / "slurm" / "0001" / f"life-{number}.0"
        life.mkdir()
        (life / name).write_text(
            json.dumps(
                {
                    "rank": 0,
                    "time": 1,
                    "exit_code": 1,
                    "message": "the node died",
                    "peer_failure": True,
                }
            )
        )
    found = [seen for _, seen in slurm_job.look_at_all(jobs)]
    assert [(seen.state, seen.queue) for seen in found] == [
        ("done", None),
        *[("unknown", "unknown")] * 3,
    ]
    assert all("squeue says: slurm_load_jobs error" in seen.reason for seen in found[1:])
    words.render_jobs([{"name": str(number), **asdict(seen)} for number, seen in enumerate(found)])
    assert capsys.readouterr().out.count("3 job(s) is unknown: squeue says:") == 1
    with pytest.raises(
        InputError, match="whether run2 still runs as job 2 is unknown; squeue says"
    ):
        slurm_job.refuse_if_active(tmp_path / "run2")
    monkeypatch.setenv("PATH", "/nowhere")  # a machine without SLURM: the runs' own files speak
    assert [seen.state for _, seen in slurm_job.look_at_all(jobs)] == [
        "done",
        "failed",
        "unknown",
        "unknown",
    ]


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path, capsys):
    """Its recipe was written by a version that knew another key; another one is damaged."""
    from segfleet.cli import status as words
    from segfleet.slurm.status import status

    recipe = {
        "name": "tiny",
        "data": {"store": "s"},
        "model": {"name": "m"},
        "stages": [{"epochs": 1, "lr": 1e-2}],
    }
    for name, text in [
        ("a", json.dumps({**recipe, "gone": 1})),
        ("b", json.dumps(recipe)),
        ("c", "{"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(text)
    folder = submission.write_job(tmp_path / "a", Train(recipe={}, root=tmp_path), JobSpec())
    submission.record(
        folder,
        id="1",
        name="x",
        launcher="slurm",
        spec=JobSpec(),
        logs=folder,
        code=None,
        commit=None,
    )
    rows = status(tmp_path)
    assert [row.state for row in rows] == ["unreadable", "waiting", "unreadable"]
    assert "gone: unknown key" in rows[0].reason and "c/recipe.json is damaged" in rows[2].reason
    assert rows[0].job == "1"
    words.render(rows)
    assert "a is unreadable: " in capsys.readouterr().out


def test_folders_that_go_while_runs_are_listed_are_passed_over(tmp_path, monkeypatch):
    """As the unfinished checkpoints of jobs that train; nobody looks into finished ones."""
    from segfleet.pipeline.run import run_folders

    leaf, looked, scandir = tmp_path / "a" / "b", [], os.scandir
    for folder in (leaf, leaf / "going", leaf / "checkpoints" / "step-1", tmp_path / ".code" / "c"):
        folder.mkdir(parents=True)
    (leaf / "recipe.json").write_text("{}")

    def look(path):
        looked.append(Path(path).name)
        if looked[-1] == "going":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    assert run_folders(tmp_path) == [leaf]
    assert looked == [tmp_path.name, "a", "b", "going"]


def test_what_a_user_has_set_for_sbatch_is_obeyed(monkeypatch, tmp_path):
    profiles = tmp_path / "clusters.yaml"
    profiles.write_text("default: a\nclusters: {a: {partition: gpu, account: hearts}}\n")
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    monkeypatch.setenv("SBATCH_QOS", "high")
    monkeypatch.setenv("SBATCH_NETWORK", "ib")
    spec = make_spec({"qos": "debug"}, places=(profiles,))
    # sbatch's own order: a script, then the environment, then the command line
    assert (spec.partition, spec.account, spec.qos) == ("low", "hearts", "debug")
    assert jobspec.not_obeyed() == ["SBATCH_NETWORK"]
    monkeypatch.setenv("SLURM_CLUSTERS", "wice")
    assert make_spec({}, places=(profiles,)).clusters == "wice"
    monkeypatch.setenv("SBATCH_CLUSTERS", "beta")
    assert make_spec({}, places=(profiles,)).clusters == "beta"
    assert make_spec({}, places=()).partition is None, "a job that is resumed asks for what it had"


def test_slurm_is_asked_without_the_users_own_settings(monkeypatch, tmp_path):
    told = tmp_path / "squeue"
    told.write_text(
        '#!/bin/bash\nread line && echo "$line"; env | grep -E "^S(QUEUE|CANCEL)_"\nexit 0\n'
    )
    told.chmod(0o755)
    for name in ("SQUEUE_PARTITION", "SCANCEL_INTERACTIVE", "SINFO_FORMAT", "SACCT_FEDERATION"):
        monkeypatch.setenv(name, "true")
    assert cluster.call(str(told)) == "", "neither a setting nor anything to read"


def test_a_bad_node_of_another_cluster_blocks_nothing(monkeypatch, tmp_path):
    for node in ("n1", "gpu07"):
        health.remember(tmp_path, node, "multiplies wrongly")
    monkeypatch.setattr(cluster, "known_nodes", lambda of=None: frozenset({"n1", "n2"}))
    assert without_bad_nodes(make_spec({}, places=()), tmp_path).exclude == "n1"


@pytest.mark.parametrize(
    ("line", "code"), [("source /no/such/activate", 2), ("true", 0), ("false || true", 0)]
)
def test_a_setup_line_that_fails_ends_the_job_and_says_so(tmp_path, line, code):
    lines = submitit_launcher.before(tmp_path, make_spec({"setup": (line,)}, places=()), None)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "0"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    if code:
        found = submission.failure(tmp_path / "life-7.0")
        assert found["exit_code"] == 2 and line in found["message"] and line in done.stderr


def test_a_name_with_bars_is_read(monkeypatch):
    monkeypatch.setattr(cluster, "call", lambda *_, **__: "7|RUNNING|None|n1||a|b\n")
    assert cluster.queue() == {
        "7": {"name": "a|b", "state": "RUNNING", "reason": None, "node": "n1"}
    }


def test_a_job_of_somebody_else_that_slurm_does_not_show_is_unknown(monkeypatch, tmp_path):
    made = submission.record(
        submission.write_job(tmp_path, Train(recipe={}, root=tmp_path), make_spec({}, places=())),
        id="7", name="x", launcher="slurm", spec=make_spec({}, places=()), logs=tmp_path,
        code=None, commit=None,
    )  # fmt: skip
    found = SlurmJob(tmp_path, made)
    assert found.judge({}, {}, None).state == "lost"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    seen = found.judge({}, {}, None)
    assert seen.state == "unknown" and found.owner in seen.reason
    monkeypatch.setattr(cluster, "call", lambda *_: pytest.fail("scancel was called"))
    with pytest.raises(InputError, match=f"belongs to {found.owner}"):
        slurm_job.cancel([(found, seen)])


def test_code_that_is_not_what_was_submitted_is_refused(tmp_path, monkeypatch):
    life = tmp_path / "life-7.0"
    life.mkdir()
    monkeypatch.setattr(submission, "progress_of", lambda _: 0)
    monkeypatch.setenv("SEGFLEET_CODE", snapshot.digest())
    rank.begin(life, Train(recipe={}, root=tmp_path), 3)
    assert json.loads((life / "life.json").read_text())["code"] == snapshot.digest()
    monkeypatch.setenv("SEGFLEET_CODE", "0" * 12)
    with pytest.raises(rank.OtherCode, match="000000000000"):
        rank.begin(life, Train(recipe={}, root=tmp_path), 3)


def test_what_is_resumed_is_the_run_that_was_named(tiny_recipe, tmp_path, monkeypatch):
    from segfleet.cli.resume import refuse_if_another
    from segfleet.pipeline import identity, jobs, run
    from segfleet.slurm import prepare

    folder = tiny_recipe([{"name": "a", "epochs": 1, "steps": 1, "lr": 0.01}], batch=2)
    [(recipe, leaf)] = prepare.prepare(str(folder / "tiny.yaml"), [], tmp_path)
    job = Train(run=leaf, recipe=prepare.describe(recipe), root=tmp_path)
    refuse_if_another(leaf, job, None)
    jobs.check_same_run(job, leaf)
    with pytest.raises(InputError, match="lies in .* now"):
        refuse_if_another(tmp_path / "moved" / leaf.name, job, None)
    monkeypatch.setattr(identity, "NUMERICS", identity.NUMERICS + 1)
    with pytest.raises(InputError, match=f"{leaf.name} was begun by another .*/.code/abc"):
        refuse_if_another(leaf, job, "/runs/.code/abc")
    with pytest.raises(InputError, match=f"{leaf.name} is another run"):
        jobs.check_same_run(job, run.stage_folders(tmp_path, recipe, _manifest(recipe))[-1].path)


def _manifest(recipe):
    from segfleet.preprocess.stores.manifest import load_manifest

    return load_manifest(Path(recipe.data.store))


def test_a_number_that_another_process_has_is_no_daemon(tmp_path):
    """The sandbox ends whom its files of process numbers name: never another program that has the
    number now."""
    own = Sandbox(tmp_path)
    file = tmp_path / "ctld.pid"
    file.write_text(f"{os.getpid()}\n")
    assert own.pids() == {}
    daemon = subprocess.Popen([str(tmp_path / "slurmctld"), "60"], executable="/bin/sleep")
    try:
        file.write_text(f"{daemon.pid}\n")
        words = Path(f"/proc/{daemon.pid}/cmdline")
        while not words.read_bytes():  # for a moment after exec
            time.sleep(0.01)
        assert own.pids() == {"slurmctld": daemon.pid}
    finally:
        daemon.kill()
        daemon.wait()
    assert own.pids() == {}


def test_a_job_inherits_no_cores_ranks_or_gpus():
    """Written out, so that a name that leaves the product's table is noticed."""
    inherited = [
        "SLURM_JOB_ID",
        "SLURM_NTASKS",
        "SLURM_CPUS_PER_TASK",
        "SLURMD_NODENAME",
        "SBATCH_PARTITION",
        "SQUEUE_FORMAT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CUDA_VISIBLE_DEVICES",
        "GPU_DEVICE_ORDINAL",
        "ROCR_VISIBLE_DEVICES",
    ]
    kept = {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/home/me", "OMP_NUM_THREADS": "4"}
    assert cluster.clean_environment(dict.fromkeys(inherited, "1") | kept) == kept


@pytest.mark.parametrize(
    ("code", "life", "end", "state", "again"),
    [
        (75, (), "past", "RUNNING", True),
        (75, (), "later", "RUNNING", True),
        (75, (), "later", "COMPLETING", False),
        (75, ("life.json",), "past", "COMPLETING", True),
        (137, ("life.json",), "past", "COMPLETING", True),  # killed at the deadline
        (137, ("life.json",), "later", "RUNNING", False),
        (137, (), "past", "RUNNING", False),  # never began
        (1, ("life.json",), "past", "RUNNING", False),
        (0, ("life.json",), "past", "RUNNING", False),
        (75, ("life.json", "stay"), "past", "RUNNING", False),  # a person ended it
    ],
)
def test_who_comes_back(tmp_path, code, life, end, state, again):
    """The script's last lines in a real shell, with a `scontrol` that writes down what it is
    asked."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "JobId=7 JobState={state} Reason=None"\n'
    )
    scontrol.chmod(0o755)
    (tmp_path / "sleep").symlink_to("/bin/true")
    for name in life:
        (tmp_path / name).touch()
    until = int(time.time()) + (3600 if end == "later" else -5)
    done = subprocess.run(
        ["bash", "-c", "\n".join([f"(exit {code})", *submitit_launcher.after()])],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            submission.LIFE: str(tmp_path),
            "SEGFLEET_END": str(until),
            "job": "7",
        },
    )
    asked = tmp_path / "asked"
    assert done.returncode == code
    assert ("requeue 7" in asked.read_text().splitlines() if asked.exists() else False) is again


def test_every_resource_is_an_option_of_submit_with_its_own_words():
    from segfleet.cli.submit import IN_A_PROFILE, command

    options = inspect.signature(command).parameters
    for name, field in JobSpec.model_fields.items():
        if name in IN_A_PROFILE:
            assert name not in options
            continue
        kind, info = typing.get_args(options[name].annotation)
        assert info.help.rstrip(".").lower() == field.description.rstrip(".").lower()
        several = isinstance(field.default, tuple)
        assert (list[str] in typing.get_args(kind)) is several, name
    number = {
        name
        for name, one in options.items()
        if int in typing.get_args(typing.get_args(one.annotation)[0])
    }
    assert number == {"nodes", "ranks_per_node", "cpus", "throttle", "warning"}


def test_a_stage_that_is_resumed_stays_its_sweeps(tiny_recipe, tmp_path, monkeypatch):
    """The sweep knows the job again by it, and would take another for somebody else's."""
    from segfleet.cli import resume
    from segfleet.slurm import prepare

    folder = tiny_recipe([{"name": "a", "epochs": 1, "steps": 1, "lr": 0.01}], batch=2)
    [(recipe, leaf)] = prepare.prepare(str(folder / "tiny.yaml"), [], tmp_path)
    sweep, sent = tmp_path / "sweeps" / "s", {}
    job = Train(run=leaf, recipe=prepare.describe(recipe), root=tmp_path, score=False)
    made = submission.write_job(leaf, job, JobSpec(), sweep=sweep)
    (leaf / "recipe.json").write_text(json.dumps(job.recipe))
    submission.record(
        made, id="7", name="x", launcher="slurm", spec=JobSpec(), logs=made, code=None, commit=None
    )  # fmt: skip

    def submit(launcher, jobs, *_, **kept):
        sent.update(kept, job=jobs[0][1])
        return [SimpleNamespace(id="8", submission=submission.latest(leaf))]

    monkeypatch.setattr(SlurmLauncher, "submit_jobs", submit)
    monkeypatch.setattr(cluster, "check", lambda spec: None)
    monkeypatch.setattr(slurm_job, "refuse_if_active", lambda *runs: None)
    resume.command(str(leaf), runs=tmp_path, as_json=True)
    assert sent["sweep"] == sweep
    assert sent["job"] == job.model_copy(update={"lines": True})


def test_a_job_of_an_earlier_version_is_read(tmp_path):
    """Every kind of job had a stage_to then, null for most."""
    document = {"do": "command", "words": ["sweep", "s.yaml"], "root": "/runs", "stage_to": None}
    document |= {"spec": {"gpus_per_node": 0, "lead": 60, "fruitless": 3}, "before": []}
    (tmp_path / "job.json").write_text(json.dumps(document))
    job, kept = submission.read_job(tmp_path)
    assert job == Command(words=("sweep", "s.yaml"), root="/runs") and kept.spec.lead == 60


def test_a_job_that_cannot_be_read_ends_with_a_message(tmp_path, monkeypatch, capsys):
    """Its rank runs the code of another version (--live)."""
    life = tmp_path / "life-7.0"
    life.mkdir()
    (tmp_path / "job.json").write_text(json.dumps({"do": "dance"}))
    monkeypatch.setenv("SEGFLEET_LIFE", str(life))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rank, "become_rank", lambda: None)
    monkeypatch.setattr(rank, "StopRequest", lambda: None)
    monkeypatch.setattr(rank.worker, "exit_now", sys.exit)
    with pytest.raises(SystemExit) as ended:
        rank.run_rank(str(tmp_path))
    assert ended.value.code == 2 and "job: found 'dance', expected" in capsys.readouterr().err
    assert submission.failure(life)["message"].startswith("job: found 'dance'")
