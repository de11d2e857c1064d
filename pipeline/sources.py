"""The code that computes a stage, as a part of its identity.

What segfleet ships is stood for by `NUMERICS`, so that an update trains nothing again
unless results change. A file that differs from the shipped one, or is not ours, counts by its
source: comments, docstrings and formatting are left out. `make sources` writes the table of what
is shipped. No torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.core import plugins
from segfleet.core.files import write_atomically

# Raised whenever a change of the code changes what the same recipe computes.
NUMERICS = 3
HOME = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("sources.json")
# What every stage is computed by, besides its network and its loss.
ALWAYS = (
    "pipeline/data/augment.py",
    "pipeline/data/geometry.py",
    "pipeline/data/intensity.py",
    "pipeline/data/sampler.py",
    "pipeline/data/randomness.py",
    "pipeline/data/masking.py",
    "pipeline/losses/deep_supervision.py",
    "pipeline/losses/hidden_error.py",
    "pipeline/training/fused_norm.py",
    "pipeline/training/schedule.py",
    "pipeline/training/sync_norm.py",
    "pipeline/training/transfer.py",
    "pipeline/engines/common.py",
)
NETWORKS, LOSSES = "models", "pipeline/losses"
FOLLOWED = (f"{NETWORKS}/", "pipeline/losses/", "pipeline/data/", *ALWAYS)  # through imports


@functools.cache  # a process has read its code once
def changed_sources(network: str, loss: str) -> dict[str, str]:
    """File (relative to the package) -> hash of its source, of those that compute a stage with this
    network and loss and are not as shipped. Empty for what segfleet ships."""
    table = shipped()
    files = {*network_files(network, table["networks"]), *loss_files(loss), *ALWAYS}
    hashes = {name: source_hash(where(name)) for name in sorted(closure(files))}
    return {name: digest for name, digest in hashes.items() if table["files"].get(name) != digest}


def network_files(network: str, shipped_files: dict[str, str]) -> list[str]:
    """The file that registers a network. Of one that is not shipped: those that hold its name, or
    if none does (it is put together) all that are not shipped."""
    if network in shipped_files:
        return [shipped_files[network]]
    own = (str(path.relative_to(HOME)) for path in (HOME / NETWORKS).rglob("*.py"))
    foreign = sorted({*own, *plugins.files()} - set(shipped()["files"]))
    foreign = [name for name in foreign if name.startswith(f"{NETWORKS}/")]
    return [name for name in foreign if network in texts(where(name))] or foreign


def loss_files(loss: str) -> list[str]:
    """The file of a loss; of `auto`, those of both kinds of head."""
    names = ("dice_ce", "bce_dice") if loss == "auto" else (loss,)
    files = (f"{LOSSES}/{name}.py" for name in names)
    return [name for name in files if where(name).is_file()]


def where(name: str) -> Path:
    """The file of this name in the package: ours, else a plugin's."""
    path = HOME / name
    return path if path.exists() else plugins.files().get(name, path)


def closure(files: Iterable[str]) -> set[str]:
    """These files and what they import of ours, as far as it computes."""
    reached: set[str] = set()
    waiting = list(files)
    while waiting:
        name = waiting.pop()
        if name not in reached and where(name).is_file():
            reached.add(name)
            waiting += [other for other in imports(where(name)) if other.startswith(FOLLOWED)]
            waiting += [str(Path(name).with_name(text)) for text in _compiled(where(name))]
    return reached


def imports(path: Path) -> list[str]:
    """Files of ours that a file imports."""
    files = []
    for module in said(path).modules:
        package, *parts = module.split(".")
        if package == "segfleet" and parts:
            stem = "/".join(parts)
            files += [
                name for name in (f"{stem}.py", f"{stem}/__init__.py") if where(name).is_file()
            ]
    return files


def _compiled(path: Path) -> list[str]:
    """Names of the C++ files that a Python file names and that lie beside it."""
    return [
        text for text in texts(path) if text.endswith(".cpp") and path.with_name(text).is_file()
    ]


def texts(path: Path) -> frozenset[str]:
    return said(path).texts


def source_hash(path: Path) -> str:
    """16 hex digits of what a Python or C++ file says."""
    if path.suffix == ".cpp":
        code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(encoding="utf-8"), flags=re.S)
        return _digest(" ".join(code.split()))
    return said(path).digest


@dataclass(frozen=True)
class Said:
    """Of a Python file: names after `import`, constant texts, hash of what it says."""

    modules: frozenset[str]
    texts: frozenset[str]
    digest: str


def said(path: Path) -> Said:
    return _said(path.read_bytes())


@functools.cache  # reading a tree takes longer than reading the file
def _said(code: bytes) -> Said:
    try:
        tree = ast.parse(code)
    except SyntaxError:  # importing the file will report it
        tree = ast.Module(body=[], type_ignores=[])
    modules: set[str] = set()
    constants: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                constants.add(node.value)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    digest = _digest(json.dumps(_plain(tree)))
    return Said(frozenset(modules), frozenset(constants), digest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """A syntax tree as lists, the same in every version of Python: without positions, docstrings
    and what is empty."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return [type(node).__name__, repr(node)]
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields["body"] = fields["body"][ast.get_docstring(node, clean=False) is not None :]
    return [type(node).__name__] + [
        [name, _plain(value)]
        for name, value in fields.items()
        if value not in (None, []) and name not in ("kind", "type_comment", "ctx")
    ]


@functools.cache
def shipped() -> dict[str, Any]:
    """{"numerics", "files": file -> hash, "networks": name -> file} as of this version."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def computing() -> Iterator[str]:
    """Files of this package whose sources are part of an identity."""
    for folder in (NETWORKS, LOSSES):
        yield from (str(path.relative_to(HOME)) for path in (HOME / folder).rglob("*.py"))
    yield from ALWAYS


def table() -> dict[str, Any]:
    """The table as it should be for the code as it is. Imports every network."""
    from segfleet.models.registry import specs

    networks = {}
    for name, spec in specs().items():
        build = spec.build
        while isinstance(build, functools.partial):
            build = build.func
        stem = build.__module__.removeprefix("segfleet.").replace(".", "/")
        networks[name] = f"{stem}.py" if (HOME / f"{stem}.py").is_file() else f"{stem}/__init__.py"
    files = {name: source_hash(HOME / name) for name in sorted(closure(computing()))}
    return {"numerics": NUMERICS, "files": files, "networks": networks}


def main() -> int:
    """Write the table; refuses changed sources under an old `NUMERICS` unless it is said that
    results are the same."""
    current = table()
    before = shipped() if TABLE.exists() else {"numerics": None, "files": {}}
    changed = sorted(
        name
        for name in before["files"]
        if name in current["files"] and current["files"][name] != before["files"][name]
    )
    if (
        changed
        and current["numerics"] == before["numerics"]
        and "--same-results" not in sys.argv[1:]
    ):
        sys.stderr.write(
            f"changed since NUMERICS {before['numerics']}: {', '.join(changed)}\nIf any recipe now "
            "computes something else, raise NUMERICS in pipeline/sources.py and run this again; if "
            "not, run `make sources SAME=1`\n"
        )
        return 1
    write_atomically(TABLE, json.dumps(current, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
