"""What SLURM's programs say of a cluster, read: nodes of several kinds, limits, names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.core.machine import threads_of
from segfleet.pipeline.launch.job import Predict, Train
from segfleet.slurm import cluster, health, rank, snapshot, submission, submitit_launcher
from segfleet.slurm.jobspec import JobSpec, make_spec
from segfleet.slurm.status import status
from segfleet.slurm.submitit_launcher import QueueFull, SlurmLauncher

NODES = """\
gpu*|1-00:00:00|g01|64|512000|gpu:a100:4(S:0-1)|ib
gpu*|1-00:00:00|g02|64|512000|gpu:a100:4(S:0-1)|ib
gpu*|1-00:00:00|g03|64|512000|gpu:v100:2|(null)
gpu*|1-00:00:00|m01|64|512000|gpu:a100:1,gpu:1g.10gb:7|(null)
cpu|infinite|c01|32+|128000+|(null)|(null)
"""


@pytest.fixture
def sinfo(monkeypatch):
    def told(program, *options, of=None):
        assert program == "sinfo" and "-a" in options, "hidden partitions too"
        return NODES

    monkeypatch.setattr(cluster, "call", told)


def spec(**options) -> JobSpec:
    return make_spec(options, places=())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus_per_node": "a100:4", "nodes": 2}, None),
        ({"gpus_per_node": "1g.10gb:7"}, None),
        ({"gpus_per_node": 2, "nodes": 4}, None),  # m01 has eight, of two kinds
        ({"gpus_per_node": 2, "gpu_type": "v100", "nodelist": "g03"}, None),
        (
            {"gpus_per_node": "a100:4", "nodes": 3},
            "nodes: found 3, 2 have all that was asked for; not g03, m01",
        ),
        (
            {"gpus_per_node": 4, "nodelist": "g[01,03]"},
            "nodelist: g03: gpus_per_node: found 4, a node of partition gpu has 2",
        ),
        ({"nodelist": "c01"}, "nodelist: found 'c01', which partition gpu has not"),
        ({"nodelist": "g01", "exclude": "g[01-02]"}, "'g01' is left out by exclude"),
        ({"nodes": 3, "exclude": "g[01-02]"}, "nodes: found 3, 2 are left after exclude"),
        ({"gpus_per_node": 1, "partition": "cpu"}, "found 1, a node of partition cpu has 0"),
    ],
)
def test_nodes_without_what_was_asked_for_are_named(sinfo, options, words):
    if words is None:
        cluster.check(spec(**options))
        return
    with pytest.raises(InputError) as error:
        cluster.check(spec(**options))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "nodes", "each", "kind"),
    [
        ({"gpus": "a100:8"}, 2, 4, "a100"),
        ({"gpus": 8, "nodes": 4}, 4, 2, None),
        ({"gpus": "a100:2"}, 1, 2, "a100"),
        ({"gpus": 2}, 1, 2, None),
        ({"gpus": "1g.10gb:3"}, 1, 3, "1g.10gb"),
        ({"gpus": "a100:7"}, 1, 7, "a100"),  # nowhere: `check` says so
    ],
)
def test_gpus_of_the_whole_job_are_shared_out(sinfo, options, nodes, each, kind):
    found = cluster.settled(spec(**options))
    assert (found.nodes, found.gpus_per_node, found.gpu_type, found.gpus) == (
        nodes, each, kind, None,
    )  # fmt: skip
    assert found.ranks == nodes * each


@pytest.mark.parametrize(
    ("options", "workers", "cpus"),
    [
        ({"gpus_per_node": "a100:1", "nodelist": "g01"}, ["auto"], 16),
        ({"gpus_per_node": "a100:4", "nodelist": "g01"}, [3, 5], 7),  # the most of an array
        ({"gpus_per_node": "v100:2"}, ["auto"], 16),  # of the node's 32
        ({"gpus_per_node": "1g.10gb:1"}, ["auto"], 8),  # m01's share
        ({"gpus_per_node": 1}, ["auto"], 8),  # it may come to m01
        ({"gpus_per_node": 1, "exclude": "m01"}, [40], 16),
        ({"gpus_per_node": 1, "cpus": 3}, ["auto"], 3),  # somebody said so
        ({"ranks_per_node": 2, "partition": "cpu"}, ["auto"], None),
        ({"gpus_per_node": 1, "partition": "nowhere"}, ["auto"], None),  # `check` says so
    ],
)
def test_a_rank_with_a_gpu_gets_cores_for_its_loader(sinfo, options, workers, cpus):
    found = cluster.fed(spec(**options), workers)
    assert found.cpus == cpus
    if cpus and "nodelist" in options:
        cluster.check(found)


def test_gpus_said_twice_or_wrongly(tmp_path):
    for options, words in [
        ({"gpus": 4, "gpus_per_node": 2}, "say the same twice"),
        ({"gpus": 5, "nodes": 2}, "not as many on each"),
        ({"gpus": "a100:many"}, "expected a number or type:number"),
        ({"gpus_per_node": "a100:many"}, "expected a number or a100:2"),
    ]:
        with pytest.raises(InputError, match=words):
            spec(**options)
    place = tmp_path / "clusters.yaml"
    place.write_text("default: a\nclusters: {a: {gpus_per_node: 4, nodes: 2}}\n")
    assert make_spec({"gpus": "2"}, places=(place,)).ranks == 2, "the command line wins"


def test_short_names_of_nodes_are_written_out():
    names = "a[01-03,7],b,127.0.0.[11-12],r[1-2]n[8,9]x"
    assert cluster.names_of(names) == [
        "a01", "a02", "a03", "a7", "b", "127.0.0.11", "127.0.0.12", "r1n8x", "r1n9x", "r2n8x",
        "r2n9x",
    ]  # fmt: skip
    assert cluster.names_of("") == [] and cluster.names_of("./nodes.txt") == []


def test_arrays_are_split_where_the_cluster_wants_it(monkeypatch, tmp_path):
    """Seven members where an array may have three; the third part is refused: nothing stays."""
    monkeypatch.setattr(submitit_launcher.shutil, "which", lambda name: name)
    cancelled, sent = [], []

    def call(*command, **_):
        if command[0] == "scancel":
            cancelled.append(command[1:])
        return "MaxArraySize            = 4\n"

    def array(self, folders, script):
        if len(sent) == refused:
            raise InputError("SLURM refused the job: no")
        sent.append((len(folders), script.spec.throttle))
        return [SimpleNamespace(job_id=f"{len(sent)}0_{index}") for index in range(len(folders))]

    monkeypatch.setattr(cluster, "call", call)
    monkeypatch.setattr(SlurmLauncher, "_array", array)
    job = Predict(models=(), images=(), out=tmp_path)
    jobs = [(tmp_path / f"run{index}", job) for index in range(7)]
    refused = 9
    taken = SlurmLauncher(live=True).submit_jobs(jobs, tmp_path, spec(throttle=6), "x", tmp_path)
    assert sent == [(3, 2), (3, 2), (1, 2)] and len({job.id for job in taken}) == 7
    sent.clear()
    refused = 2
    with pytest.raises(InputError, match="no"):
        SlurmLauncher(live=True).submit_jobs(jobs, tmp_path, spec(), "x", tmp_path)
    assert cancelled == [("10", "20")]


@pytest.mark.parametrize("runs", [1, 2])
def test_a_refused_submission_leaves_no_run_that_waits(monkeypatch, tmp_path, runs):
    def refuse(*_):
        assert not list(tmp_path.rglob("recipe.json")), "nothing was submitted yet"
        raise QueueFull("SLURM refused the job: QOSMaxSubmitJobPerUserLimit")

    root = tmp_path / "runs"
    root.mkdir()
    members = [(root / "0123456789ab" / f"leaf{n}", {"name": f"leaf{n}"}) for n in range(runs)]
    launcher = SlurmLauncher(live=True, ask=False)
    monkeypatch.setattr(SlurmLauncher, "_hand_over", refuse)
    with pytest.raises(QueueFull):
        launcher.submit_array(members, root, spec())
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert status(root) == [] and not (root / "0123456789ab").exists()
    taken = [SimpleNamespace(job_id=str(n)) for n in range(runs)]
    monkeypatch.setattr(SlurmLauncher, "_hand_over", lambda *_: taken)
    launcher.submit_array(members, root, spec())
    assert [read_json(run / "recipe.json") for run, _ in members] == [one for _, one in members]
    monkeypatch.setattr(SlurmLauncher, "_hand_over", refuse_again)
    with pytest.raises(QueueFull):  # what was there before stays
        launcher.submit_array(members, root, spec())
    assert all((run / "slurm" / "0001" / "submission.json").exists() for run, _ in members)
    assert not any((run / "slurm" / "0002").exists() for run, _ in members)


def refuse_again(*_):
    raise QueueFull("no")


@pytest.mark.parametrize(
    ("value", "threads"), [("4", 4), ("4,2", 4), (" 8 ", 8), ("", None), ("0", None), ("x", None)]
)
def test_numbers_of_threads_as_openmp_takes_them(value, threads):
    assert threads_of({"OMP_NUM_THREADS": value}) == threads
    assert threads_of({}) is None


def test_every_rank_gets_a_mig_slice_of_its_own(monkeypatch):
    """CUDA shows a process one slice, the first of those it may see."""
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "SEGFLEET_MASTER_HOST"):
        monkeypatch.setenv(name, "")
    for seen, left in [("MIG-a,MIG-b", "MIG-b"), ("0,1", "0,1"), ("GPU-x,GPU-y", "GPU-x,GPU-y")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        rank.become_rank()
        assert rank.os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_a_busy_gpu_ends_this_start_and_blames_no_node(monkeypatch):
    """It is looked at again; all ranks go together, and the job comes back."""
    import torch

    from segfleet.pipeline.ranks import Ranks

    free, clock = [], [0.0]

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(health.time, "sleep", sleep)
    monkeypatch.setattr(health.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free.pop() if free else 10, 100))
    device = torch.device("cuda", 0)
    free += [90, 10, 10]
    assert health._held(device, "n1") is None and clock[0] == 4.0
    words = health._held(device, "n1")
    assert "node n1: only" in words and clock[0] >= 60
    ranks = Ranks(torch.device("cpu"))
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, words], raising=False)
    with pytest.raises(health.Busy, match="comes back") as error:
        health.check_node(ranks, 0, "n2")  # the GPU of another rank
    assert error.value.exit_code == 75 and not isinstance(error.value, health.BadNode)


def test_what_kept_the_ranks_from_meeting_is_told_first(tmp_path):
    facts = {"exit_code": 1, "peer_failure": False}
    for number, (message, joining) in enumerate([("could not join", True), ("no torch", False)]):
        report = {"rank": number, "time": number, "message": message, "joining": joining, **facts}
        (tmp_path / f"failed-{number}.json").write_text(json.dumps(report))
    assert submission.failure(tmp_path)["message"] == "no torch"


def submitted(run: Path) -> submission.Submission:
    asked = spec()
    folder = submission.write_job(run, Train(recipe={}, run=run, root=run.parent), asked)
    return submission.record(
        folder, id="7", name="x", launcher="slurm", spec=asked, logs=run.parent / ".arrays" / "a",
        code=None, commit=None,
    )  # fmt: skip


def test_a_folder_of_runs_may_be_moved_and_copied(tmp_path):
    made = submitted(tmp_path / "runs" / "abc")
    life = Path(made.logs) / "life-7.0"
    life.mkdir(parents=True)
    (life / "ended.json").write_text("{}")
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    assert submission.submissions(tmp_path / "copy" / "abc") == [], "the job is the original's"
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    [found] = submission.submissions(tmp_path / "elsewhere" / "abc")
    assert found.outcome() == ("done", None) and Path(found.folder).is_dir()
    assert found.log(3) == tmp_path / "elsewhere" / ".arrays" / "a" / "7_3_log.out"
    (tmp_path / "other").symlink_to(tmp_path / "elsewhere")
    assert submission.submissions(tmp_path / "other" / "abc")[0].folder == found.folder


def test_what_a_sweep_on_ray_in_slurm_refuses(tmp_path):
    from typer.testing import CliRunner

    from segfleet.cli.main import app

    told = CliRunner().invoke(app, ["sweep", "x.yaml", "--nodes", "2"])
    assert told.exit_code == 2 and "ray-in-slurm" in told.output


def test_scripts_and_jobs_name_paths_as_their_user_does(tiny_recipe, tmp_path, monkeypatch):
    """/home/me is a link to /net/vol/me, which the nodes have not: nothing that a node reads names
    that."""
    from segfleet.cli.resume import refuse_if_another
    from segfleet.pipeline.run import find_run, open_run
    from segfleet.slurm import prepare

    made = tiny_recipe([{"name": "a", "epochs": 1, "steps": 1, "lr": 0.01}], batch=2)
    net, home = tmp_path / "net" / "vol" / "me", tmp_path / "home" / "me"
    net.mkdir(parents=True)
    home.parent.mkdir()
    home.symlink_to(net)
    text = (made / "tiny.yaml").read_text()
    store = next(line.split(": ")[-1] for line in text.splitlines() if "store:" in line)
    shutil.copytree(store.strip("'\""), net / "store")
    (net / "tiny.yaml").write_text(text.replace(store, "store"))
    monkeypatch.chdir(home)
    monkeypatch.setenv("PWD", str(home))
    [(recipe, leaf)] = prepare.prepare("tiny.yaml", [], Path("runs"))
    assert leaf == home / "runs" / leaf.name and recipe.data.store == str(home / "store")
    job = Train(run=leaf, recipe=prepare.describe(recipe), root=home / "runs")
    folder = submission.write_job(leaf, job, spec())
    script = SlurmLauncher().script(leaf, home / "runs", spec())
    assert f"#SBATCH --chdir={home}\n" in script
    logs = {"id": "7", "name": "x", "launcher": "slurm", "code": None, "commit": None}
    write_json(leaf / "recipe.json", job.recipe)
    submission.record(folder, spec=spec(), logs=folder, **logs)
    told = "".join(path.read_text() for path in leaf.rglob("*.json"))
    for written in (script, told, str(submission.home_of(Path("store")))):
        assert str(home) in written and str(tmp_path / "net") not in written
    # seen by either name it is the same run, with the same job
    for name in (leaf.name, str(home / "runs" / leaf.name)):
        assert find_run(name, Path("runs")) == leaf
    there = net / "runs" / leaf.name
    assert submission.latest(there).folder == submission.latest(leaf).folder
    refuse_if_another(there, job, None)
    (tmp_path / "best").symlink_to(there)
    assert [stage.path for stage in open_run(tmp_path / "best")[1]] == [there]


def test_folds_trained_through_a_link_are_one_family(tiny_recipe, tmp_path):
    from segfleet.pipeline.scoring.folds import family_of
    from segfleet.slurm import prepare

    made = tiny_recipe([{"name": "a", "epochs": 1, "steps": 1, "lr": 0.01}], batch=2)
    [(recipe, _)] = prepare.prepare(str(made / "tiny.yaml"), [], tmp_path)
    (tmp_path / "link").symlink_to(recipe.data.store)
    [(linked, _)] = prepare.prepare(
        str(made / "tiny.yaml"), [f"data.store={tmp_path / 'link'}"], tmp_path
    )
    assert linked.data.store == str(tmp_path / "link")
    assert family_of(recipe) == family_of(linked)


LATIN = "Münze".encode("latin-1")  # no UTF-8


def test_words_of_slurm_in_another_encoding_are_no_error(tmp_path, monkeypatch):
    program = tmp_path / "squeue"
    program.write_bytes(b"#!/bin/sh\necho '" + LATIN + b"'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert cluster.call("squeue") == "M\N{REPLACEMENT CHARACTER}nze\n"


def test_a_diff_in_another_encoding_is_kept(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.py").write_bytes(b"x = 1\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "models" / "net.py").write_bytes(b"x = 1  # " + LATIN + b"\n")
    found = snapshot.commit(tmp_path)
    assert len(found["commit"]) == 40 and "+x = 1  # M\N{REPLACEMENT CHARACTER}nze" in found["diff"]
