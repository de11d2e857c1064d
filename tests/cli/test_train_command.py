"""`segfleet train` as a user meets it: two real ranks, signals, kills, mistakes, a second run."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from segfleet.core.files import unstamped
from segfleet.preprocess.stores.manifest import load_manifest

STAGES = [
    {"name": "base", "epochs": 2, "steps": 30, "lr": 1e-2},
    {"name": "tune", "epochs": 1, "steps": 10, "lr": 1e-3, "inherit": "weights+optimizer"},
]


# No batch normalisation: two ranks on few cores talk long about it. That it comes back to the bit
# prove test_ranks_resume.py and test_sync_norm.py of tests/pipeline.
MODEL = {"name": "plain_unet_2d", "options": {"features": [4, 8]}}


@pytest.fixture(scope="module")
def work(tiny_recipe):
    """A folder with a recipe for a tiny network on a tiny store."""
    return tiny_recipe(STAGES, batch=4, model=MODEL)


def segfleet(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def train(work, runs, *changes):
    return segfleet(
        "train", "tiny.yaml", *changes, "--ranks", 2, "--runs", runs, "--json", cwd=work
    )


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    done = json.loads((folder / "done.json").read_text())
    return load_file(folder / "checkpoints" / done["checkpoint"] / "weights.safetensors")


def events(folder: Path, kind: str) -> list[dict]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def wait_for_step(work, runs, step, process, timeout=150):
    """Wait until some stage has logged `step`; the stage's folder."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        for path in (work / runs).rglob("events.jsonl"):
            if any(event["step"] >= step for event in events(path.parent, "step")):
                return path.parent
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {finished(process)}")


@pytest.fixture(scope="module")
def straight(work):
    """The run nobody disturbed: its JSON document."""
    code, out, err = finished(train(work, "straight"))
    assert code == 0, err
    return json.loads(out)


def assert_same_result(document, straight):
    for ours, theirs in zip(document["stages"], straight["stages"], strict=True):
        first, second = final_weights(Path(ours)), final_weights(Path(theirs))
        assert first.keys() == second.keys() and all(
            torch.equal(first[name], second[name]) for name in first
        )
    assert document["mean_foreground_dice"] == straight["mean_foreground_dice"]


