"""The rooms import only what the architecture allows, by their full names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cli", "core", "models", "pipeline", "preprocess", "slurm", "sweeps")
MAY_IMPORT = {
    "core": set(),
    "preprocess": {"core"},
    "models": set(),
    "pipeline": {"core", "preprocess", "models"},
    "slurm": {"core", "preprocess", "models", "pipeline"},
    "sweeps": {"core", "preprocess", "models", "pipeline", "slurm"},
    "cli": set(ROOMS),
}
HEAVY = {"deepspeed", "ray", "submitit", "mamba_ssm", "monai", "matplotlib", "triton"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level of the file) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, id(node) in top))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    room = path.relative_to(ROOT).parts[0]
    for module, at_top in imports(path):
        first, *rest = module.split(".")
        assert first not in ROOMS, f"'{module}' must be imported as segfleet.{module}"
        if first == "segfleet" and rest and rest[0] != room:
            assert rest[0] in MAY_IMPORT[room], f"{room} must not import {rest[0]}"
        if room in ("core", "preprocess"):
            assert first != "torch", f"no torch in {room}"
        if first in HEAVY:
            assert not at_top or first in (path.parent.name, path.stem.split("_")[0]), (
                f"{first} is imported where it is not needed"
            )


def test_tests_use_full_names():
    for path in (ROOT / "tests").rglob("*.py"):
        for module, _ in imports(path):
            assert module.split(".")[0] not in ROOMS, f"{path}: '{module}'"


def test_help_imports_nothing_heavy():
    code = "import sys; from segfleet.cli import main; main.app(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for module in ("torch", "numpy", "pydantic", "rich.console", "zarr"):
        assert f"'{module}'" not in out, f"--help imports {module}"
