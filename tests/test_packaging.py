"""The wheel holds every module and data file, and nothing that is not ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cli", "core", "models", "pipeline", "preprocess", "slurm", "sweeps")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tracked tree."""
    copy = tmp_path_factory.mktemp("tree") / "segfleet"
    copy.mkdir()
    for name in (*ROOMS, "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
    ]
    subprocess.run(
        [*command, str(copy / "out"), str(copy)], check=True, capture_output=True, timeout=200
    )
    return next((copy / "out").glob("*.whl"))


def test_wheel_holds_everything_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        f"segfleet/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    assert wanted <= names, sorted(wanted - names)
    data = {name for name in names if not name.endswith(".py")}
    assert (
        all(name.endswith((".yaml", ".cpp", "/sources.json")) for name in data)
        and "segfleet/pipeline/recipes/hippocampus.yaml" in data
    )
    assert {
        f"segfleet/{path.relative_to(ROOT)}"
        for path in (ROOT / "pipeline" / "recipes").glob("*.yaml")
    } <= data


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    modules = [
        ".".join(path.relative_to(tmp_path).with_suffix("").parts)
        for path in sorted((tmp_path / "segfleet").rglob("*.py"))
        if path.name
        # the latter needs triton, which a CPU install has no use for
        not in (
            "__init__.py",
            "triton_kernels.py",
        )
    ]
    code = (
        "import sys, importlib; sys.meta_path = [f for f in sys.meta_path if 'editable' not in "
        "repr(f)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"import segfleet.models.registry as r; assert r.__file__.startswith({str(tmp_path)!r}), "
        "r.__file__"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert done.returncode == 0, done.stderr
