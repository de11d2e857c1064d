"""The front door: quick help, versions, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segfleet.cli import main
from segfleet.core.errors import DataError, InputError, Problem


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "segfleet.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


def test_help_is_quick_and_lists_every_command(cold):
    def used():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    costs = []
    for _ in range(3):
        before = used()
        done = run("--help")
        costs.append(used() - before)
    assert done.returncode == 0 and all(name in done.stdout for name in main.COMMANDS)
    assert min(costs) < 0.3, costs


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help_and_json(name):
    done = run(
        name, "--help", env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert done.returncode == 0 and "--json" in done.stdout, done.stderr


def test_version_and_mistakes():
    assert run("--version").stdout.strip().count(".") == 2
    for arguments in (
        ["nope"],
        ["train"],
        ["train", "x", "--ranks", "0"],
        ["models", "--no-such-option"],
    ):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, arguments


def test_exit_codes(capsys):
    assert main.exit_code(InputError("wrong key")) == 2
    assert "segfleet: wrong key" in capsys.readouterr().err
    assert (
        main.exit_code(
            DataError(
                "raw",
                [
                    Problem(
                        case="c1", field="label", found="none", expected="a file", mend="Add it."
                    )
                ],
            )
        )
        == 2
    )
    table = capsys.readouterr().err
    assert all(
        word in table
        for word in ("c1", "label", "none", "a file", "Add it.", "1 problem(s) in raw")
    )
    assert main.exit_code(OSError(28, "No space left on device", "/x/y")) == 2
    assert "no space left on the device at /x/y" in capsys.readouterr().err
    assert main.exit_code(PermissionError(13, "Permission denied", "/x")) == 2
    assert main.exit_code(KeyboardInterrupt()) == 75
    with pytest.raises(ZeroDivisionError):
        main.exit_code(ZeroDivisionError())


def test_a_path_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    """The system's own errors, as the commands meet them."""
    file = tmp_path / "afile"
    file.touch()
    attempts = ((file / "x" / "y").mkdir, file.mkdir, (file / "x.json").read_text)
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert main.exit_code(caught.value) == 2
        assert capsys.readouterr().err.startswith(
            f"segfleet: {file} is a file, expected a folder. Choose another folder"
        )
    assert main.exit_code(OSError(errno.EROFS, "Read-only file system", "/x")) == 2
    assert "/x: the file system can only be read" in capsys.readouterr().err
    with pytest.raises(FileExistsError) as ours:  # a folder that is there is no mistake of the user
        tmp_path.mkdir()
    with pytest.raises(FileExistsError):
        main.exit_code(ours.value)


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path):
    plugin = tmp_path / "lab"
    (plugin / "models").mkdir(parents=True)
    (plugin / "models" / "waits.py").write_text("import time\nprint('here')\ntime.sleep(60)\n")
    # A shell in the background starts its children with SIGINT ignored; a user's terminal does not.
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "segfleet.cli.main", "models", "--plugin", plugin],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "here\n"  # in the middle of its work, whatever the load
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 75
        and "interrupted. Run the same command again" in err
        and "Traceback" not in err
    )


def test_doctor_and_status(tmp_path):
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and found["packages"]["torch"]
        and found["cores"] >= 1
        and found["memory_gib"] > 0.5
    )
    exact = [row for row in found["convolutions"] if row["precision"] == "fp32"]
    assert len(exact) == 2 and all(row["right"] and row["ms"] > 0 for row in exact)
    assert json.loads(run("status", str(tmp_path), "--json").stdout) == []
    assert "no runs here" in run("status", str(tmp_path)).stdout


def test_recipe_command():
    shipped = json.loads(run("recipe", "--json").stdout)
    assert {"hippocampus", "dsb2018", "phantom2d", "phantom3d"} <= {
        row["name"] for row in shipped
    } and all(row["about"] for row in shipped)
    shown = json.loads(run("recipe", "hippocampus", "stages.0.lr=0.5", "--json").stdout)
    assert shown["stages"][0]["lr"] == 0.5 and shown["engine"]["accumulate"] == 1
    assert "properties" in json.loads(run("recipe", "--schema").stdout)
    assert run("recipe", "hippocampus", "seeed=1").returncode == 2


@pytest.mark.parametrize(
    "encoding, printed", [("utf-8", b"n\xffm"), ("ascii", b"n\\udcffm")], ids=["utf-8", "ascii"]
)
def test_a_path_that_is_no_text_is_printed(tmp_path, monkeypatch, encoding, printed):
    """What was done is not an error for its name."""
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.chdir(tmp_path)
    words = ["datasets", "msd", "phantom", os.fsdecode(b"n\xffm"), "--cases", "6"]
    monkeypatch.setattr(sys, "argv", ["segfleet", *words])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 0 and printed in out.buffer.getvalue()


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("json", [[], ["--json"]], ids=["for people", "json"])
@pytest.mark.parametrize("words", ["status", "recipe", "recipe nowhere", "train nowhere"])
def test_a_full_disk_under_stdout_is_one_line(tmp_path, words, json):
    with open(FULL, "w") as full:
        command = [sys.executable, "-m", "segfleet.cli.main", *words.split(), *json]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    if "nowhere" in words:
        assert "found no file 'nowhere'" in done.stderr
    else:
        assert done.stderr.startswith("segfleet: stdout: no space left on the device")


def test_a_ctrl_c_at_the_very_end_is_no_traceback():
    """While Python closes its log files and the like."""
    words = (
        "import atexit, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['segfleet', '--version']\n"
        "from segfleet.cli import main\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
