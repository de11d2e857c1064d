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
# Wings inside a room, lowest first; one may import those before it. Files of no wing are
# everybody's.
WINGS = {
    "preprocess": [
        "stores",
        "files",
        "transforms",
        "planning",
        "readers",
        "checking",
        "building",
        "exporting",
        "phantoms",
    ],
    "pipeline": [
        "devices",
        "losses",
        "data",
        "engines",
        "inference",
        "scoring",
        "reports",
        "training",
        "trained",
        "exporting",
        "planning",
        "launch",
    ],
    "sweeps": ["space", "results", "search", "ray"],
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


@pytest.mark.parametrize("room", WINGS)
def test_arrows_between_wings(room):
    order = WINGS[room]
    folders = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
    assert folders == set(order), "a wing without a place in the order"
    for path in FILES:
        own = path.relative_to(ROOT).parts
        if own[0] != room or len(own) < 3:
            continue
        for module, _ in imports(path):
            other = module.split(".")[1:]
            if other[:1] == [room] and len(other) > 1 and other[1] in order:
                assert order.index(other[1]) <= order.index(own[1]), (
                    f"{'/'.join(own)} must not import {module}: {own[1]} lies below {other[1]}"
                )


def test_no_module_imports_in_a_circle():
    known = {
        "segfleet." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES
    }
    waiting = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        needs = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in guarded:
                needs |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import) and id(node) not in guarded:
                needs |= {alias.name for alias in node.names}
        waiting[name] = (needs & known.keys()) - {name}
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        for name in free:
            del waiting[name]
    assert not waiting, f"these import each other, or wait for such: {sorted(waiting)}"


def test_tests_use_full_names():
    for path in (ROOT / "tests").rglob("*.py"):
        for module, _ in imports(path):
            assert module.split(".")[0] not in ROOMS, f"{path}: '{module}'"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from segfleet.cli import main; main.app(['--help'], standalone_mode=False); "
        "print(sorted(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for module in ("torch", "numpy", "pydantic", "rich.console", "zarr"):
        assert f"'{module}'" not in out, f"--help imports {module}"


def test_digits_are_those_that_int_takes():
    """ "²".isdigit() is true, and int("²") an error."""
    found = [path for path in FILES if ".isdigit()" in path.read_text(encoding="utf-8")]
    assert not found, f"isdecimal() says what int() takes: {found}"
