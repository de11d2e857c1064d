"""`segfleet preprocess` and `segfleet datasets`, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segfleet.preprocess.phantoms.phantom import PHANTOMS


def segfleet(*arguments, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that has to end with `code`."""
    command = [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=None)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("commands") / "raw"
    out, _ = segfleet("datasets", "msd", "phantom", root, "--cases", 3, "--json")
    assert json.loads(out)["root"] == str(root)
    return root


def test_layouts_are_listed():
    out, _ = segfleet("datasets", "--json")
    found = {layout["name"]: layout for layout in json.loads(out)}
    assert {"msd", "nnunet", "dsb2018"} <= set(found) and all(
        layout["about"] and layout["layout"] for layout in found.values()
    )
    text, _ = segfleet("datasets")
    recipes = {recipe for layout in found.values() for recipe in layout["recipes"]}
    assert len(recipes) > 10 and all(recipe in text for recipe in recipes if len(recipe) < 18), (
        "names are not folded at 80 columns"
    )
    assert max(map(len, text.splitlines())) <= 80


def test_preprocess_writes_then_finds_nothing_to_do(raw, tmp_path):
    store = tmp_path / "store"
    out, err = segfleet("preprocess", "msd", "--raw", raw, "--out", store, "--verify", "--json")
    first = json.loads(out)
    assert (
        first["status"] == "written"
        and first["verified"]
        and first["cases"] == 3
        and (store / "manifest.json").is_file()
    )
    assert "writing cases: 3/3" in err
    out, _ = segfleet("preprocess", "msd", "--raw", raw, "--out", store)
    assert "up to date" in out and first["id"] in out
    assert f"next: segfleet train auto data.store={store}" in out
    victim = max((p for p in store.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    _, err = segfleet("preprocess", "msd", "--raw", raw, "--out", store, "--verify", code=2)
    assert victim.name in err.replace("\n", "") or "problem(s)" in err


def test_problems_are_one_table_and_exit_code_two(raw, tmp_path):
    label = raw / "labelsTr/phantom_001.nii.gz"
    kept = label.read_bytes()
    label.unlink()
    try:
        out, err = segfleet("datasets", "msd", "check", raw, "--json", code=2)
        (problem,) = json.loads(out)["problems"]
        assert (problem["case"], problem["field"], problem["found"]) == (
            "phantom_001",
            "label",
            "no file",
        )
        _, err = segfleet("preprocess", "msd", "--raw", raw, "--out", tmp_path / "store", code=2)
        assert "1 problem(s) in" in err and "phantom_001" in err and not list(tmp_path.iterdir())
    finally:
        label.write_bytes(kept)
    out, _ = segfleet("datasets", "msd", "check", raw)
    assert "Phantom" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("datasets", "nope"), "expected one of the layouts: "),
        (
            ("datasets", "msd", "chekc", "x"),
            "found the action 'chekc', expected one of: check, phantom",
        ),
        (("datasets", "msd", "check"), "check needs a path"),
        (("datasets", "msd", "check", "/nowhere"), "/nowhere is not a folder"),
        (
            ("preprocess", "msd", "--raw", ".", "--out", "x", "--seed", "-1"),
            "Invalid value for '--seed'",
        ),
        (("datasets", "msd", "phantom", "x", "--seed", "-1"), "Invalid value for '--seed'"),
        (
            ("preprocess", "msd", "--raw", ".", "--out", "x", "--codec", "lz4"),
            "codec: found 'lz4', expected one of: blosc, zstd",
        ),
        (
            ("preprocess", "msd", "--raw", ".", "--out", "x", "--format", "zip"),
            "format: found 'zip', expected one of: hdf5, zarr",
        ),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    _, err = segfleet(*arguments, code=2)
    assert message in err


def test_preprocess_says_who_is_whose_patient(tmp_path):
    """On what evidence, and that a guess is one; so does a second run."""
    raw = PHANTOMS["nnunet"](tmp_path / "raw", cases=6)
    for path in sorted(raw.rglob("patient*")):
        name = re.sub(r"patient(\d+)_visit(\d)", lambda m: f"case{int(m[1])}_0{m[2]}", path.name)
        path.rename(path.with_name(name))
    for _ in range(2):
        out, err = segfleet("preprocess", "nnunet", "--raw", raw, "--out", tmp_path / "s")
        assert "names that end in a second number (6 cases are 3 patients" in " ".join(out.split())
        assert "1 warning(s)" in err and "patients.csv" in err
    out, _ = segfleet("preprocess", "nnunet", "--raw", raw, "--out", tmp_path / "s", "--json")
    found = json.loads(out)
    assert found["grouping"]["guess"] and found["warnings"][0]["field"] == "patients"
