"""Preprocessing, evaluation and prediction as jobs on a real SLURM: the files of the same commands
on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.pipeline.launch.job import Predict
from segfleet.preprocess.phantoms.phantom import write_msd_phantom

SHORT = ("stages.0.epochs=1", "stages.0.steps=3", "stages.1.steps=2")
SLOW = """
import os
here = os.environ.get
first = here("SLURM_RESTART_COUNT", "0") == "0" and "SLURM_PROCID" in os.environ
if here("SLURM_ARRAY_TASK_ID") == "2" and first:
    import time
    from segfleet.preprocess.checking import check
    look = check.check_case
    def slow(*arguments):
        found = look(*arguments)
        time.sleep(1.5)
        return found
    check.check_case = slow
"""
KILLED = """
import os
here = os.environ.get
first = here("SLURM_RESTART_COUNT", "0") == "0" and "SLURM_PROCID" in os.environ
if here("SLURM_ARRAY_TASK_ID") == "2" and first:
    from segfleet.preprocess.checking import check
    check.check_case = lambda *arguments: os.kill(int(os.environ["SLURM_TASK_PID"]), 9)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_msd_phantom(tmp_path_factory.mktemp("raw") / "msd", cases=8, size=(8, 16, 16))


def submitted(cluster, *arguments, **more) -> dict:
    return json.loads(cluster.segfleet("submit", "--json", *arguments, **more).stdout)


def states(cluster, out) -> dict[str, tuple[str, int]]:
    return {
        row["name"]: (row["state"], row["starts"])
        for row in json.loads(cluster.segfleet("status", out, "--json").stdout)
    }


def test_an_array_makes_the_store_of_one_process(cluster, raw, tmp_path):
    """One member is warned in the middle of its work, comes back alone, and looks only at what it
    had not yet seen."""
    cluster.segfleet("preprocess", "msd", "--raw", raw, "--out", tmp_path / "here", "--workers", 1)
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    words = ("--array", 3, "--", "preprocess", "msd", "--raw", raw, "--out", tmp_path / "there")
    made = submitted(cluster, *words, PYTHONPATH=str(tmp_path))
    assert [row["name"] for row in made["jobs"]] == [
        f"segfleet-{what}-there" for what in ("survey",) * 3 + ("write",) * 3 + ("publish",)
    ]
    member = {**made, "job": made["jobs"][2]["job"]}  # its own number is that of the whole array
    log = Path(made["jobs"][2]["log"])
    cluster.wait(lambda: log.exists() and "check: 0 of 2" in log.read_text(), what="the first case")
    cluster.call("scancel", "--signal=USR2", member["job"])
    cluster.release(member)
    cluster.wait_for_state(made, "COMPLETED")
    assert "stopped after 1 of 2 (check)" in log.read_text() and "check: 1 of 2" in log.read_text()
    assert files(tmp_path / "there") == files(tmp_path / "here")
    found = states(cluster, tmp_path / "there")
    assert found.pop("survey 2") == ("done", 2) and set(found.values()) == {("done", 1)}, (
        "the other members did not start again"
    )
    assert submitted(cluster, *words)["state"] == "done"
    assert "publish: write: 8 of 8" in cluster.segfleet("logs", tmp_path / "there").stdout


@pytest.mark.long
def test_a_killed_member_of_an_array_comes_back_alone(cluster, raw, tmp_path):
    """kill -9 in the middle of its survey: those who write wait for it, and write all there is."""
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    words = ("--array", 3, "--", "preprocess", "msd", "--raw", raw, "--out", tmp_path / "there")
    made = submitted(cluster, *words, PYTHONPATH=str(tmp_path))
    cluster.release({**made, "job": made["jobs"][2]["job"]})
    cluster.wait_for_state(made, "COMPLETED")
    found = states(cluster, tmp_path / "there")
    assert found.pop("survey 2") == ("done", 2) and set(found.values()) == {("done", 1)}
    said = cluster.segfleet("logs", tmp_path / "there").stdout
    assert "1 shard(s) finished" in said, "they did not leave it to the last job"


