"""The wheel holds every module and data file, and nothing that is not ours; it runs without the
checkout; its requirements can be met."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cli", "core", "models", "pipeline", "preprocess", "slurm", "sweeps")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git tracks and a build reads."""
    copy = tmp_path_factory.mktemp("tree") / "segfleet"
    copy.mkdir()
    for name in (
        *ROOMS,
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "constraints.txt",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def build_wheel(source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)],
        check=True,
        capture_output=True,
        timeout=200,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


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
        all(
            name.endswith((".yaml", ".cpp", "/sources.json")) or "/templates/" in name
            for name in data
        )
        and "segfleet/pipeline/recipes/hippocampus.yaml" in data
    )
    assert {
        f"segfleet/{path.relative_to(ROOT)}"
        for files in ("pipeline/recipes/*.yaml", "*/re*/templates/*")
        for path in ROOT.glob(files)
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


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, tree):
    """The source archive, built from the tracked tree."""
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tree, check=True, capture_output=True, timeout=200
    )
    return next(out.glob("*.tar.gz"))


def test_the_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build_wheel(source, tmp_path / "out")
    names, others = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, again))
    assert names == others


@pytest.mark.slow
def test_the_wheel_alone_trains(wheel, tmp_path):
    """Without the checkout: help, a recipe, a phantom, a training, all from the unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "sys.path_hooks = [h for h in sys.path_hooks if 'editable' not in repr(h)]\n"
    )
    where = "import segfleet.models.registry as r; print(r.__file__)"
    program = [sys.executable, "-m", "segfleet.cli.main"]

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    if not run(sys.executable, "-c", where).startswith(str(tmp_path)):
        pytest.skip("the editable installation cannot be put aside in this environment")
    assert "submit" in run(*program, "--help")
    assert "phantom2d" in run(*program, "recipe")
    assert "rec_unet" in run(*program, "models", "rec_unet")
    run(*program, "datasets", "dsb2018", "phantom", "raw")
    run(*program, "preprocess", "dsb2018", "--raw", "raw", "--out", "store")
    less = ["stages.0.epochs=1", "stages.0.steps=2", "data.store=store"]
    assert "report" in run(*program, "train", "phantom2d", *less)


def interpreter(version: str) -> str:
    """A Python of this version on PATH or under pyenv; the test is skipped without one."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in (*versions.glob(f"{version}.*/bin/python"), shutil.which(f"python{version}")):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    pytest.skip(f"no Python {version} here")


def documented(pattern: str) -> list[str]:
    """The words after `pip install` of the first line of docs/install.md that matches."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    return shlex.split(re.search(rf"^pip install ({pattern})$", page, flags=re.M)[1])


UNREACHABLE = re.compile(r"connection broken by|Could not fetch URL|timed out")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("build", ["CUDA", "CPU"])
def test_the_documented_install_resolves(python, build, tmp_path):
    """With pip's defaults alone, as on any user's machine: both commands in one resolution, since a
    dry run leaves nothing behind for the second."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if build == "CUDA":
        torch = documented(r"torch==\S+")
    else:
        name, _, index = documented(r"torch==\S+ --index-url \S+")
        torch = [f"{name}+cpu", "--extra-index-url", index]
    report = tmp_path / "report.json"
    command = [interpreter(python), "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--retries", "1", "--timeout", "30", "--report", str(report), *torch]
    done = subprocess.run(
        [*command, *documented(r"-c constraints.txt -e \.")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if build == "CPU" and done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"PyTorch's CPU index is not reachable: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    chosen = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {item["metadata"]["name"].lower() for item in chosen}
    assert {"segfleet", "torch", "deepspeed", "ray"} <= names
    assert any(name.startswith("nvidia-") for name in names) == (build == "CUDA")
    archives = {
        item["metadata"]["name"].lower()
        for item in chosen
        if not item["download_info"]["url"].endswith(".whl")
    }
    assert archives <= {"segfleet", "deepspeed"}  # nothing else to build, no compiler needed


def test_nothing_is_pinned_that_torch_decides():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.M)
    decided = [
        name
        for name in pins
        if re.match(r"(torch|triton|sympy|nvidia-.*|cuda-.*|pytorch-triton.*)$", name.lower())
    ]
    assert not decided


def test_containers_copy_and_install_what_is_there():
    """No engine is needed to see that the recipes name files and options that exist."""
    for name in ("Containerfile", "segfleet.def"):
        text = (ROOT / name).read_text(encoding="utf-8")
        torch = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
        assert torch in text and "-c constraints.txt ." in text
        version = tuple(map(int, re.search(r"python:(\d+)\.(\d+)-slim", text).groups()))
        assert version >= (3, 11)
