"""Files of a run as somebody may have written them, valid and without their hash: commands that
read them answer, or say in one message what is wrong. With damage of every kind and all commands:
benchmarks/damage.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest

from segfleet.cli import main
from tests.crafted import changed

CRAFTS = ("list", "deep", "texts", "numbers", "nulls", "huge")
SECONDS = 20  # of a command that waits for nobody
FILES = (
    "checkpoints/*/manifest.json", "checkpoints/*/state.json", "data.json", "done.json",
    "evaluation.json", "events.jsonl", "identity.json", "overlays/index.json", "recipe.json",
)  # fmt: skip


def crafted(data: bytes, how: str) -> bytes:
    if how == "list":
        return b"[1, 2]\n"
    if how == "deep":
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    return b"\n".join(
        json.dumps(changed(json.loads(line), how)).encode()
        for line in (data.splitlines() if data.count(b"\n{") else [data])
    )


@pytest.fixture
def fault(monkeypatch, capsys):
    """`fault(*words)`: what a command raised, or said with another exit code than 0 and 2; None if
    it ended well or with a message."""

    def run(*words: str) -> str | None:
        monkeypatch.setattr(sys, "argv", ["segfleet", *words])
        try:
            main.main()
        except SystemExit as end:
            said = capsys.readouterr().err
            fine = end.code == 0 or (end.code == 2 and said.strip())
            return None if fine and "Traceback" not in said else f"{end.code}: {said}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} at {last.filename}:{last.lineno}"

    return run


@pytest.mark.parametrize("how", CRAFTS)
def test_one_message_at_most(two_folds, fault, tmp_path, how):
    runs = tmp_path / "runs"
    shutil.copytree(two_folds / "runs", runs)
    run, other = sorted(path.parent for path in runs.glob("*/recipe.json"))
    faults = []
    for pattern in FILES:
        (path,) = run.glob(pattern)
        data = path.read_bytes()
        path.write_bytes(crafted(data, how))
        for words in (
            ["status", str(runs)],
            ["report", str(run), "--csv"],
            ["compare", str(run), str(other)],
            ["export", "model", str(run), "--to", str(tmp_path / "new.segfleet")],
        ):
            faults.append((path.name, words[0], fault(*words)))
            Path(tmp_path / "new.segfleet").unlink(missing_ok=True)
        path.write_bytes(data)
    assert [found for found in faults if found[2]] == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself"])
def test_what_is_no_file_is_not_waited_for(two_folds, fault, tmp_path, kind):
    """In a folder of runs that others may write to."""

    def late(*_):
        raise TimeoutError("it waits")

    runs = tmp_path / "runs"
    shutil.copytree(two_folds / "runs", runs)
    run, other = sorted(path.parent for path in runs.glob("*/recipe.json"))
    faults, before = [], signal.signal(signal.SIGALRM, late)
    for pattern in (*FILES, "lock", "checkpoints/*/weights.safetensors"):
        (path,) = run.glob(pattern)
        path.rename(tmp_path / "kept")
        make = {"pipe": os.mkfifo, "folder": os.mkdir, "link to itself": lambda p: os.symlink(p, p)}
        make[kind](path)
        for words in (
            ["status", str(runs)],
            ["report", str(run), "--csv"],
            ["compare", str(run), str(other)],
            ["evaluate", str(run)],
            ["export", "model", str(run), "--to", str(tmp_path / "new.segfleet")],
        ):
            signal.alarm(SECONDS)
            faults.append((path.name, words[0], fault(*words)))
            signal.alarm(0)
            (tmp_path / "new.segfleet").unlink(missing_ok=True)
        if not path.is_symlink() and path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        (tmp_path / "kept").rename(path)
    signal.signal(signal.SIGALRM, before)
    assert [found for found in faults if found[2]] == []