def test_all_problems_are_told_by_the_last_job(cluster, tmp_path):
    raw = write_msd_phantom(tmp_path / "raw", cases=5, size=(8, 16, 16))
    for number in (0, 3):
        (raw / "imagesTr" / f"phantom_{number:03d}.nii.gz").write_bytes(b"no image")
    made = submitted(
        cluster, "--array", 2, "--", "preprocess", "msd", "--raw", raw, "--out", tmp_path / "store"
    )
    cluster.wait_for_state(made, "FAILED")
    row = json.loads(cluster.segfleet("status", tmp_path / "store", "--json").stdout)[-1]
    assert (
        row["state"] == "failed"
        and "2 problem(s) in" in row["reason"]
        and "Traceback" not in row["reason"]
    )
    assert (
        "phantom_000: file: found" in row["reason"] and "phantom_003: file: found" in row["reason"]
    )
    assert {
        state
        for name, (state, _) in states(cluster, tmp_path / "store").items()
        if name != "publish"
    } == {"done"}
    assert not (tmp_path / "store").exists()


def test_evaluation_and_prediction_on_two_ranks(cluster, straight, tmp_path):
    run = Path(straight(1, *SHORT)["stages"][-1])
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    generator = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(generator.integers(0, 255, (30, 40), np.uint8)).save(
            tmp_path / f"picture{index}.png"
        )
    pictures = sorted(tmp_path.glob("*.png"))
    cluster.segfleet("predict", run, *pictures, "--out", tmp_path / "here")
    ranks = ("--ranks-per-node", 2, "--")
    scored = submitted(cluster, *ranks, "evaluate", run)
    predicted = submitted(cluster, *ranks, "predict", run, *pictures, "--out", tmp_path / "there")
    cluster.wait_for_state({**predicted, "run": str(run)}, "COMPLETED")
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert "2 of 2 images" in cluster.segfleet("logs", tmp_path / "there", "--rank", 0).stdout, (
        "the ranks share the images"
    )
    cluster.wait_for_state(scored, "COMPLETED")
    after = json.loads((run / "evaluation.json").read_text())
    assert {key: after[key] for key in ("cases", "summary", "settings")} == {
        key: before[key] for key in ("cases", "summary", "settings")
    }
    row = next(
        row
        for row in json.loads(cluster.segfleet("status", run.parents[1], "--json").stdout)
        if row["path"] == str(run)
    )
    assert row["state"] == "done" and row["job"] == scored["job"]
    assert (
        json.loads(cluster.segfleet("resume", tmp_path / "there", "--json").stdout)["state"]
        == "done"
    )