def test_one_command_gives_weights_scores_and_a_report(straight):
    leaf = Path(straight["run"])
    assert Path(straight["report"]).read_text().startswith("<!doctype html>")
    scores = json.loads((leaf / "evaluation.json").read_text())
    assert (
        len(scores["cases"]) == 2
        and scores["summary"]["mean_foreground_dice"] == straight["mean_foreground_dice"]
    )
    assert [Path(stage).name for stage in straight["stages"]] == list(leaf.parts[-2:])
    assert not (leaf / "scoring.json").exists()
    os.umask(mask := os.umask(0))
    made = [path for path in leaf.parents[1].rglob("*") if path.is_file()]
    modes = {path: path.stat().st_mode & 0o666 for path in made}
    assert modes == dict.fromkeys(made, 0o666 & ~mask), "libraries make weights 0600"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_as_the_null_device(work, closed):
    """As some schedulers start commands."""
    words = ["train", "tiny.yaml", "stages.0.epochs=1", "stages.0.steps=2", "stages.1.steps=1"]
    command = [sys.executable, "-m", "segfleet.cli.main", *words, "seed=9", "--runs", "closed"]
    script = f'exec "$@" {closed}'
    done = subprocess.run(["sh", "-c", script, "sh", *command], cwd=work, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    assert len(list((work / "closed").rglob("done.json"))) == 2
    shutil.rmtree(work / "closed")


def test_a_second_run_does_nothing(work, straight):
    before = {
        path: path.stat().st_mtime_ns
        for path in Path(straight["stages"][0]).rglob("*")
        if path.suffix in (".safetensors", ".jsonl")
    }
    code, out, _ = finished(train(work, "straight"))
    assert code == 0 and json.loads(out) == straight
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_trained_network_does_not_need_its_training_data(work, straight, tmp_path):
    root, leaf = Path(straight["stages"][0]), Path(straight["run"])
    shutil.copytree(root, tmp_path / "elsewhere" / root.name)
    copied = tmp_path / "elsewhere" / leaf.relative_to(root.parent)
    recipe = unstamped(json.loads((copied / "recipe.json").read_text()))
    store, recipe["data"]["store"] = recipe["data"]["store"], str(tmp_path / "gone")
    (copied / "recipe.json").write_text(json.dumps(recipe))
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    channels = len(load_manifest(Path(store)).dataset.channels)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(image)
    made = []
    for run in (leaf, copied):
        words = ("predict", run, image, "--out", tmp_path / f"out{len(made)}", "--json")
        code, out, err = finished(segfleet(*words, cwd=tmp_path))
        assert code == 0, err
        made.append(Path(json.loads(out)["done"][0]["file"]).read_bytes())
    assert made[0] == made[1]
    words = ("export", "model", copied, "--to", tmp_path / "m.segfleet")
    code, _, err = finished(segfleet(*words, cwd=tmp_path))
    assert code == 0 and (tmp_path / "m.segfleet").is_file(), err
    (copied / "data.json").unlink()
    words = ("predict", copied, image, "--out", tmp_path / "none")
    code, _, err = finished(segfleet(*words, cwd=tmp_path))
    assert code == 2 and "data.store=FOLDER" in err and "Traceback" not in err


def test_a_file_of_the_working_folder_never_stands_in_for_a_module(work, straight, tmp_path, cold):
    (tmp_path / "random.py").write_text("raise RuntimeError('a script of my own')")
    command = [sys.executable, "-P", "-m", "segfleet.cli.main", "train", work / "tiny.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), "--runs", str(work / "straight"), "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == straight["run"]


def test_ctrl_c_loses_nothing(work, straight):
    """SIGTERM: tests/pipeline/test_ranks_resume.py, and the next test."""
    runs = "interrupted"
    process = train(work, runs)
    wait_for_step(work, runs, 10, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert (
        code == 75 and "all saved. Run the same command again" in err and "Traceback" not in err
    ), err
    # ranks agree within a tenth of a second or so, maybe in the next stage
    folders = [path.parent for path in (work / runs).rglob("events.jsonl")]
    folder = next(folder for folder in folders if events(folder, "stopped"))
    at = events(folder, "stopped")[-1]["at_step"]
    code, out, err = finished(train(work, runs))
    assert code == 0, err
    assert [event["from_step"] for event in events(folder, "resumed")] == [at]
    assert_same_result(json.loads(out), straight)


def assert_saved(folder):
    """An agreed stop lost no step."""
    at = events(folder, "stopped")[-1]["at_step"]
    assert max(event["step"] for event in events(folder, "step")) == at
    assert max(path.name for path in (folder / "checkpoints").iterdir()) == f"step-{at:08d}"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_other_signals_to_the_command_lose_nothing_either(work, number):
    runs = f"other{number}"
    process = segfleet("train", "tiny.yaml", "stages.0.epochs=50", "--runs", runs, cwd=work)
    folder = wait_for_step(work, runs, 10, process)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # only a second Ctrl-C means at once
    code, _, err = finished(process)
    assert code == 75 and "all saved" in err and "Traceback" not in err, err
    assert_saved(folder)


def test_a_closed_terminal_loses_nothing(work):
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.chdir(work)
        os.environ["OMP_NUM_THREADS"] = "1"
        command = [
            "-m",
            "segfleet.cli.main",
            "train",
            "tiny.yaml",
            "stages.0.epochs=50",
            "--runs",
            "closed",
        ]
        os.execv(sys.executable, [sys.executable, *command])
    os.set_blocking(terminal, False)
    deadline, begun = time.monotonic() + 150, []
    while not begun:
        assert time.monotonic() < deadline
        with suppress(BlockingIOError):
            os.read(terminal, 100_000)
        begun = [
            path.parent
            for path in (work / "closed").rglob("events.jsonl")
            if events(path.parent, "step")
        ]
        time.sleep(0.02)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert_saved(begun[0])


def test_a_run_under_nohup_does_not_hear_that_the_terminal_is_closed(work):
    command = [
        sys.executable,
        "-m",
        "segfleet.cli.main",
        "train",
        "tiny.yaml",
        "stages.0.epochs=1",
        "--runs",
        "nohup",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["nohup", *command],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(work, "nohup", 5, process)
    process.send_signal(signal.SIGHUP)
    assert finished(process)[0] == 0


def test_jobs_of_a_cluster_wait_for_the_stage_they_share(work, monkeypatch):
    """What members of an array do: the one that comes second waits, is stopped and comes again, and
    goes on from the shared stage."""

    def start(rate, ranks):
        return segfleet(
            "train",
            "tiny.yaml",
            f"stages.1.lr={rate}",
            "--ranks",
            ranks,
            "--runs",
            "shared",
            "--json",
            cwd=work,
        )

    def heard(process):
        while "waiting for it" not in (line := process.stderr.readline()):
            assert line, process.wait()
        return line

    first = start(1e-3, 1)
    folder = wait_for_step(work, "shared", 5, first)
    rank = next(
        child
        for child in psutil.Process(first.pid).children()
        if "segfleet.pipeline.launch.worker" in child.cmdline()
    )
    rank.suspend()
    assert first.poll() is None and not (folder / "done.json").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    second = start(1e-4, 2)
    assert f"{folder} is in use by process {rank.pid}" in heard(second)
    second.send_signal(signal.SIGTERM)
    code, _, err = finished(second)
    assert (
        code == 75 and "stopped while waiting for stage 1" in err and "waiting for it" not in err
    ), err
    second = start(1e-4, 1)
    heard(second)
    rank.resume()
    documents = [json.loads(out) for code, out, err in map(finished, (first, second)) if code == 0]
    assert len(documents) == 2 and documents[0]["stages"][0] == documents[1]["stages"][0] == str(
        folder
    )
    assert len(events(folder, "stage_start")) == 1 and not events(folder, "resumed")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_other_down_and_the_run_goes_on_exactly(work, straight, victim):
    runs = f"killed{victim}"
    process = train(work, runs)
    folder = wait_for_step(work, runs, 10, process)
    ranks = [
        child
        for child in psutil.Process(process.pid).children()
        if "segfleet.pipeline.launch.worker" in child.cmdline()
    ]
    assert len(ranks) == 2
    ranks[victim].kill()
    killed = time.monotonic()
    code, _, err = finished(process)
    assert code == 1 and time.monotonic() - killed < 60
    assert f"rank {victim} was killed by SIGKILL" in err and "Traceback" not in err, err
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    reached = max(event["step"] for event in events(folder, "step"))
    code, out, err = finished(train(work, runs))
    assert code == 0, err
    # the interval, and the save that was being written
    assert reached - events(folder, "resumed")[0]["from_step"] <= 2 * 5
    assert_same_result(json.loads(out), straight)


def listens(rank: psutil.Process) -> bool:
    """Whether it has begun and has a handler of its own for SIGTERM."""
    with suppress(OSError, psutil.Error):
        if "segfleet.pipeline.launch.worker" not in rank.cmdline():
            return False
        status = Path(f"/proc/{rank.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)
    return False


def test_a_signal_before_the_first_step_is_an_ordinary_stop(work, cold):
    process = train(work, "early")
    while process.poll() is None and sum(map(listens, psutil.Process(process.pid).children())) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # the ranks are importing
    code, out, err = finished(process)
    assert code == 75 and "Traceback" not in err, err
    assert json.loads(out)["exit_code"] == 75


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_nothing_is_lost(work, straight, small_disk):
    runs = small_disk / "runs"
    code, _, err = finished(train(work, runs))
    assert code == 2 and "no space left on the device" in err and "Traceback" not in err, err
    assert not list(runs.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    code, out, err = finished(train(work, runs))
    assert code == 0, err
    resumed = [
        event["from_step"]
        for path in runs.rglob("events.jsonl")
        for event in events(path.parent, "resumed")
    ]
    assert all(step > 0 for step in resumed)
    assert_same_result(json.loads(out), straight)


def test_no_rank_outlives_a_killed_launcher(work):
    process = train(work, "orphans")
    wait_for_step(work, "orphans", 5, process)
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive or all(rank.status() == psutil.STATUS_ZOMBIE for rank in alive)


MISTAKES = [
    (["nope"], "no file 'nope' and no shipped recipe of that name"),
    (
        ["tiny.yaml", "data.bach=2"],
        "data.bach: unknown key; expected one of: made_for, store, stores, split, fold, patch, "
        "batch",
    ),
    (["tiny.yaml", "data.store=nowhere"], "nowhere holds no manifest.json"),
    (["tiny.yaml", "model.name=unit"], "model.name: found 'unit', expected one of: "),
    (
        ["tiny.yaml", "model.options.wide=3"],
        "'wide' is no option of plain_unet_2d; expected one of: ",
    ),
    (["tiny.yaml", "data.fold=9"], "data.fold: found 9, expected 0 to 0"),
    (["tiny.yaml", "loss.name=dce"], "loss.name: found 'dce', expected one of: bce_dice, dice_ce"),
    (["tiny.yaml", "engine.name=horovod"], "engine.name: found 'horovod', expected one of: ddp"),
    (["tiny.yaml", "--max-time", "0"], "--max-time: found 0, expected more than 0 hours"),
    (["tiny.yaml", "data.batch=3", "--ranks", "2"], "data.batch: found 3, which 2 rank(s)"),
    (
        ["tiny.yaml", "model.name=resenc_unet_3d", "data.patch=[16,16]"],
        "resenc_unet_3d is a 3D network",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=lambda value: value[-1] if isinstance(value, list) else ""
)
def test_a_mistake_gets_one_message(work, tmp_path, arguments, words):
    code, out, err = finished(segfleet("train", *arguments, "--runs", tmp_path / "runs", cwd=work))
    assert code == 2, err
    assert words in err and "Traceback" not in err and out == ""
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_fault_of_ours_shows_the_failing_ranks_traceback(work, tmp_path):
    """A rank that breaks inside the code: its own traceback, exit code 1."""
    sabotage = tmp_path / "sitecustomize.py"
    sabotage.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from segfleet.pipeline.data import sampler\n"
        "    def draw(*_): raise RuntimeError('broken on purpose')\n"
        "    sampler.PatchSampler.draw = draw\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "segfleet.cli.main",
            "train",
            "tiny.yaml",
            "--ranks",
            "2",
            "--runs",
            str(tmp_path / "runs"),
        ],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert (
        "rank 1 failed" in done.stderr
        and "broken on purpose" in done.stderr
        and "in draw" in done.stderr
    )


TWO_CHANNELS = "model={name: rec_unet, options: {widths: [16, 16, 16, 16, 16]}}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["stages.1.inherit={head: map, classes: {blob1: liver}}"],
            "inherit.classes: found 'blob1: liver', but 'liver' is none of the classes",
        ),
        (["stages.1.inherit.weights=[enkoder]"], "no parameter name of .* begins with 'enkoder'"),
        ([TWO_CHANNELS, "data.patch=[32,32]"], "2 input channels have no middle slice"),
        (
            ["stages.0.task=reconstruct", "stages.0.data.mask.block=64"],
            "data.mask.block: found 64 voxels, but the patch is",
        ),
    ],
    ids=["classes", "encoder", "channels", "mask"],
)
def test_what_cannot_be_taken_over_is_one_message(work, tiny_store, tmp_path, changes, words):
    """Of classes that the target lacks, an encoder that is none, channels that no first layer can
    be made for, and masks larger than the patch."""
    if "rec_unet" in changes[0]:
        changes = [*changes, f"stages.1.data.store={tiny_store(dims=2, channels=2)}"]
    code, out, err = finished(train(work, tmp_path / "runs", *changes))
    assert code == 2 and "Traceback" not in err and not (tmp_path / "runs").exists()
    said = json.loads(out)["error"]  # the only document
    assert re.search(words, said) and "\n" not in said.strip(), said
