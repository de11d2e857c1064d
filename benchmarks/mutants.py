"""Do the tests bite? Small faults are put into the code that decides results, one at a time, and
the tests of that code are run: a fault that no test notices is a survivor.

    python benchmarks/mutants.py [--per 40] [--seed 2026] [MODULE ...]

Each module gets up to `per` faults, drawn by seed from all that the rules below can make of it: a
comparison turned or moved by one, + for -, `and` for `or`, a number one larger, a truth value
turned, `min` for `max`, an order left out, a call left out whose value nobody uses. The faults are
made in a clone of the last commit. What came out goes to results/mutants.json, survivors with their
line; a module that was not named keeps what was found before.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "mutants.json"
ROOMS = ("core", "models", "preprocess", "pipeline", "slurm", "sweeps", "cli")
SUBJECTS = {  # module -> the tests that ought to notice
    "pipeline/data/sampler.py": ["pipeline/test_sampler.py", "pipeline/test_parts.py"],
    "pipeline/data/randomness.py": ["pipeline/test_sampler.py", "pipeline/test_loader.py"],
    "pipeline/checkpoint.py": ["pipeline/test_checkpoint.py", "pipeline/test_damaged_files.py"],
    "pipeline/run.py": ["pipeline/test_recipe.py", "pipeline/test_train.py"],
    "preprocess/stores/manifest.py": [
        "preprocess/test_stores.py",
        "preprocess/test_store_damage.py",
        "preprocess/test_build.py",
    ],
    "preprocess/stores/shard_writer.py": ["preprocess/test_shard_writer.py"],
    "preprocess/planning/plan.py": ["preprocess/test_plan.py"],
    "preprocess/planning/splits.py": ["preprocess/test_splits.py"],
    "preprocess/transforms/resample.py": ["preprocess/test_transforms.py"],
    "core/files.py": ["core/test_files.py"],
    "core/machine.py": ["core/test_machine.py", "preprocess/test_plan.py"],
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Add,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Every fault that can be made of one node, as a new node in its place."""
    new = copy.deepcopy(node)
    match node:
        case ast.Compare() if type(node.ops[0]) in COMPARISONS:
            new.ops[0] = COMPARISONS[type(node.ops[0])]()
            yield new
        case ast.BinOp() if type(node.op) in OPERATORS and not isinstance(node.left, ast.JoinedStr):
            new.op = OPERATORS[type(node.op)]()
            yield new
        case ast.BoolOp():
            new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield new
        case ast.UnaryOp(op=ast.Not()):
            yield new.operand
        case ast.Constant(value=bool()):
            new.value = not node.value
            yield new
        case ast.Constant(value=int() | float()):
            new.value = node.value + 1
            yield new
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            new.func.id = NAMES[name]
            if name != "sorted" or not node.keywords:
                yield new
        case ast.Expr(value=ast.Call()):
            yield ast.copy_location(ast.Pass(), node)


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every node in a place where a fault counts, as (parent, field, index): not in what is raised
    (words), in annotations or in decorators."""
    for parent in ast.walk(tree):
        if isinstance(parent, ast.keyword) and parent.arg in (
            "strict",
            "frozen",
            "kw_only",
            "indent",
        ):
            continue  # no result hangs on these
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "exc", "cause", "type_params"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    yield parent, field, index if isinstance(value, list) else None


def words_of_errors(tree: ast.AST) -> set[int]:
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise | ast.AnnAssign)
        for part in ([node.exc] if isinstance(node, ast.Raise) else [node.annotation])
        if part is not None
        for inner in ast.walk(part)
    }


def mutants(source: str) -> Iterator[tuple[str, int, str]]:
    """(source with one fault, line, "before -> after")."""
    tree = ast.parse(source)
    left_out = words_of_errors(tree)
    for parent, field, index in list(places(tree)):
        slot = getattr(parent, field)
        node = slot if index is None else slot[index]
        if id(node) in left_out:
            continue
        for new in changed(node):
            put(parent, field, index, new)
            change = f"{ast.unparse(node)[:90]} -> {ast.unparse(new)[:90]}"
            yield ast.unparse(ast.fix_missing_locations(tree)), node.lineno, change
            put(parent, field, index, node)


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def tested(clone: Path, tests: list[str], limit: float) -> bool:
    """Whether the tests pass in a fork of this process, which has the heavy packages already. One
    that hangs has noticed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(clone)
            quiet = os.open(clone / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            import pytest

            words = ["-x", "-q", "-p", "no:cacheprovider"]
            code = int(pytest.main([*words, *(f"tests/{name}" for name in tests)]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    until = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)


def examine(clone: Path, module: str, per: int, seed: int) -> dict:
    tests, path = SUBJECTS[module], clone / module
    source = path.read_text(encoding="utf-8")
    start = time.monotonic()
    if not tested(clone, tests, 600):
        sys.exit(f"{module}: its tests fail without any fault:\n{(clone / 'log').read_text()}")
    limit = 30 + 5 * (time.monotonic() - start)
    every = list(mutants(source))
    chosen = sorted(random.Random(seed).sample(range(len(every)), min(per, len(every))))
    survivors = []
    try:
        for number in chosen:
            faulty, line, change = every[number]
            path.write_text(faulty, encoding="utf-8")
            if tested(clone, tests, limit):
                survivors.append(f"{line}: {change}")
                print(f"{module}:{line} survived: {change}", flush=True)
    finally:
        path.write_text(source, encoding="utf-8")
    return {"possible": len(every), "tried": len(chosen), "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(SUBJECTS), metavar="MODULE")
    parser.add_argument("--per", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    done = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory(prefix="segfleet-mutants-") as folder:
        clone, package = Path(folder) / "clone", Path(folder) / "path" / "segfleet"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        package.mkdir(parents=True)
        for room in ROOMS:  # before what is installed, in this process and in those tests start
            (package / room).symlink_to(clone / room)
        os.environ["PYTHONPATH"] = str(package.parent)
        os.environ.setdefault("SEGFLEET_TEST_DATA", str(ROOT.parent / "shared" / "data"))
        os.environ |= {"SEGFLEET_DEVICE": "cpu", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path.insert(0, str(package.parent))
        for heavy in ("torch", "numpy", "scipy.ndimage", "h5py", "nibabel"):
            __import__(heavy)
        for module in given.modules:
            done[module] = examine(clone, module, given.per, given.seed) | {"seed": given.seed}
            RESULT.write_text(json.dumps(dict(sorted(done.items())), indent=1) + "\n")
            print(module, json.dumps(done[module], indent=1), flush=True)


if __name__ == "__main__":
    main()