def test_a_prediction_goes_on_and_lists_what_cannot_be_segmented(straight, tmp_path):
    """The job of one rank, in this process: stopped after its first image, then done but for a file
    that is no image."""
    from segfleet.pipeline import jobs
    from segfleet.pipeline.ranks import Ranks
    from segfleet.pipeline.stop import Interrupted

    pictures = [tmp_path / f"picture{index}.png" for index in range(3)]
    for path in pictures:
        Image.fromarray(np.full((30, 40), 9, np.uint8)).save(path)
    pictures[1].write_bytes(b"no image")
    job = Predict(
        models=[straight(1, *SHORT)["stages"][-1]],
        images=list(map(str, pictures)),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(Interrupted, match="stopped after 1 of 3 images"):
        jobs.run_job(job, Ranks(), SimpleNamespace(asked=lambda: True))
    first = (tmp_path / "out" / "picture0.png").stat().st_mtime_ns
    with pytest.raises(
        InputError,
        match=r"1 image\(s\) could not be segmented; all others are\npicture1: .*picture1.png",
    ):
        jobs.run_job(job, Ranks(), SimpleNamespace(asked=lambda: False))
    assert (tmp_path / "out" / "picture0.png").stat().st_mtime_ns == first and (
        tmp_path / "out" / "picture2.png"
    ).exists()


def test_what_waits_is_neither_submitted_again_nor_left_behind(cluster, raw, tmp_path):
    words = (
        "--array",
        2,
        "--sbatch=--begin=now+1hour",
        "--",
        "preprocess",
        "msd",
        "--raw",
        raw,
        "--out",
        tmp_path / "store",
    )
    made = submitted(cluster, *words)
    assert set(states(cluster, tmp_path / "store").values()) == {("queued", 0)}
    again = cluster.segfleet("submit", *words, code=2).stderr
    assert (
        f"store is queued already as job {made['jobs'][0]['job']}" in again
        and "segfleet cancel" in again
    )
    assert (
        "give the same `segfleet submit"
        in cluster.segfleet("resume", tmp_path / "store", code=2).stderr
    )
    assert (
        len(json.loads(cluster.segfleet("cancel", tmp_path / "store", "--json").stdout)["jobs"])
        == 5
    )
    assert not cluster.call("squeue", "-h").strip()
    assert set(states(cluster, tmp_path / "store").values()) == {("cancelled", 0)}


def test_a_dry_run_prints_every_script_and_asks(cluster, raw, tmp_path):
    words = (
        "--array",
        3,
        "--throttle",
        2,
        "--cpus",
        2,
        "--dry-run",
        "--",
        "preprocess",
        "msd",
        "--raw",
        raw,
        "--out",
        tmp_path / "store",
    )
    document = submitted(cluster, *words)
    survey, write, publish = document["scripts"]
    for script, name in [(survey, "survey"), (write, "write"), (publish, "publish")]:
        assert (
            f"#SBATCH --job-name=segfleet-{name}-store" in script
            and "#SBATCH --cpus-per-task=2" in script
        )
        assert (
            "#SBATCH --ntasks-per-node=1" in script
            and "#SBATCH --requeue" in script
            and 'scontrol requeue "$job"' in script
        )
    assert (
        "#SBATCH --array=0-2%2" in survey
        and "#SBATCH --array=0-2%2" in write
        and "--array" not in publish
    )
    assert (
        "--dependency" not in survey and "--dependency='afterany:<segfleet-survey-store>'" in write
    )
    assert "--dependency='afterany:<segfleet-write-store>'" in publish
    assert sum("to start at" in line for line in document["controller"]) == 3
    assert not list(tmp_path.iterdir())


MISTAKES = [
    (["preprocess", "mds", "--raw", "RAW"], "found 'mds', expected one of"),
    (["preprocess", "msd", "--raw", "nowhere"], "raw: "),
    (["preprocess", "msd", "--raw", "RAW", "--format", "zip"], "zip"),
    (["preprocess", "msd", "--raw", "RAW", "--workers", "many"], "Invalid value for '--workers'"),
    (
        ["--partition", "gpus", "--", "preprocess", "msd", "--raw", "RAW"],
        "partition: found 'gpus'; expected one of: main, low, low0",
    ),
    (
        ["--nodes", "2", "--", "preprocess", "msd", "--raw", "RAW"],
        "--nodes: a job of preprocess is one process",
    ),
    (
        ["--array", "seed=1..3", "--", "preprocess", "msd", "--raw", "RAW"],
        "--array: found 'seed=1..3', expected the number of jobs",
    ),
    (["evaluate", "nothing"], "found no run 'nothing'"),
    (["evaluate", "nothing", "--ranks", "2"], "--ranks: a job has nodes x gpus-per-node ranks"),
    (["predict", "nothing", "RAW", "--out", "OUT"], "found no run 'nothing'"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES]
)
def test_a_mistake_is_refused_at_once(cluster, raw, tmp_path, words, message):
    before = cluster.jobs()
    named = [{"RAW": str(raw), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
    named = named if "--" in named else ["--", *named]
    named += ["--out", str(tmp_path / "out")] if "preprocess" in named else []
    done = cluster.segfleet("submit", *named, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert cluster.jobs() <= before and not list(tmp_path.iterdir())
