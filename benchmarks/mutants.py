"""Do the tests bite? Small faults are put into the code that decides results, one at a time, and
the tests of that code are run: a fault that no test notices is a survivor.

    python benchmarks/mutants.py [--per 40] [--seed 2026] [--again] [--named] [MODULE ...]

Each module gets up to `per` faults, drawn by seed from all that the rules below can make of it: a
comparison turned or moved by one, + for -, `and` for `or`, a number one larger, a truth value
turned, `min` for `max`, an order left out, a call left out whose value nobody uses. The faults are
made in a clone of the last commit. What came out goes to results/mutants.json, survivors with their
line, and apart from them those that change nothing that anybody could see, with the reason
(`EQUIVALENT`); a module that was not named keeps what was found before.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import fcntl
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "mutants.json"
ROOMS = ("core", "models", "preprocess", "pipeline", "slurm", "sweeps", "cli")
SUBJECTS = {  # module -> the tests that ought to notice
    # sampling
    "pipeline/data/sampler.py": ["pipeline/test_sampler.py", "pipeline/test_several_stores.py"],
    "pipeline/data/randomness.py": ["pipeline/test_sampler.py"],
    # checkpoint
    "pipeline/checkpoint.py": [
        "pipeline/test_checkpoint.py",
        "pipeline/test_power_cut.py",
        "pipeline/test_damaged_files.py",
    ],
    # manifest
    "preprocess/stores/manifest.py": [
        "preprocess/test_case_table.py",
        "preprocess/test_store_damage.py",
        "preprocess/test_store_states.py",
    ],
    "preprocess/stores/case_entry.py": ["preprocess/test_case_table.py"],
    "preprocess/stores/case_table.py": ["preprocess/test_case_table.py"],
    "preprocess/stores/shard_writer.py": ["preprocess/test_shard_writer.py"],
    # planning
    "preprocess/planning/plan.py": ["preprocess/test_plan.py", "preprocess/test_overrides.py"],
    "preprocess/planning/splits.py": [
        "preprocess/test_splits.py",
        "preprocess/test_reader_quirks.py",
    ],
    "preprocess/transforms/resample.py": ["preprocess/test_transforms.py"],
    **{
        f"pipeline/planning/{name}.py": ["pipeline/test_planning.py", "cli/test_plan.py"]
        for name in ("choices", "cpu", "gpu", "planned", "target", "timing")
    },
    # identity
    **dict.fromkeys(
        ("pipeline/identity.py", "pipeline/stage_data.py", "pipeline/run.py"),
        [
            "pipeline/test_stage_settings.py",
            "pipeline/test_recipe.py",
            "pipeline/test_sources.py",
            "pipeline/test_damaged_files.py",
            "pipeline/test_finetuning.py",
            "pipeline/test_weights.py",
            "pipeline/test_reconstruct.py",
            "pipeline/test_several_stores.py",
            "pipeline/test_run.py",
        ],
    ),
    **dict.fromkeys(
        ("pipeline/recipe.py", "pipeline/stage.py"),
        [
            "pipeline/test_recipe.py",
            "pipeline/test_stage_settings.py",
            "pipeline/test_finetuning.py",
            "pipeline/test_weights.py",
        ],
    ),
    "pipeline/sources.py": ["pipeline/test_sources.py"],
    "pipeline/devices/numerics.py": ["pipeline/test_numerics.py"],
    # what all stand on
    "core/files.py": ["core/test_files.py"],
    "core/machine.py": ["core/test_machine.py", "preprocess/test_plan.py"],
}
# What is imported once for all faults of a module: pytest's own plugins want to be the first.
BEFOREHAND = (
    *("segfleet", "torch", "numpy", "scipy", "h5py", "zarr", "numcodecs", "nibabel", "SimpleITK"),
    *("pydantic", "safetensors", "PIL", "tifffile", "imagecodecs", "ruamel", "yaml", "typer"),
    *("rich", "jinja2", "psutil", "filelock", "einops", "surface_distance", "pydicom"),
)
# module -> {(line as it stands, fault): why it is none}
EQUIVALENT: dict[str, dict[tuple[str, str], str]] = {
    "pipeline/checkpoint.py": {
        (
            "for path in sorted(partial.iterdir()):",
            "sorted(partial.iterdir()) -> list(partial.iterdir())",
        ): "files are looked up in the manifest by name; their order there is for people",
    },
    "pipeline/data/randomness.py": {
        (
            "@functools.lru_cache(maxsize=32)",
            "32 -> 33",
        ): "how much is remembered changes no answer",
    },
    "preprocess/stores/manifest.py": {
        (
            "layout: int = 0  # revision of the shard files; 0: becomes the format's present one",
            "0 -> 1",
        ): "what a document leaves out is filled in before",
        (
            "self, *, update: Mapping[str, Any] | None = None, deep: bool = False",
            "False -> True",
        ): "a deep copy is equal to a shallow one",
        (
            'age = "an earlier" if layout < layout_of(raw.get("format")) else "a later"',
            "layout < layout_of(raw.get('format')) -> layout <= layout_of(raw.get('format'))",
        ): "they are different here",
    },
    "pipeline/run.py": {
        (
            'whole = step and isinstance(best, dict) and isinstance(best.get("step", 0), int)',
            "0 -> 1",
        ): "any number stands for none",
    },
    "pipeline/identity.py": {
        ("first > then", "first > then -> first >= then"): "no role stands twice",
        (
            "and not {first, then} <= apart",
            "{first, then} <= apart -> {first, then} < apart",
        ): "two are never all three",
    },
    "pipeline/stage_data.py": {
        ("return 0, 0", "0 -> 1"): "the version of a file that is not there: any number",
        ("@functools.lru_cache(maxsize=16)", "16 -> 17"): "how much is remembered changes nothing",
    },
    "pipeline/planning/cpu.py": {
        (
            '"stages": [{"epochs": 1, "lr": 1e-3}],',
            "0.001 -> 1.001",
        ): "a draft that is timed, by an optimizer of its own",
    },
    "pipeline/planning/gpu.py": {
        (
            'if (measured.gigabytes or 0.0) <= room or document["data"]["batch"] <= 2:',
            "0.0 -> 1.0",
        ): "a GPU always says what it held",
    },
    "pipeline/planning/timing.py": {
        (
            "optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)",
            "0.001 -> 1.001",
        ): "a step takes as long at any rate",
        (
            "float(loss.detach())  # waits for the device",
            "float(loss.detach()) -> pass",
        ): "no CPU is waited for, and no GPU is here",
    },
    "preprocess/planning/plan.py": {
        (
            "target_spacing=spacing, patch=(1, 1, 1), normalisation=kinds, size=size, "
            "transpose=axes",
            "1 -> 2",
        ): "a draft, of which only the grid is read, never the patch",
    },
    "pipeline/sources.py": {
        (
            'foreign = sorted({*ours, *plugins.files()} - set(shipped()["files"]))',
            "sorted({*ours, *plugins.files()} - set(shipped()['files'])) -> "
            "list({*ours, *plugins.files()} - set(shipped()['files']))",
        ): "whoever asks makes a set of them",
        (
            "changed = sorted(",
            "sorted((name for name in known['files'] if name in made['fil"
            "es'] and made['files'][name] ! -> "
            "list((name for name in known['files'] if name in made['files"
            "'] and made['files'][name] != ",
        ): "the table is written in order",
    },
    "pipeline/data/sampler.py": {
        (
            "int(rng.integers(0, s - p + 1)) if s > p else -((p - s) // 2)",
            "s > p -> s >= p",
        ): "of one number numpy draws nothing and says 0, as the other branch does",
        (
            "leader = next((part for part in self.parts if part._has_foreground), self.parts[0])",
            "0 -> 1",
        ): "parts are two or more, of one batch and one foreground, and none of them has any here",
    },
}
# Faults that somebody made by hand once, when no test noticed: (module, text, in its place, tests)
NAMED = {
    "a shard is named before its files are synced": (
        "preprocess/stores/shard_writer.py",
        "        os.fsync(handle)\n",
        "        pass\n",
        "preprocess/test_shard_writer.py",
    ),
    "a job inherits CUDA_VISIBLE_DEVICES": (
        "slurm/cluster.py",
        '    "CUDA_VISIBLE_DEVICES",\n',
        "",
        "slurm/test_jobspec.py::test_a_job_inherits_no_cores_ranks_or_gpus",
    ),
    "ranks killed at the deadline do not come back": (
        "slurm/submitit_launcher.py",
        "|| [ $code -gt 128 '",
        "|| [ $code -gt 255 '",
        "slurm/test_jobspec.py::test_who_comes_back",
    ),
    "a restart without progress more": (
        "slurm/rank.py",
        "len(before) > limit and set(before[-limit - 1 :])",
        "len(before) > limit + 1 and set(before[-limit - 2 :])",
        "slurm/test_jobspec.py::test_restarts_without_progress_end",
    ),
    "a restart without progress fewer": (
        "slurm/rank.py",
        "len(before) > limit and set(before[-limit - 1 :])",
        "len(before) >= limit and set(before[-limit:])",
        "slurm/test_jobspec.py::test_restarts_without_progress_end",
    ),
    "paired intervals take one case of a patient": (
        "pipeline/scoring/compare.py",
        "by_patient.setdefault(int(patient), []).append(float(value))",
        "by_patient[int(patient)] = [float(value)]",
        "pipeline/test_compare.py",
    ),
    "a store's id does not know its patients": (
        "preprocess/stores/manifest.py",
        'PLACE = {"shard",',
        'PLACE = {"group", "shard",',
        "preprocess/test_store_damage.py",
    ),
    "a shard's key does not know the plan": (
        "preprocess/building/shard_job.py",
        '            plan.model_dump(mode="json"),\n            request.format,',
        "            request.format,",
        "preprocess/test_build.py",
    ),
    "of equal labels the last wins": (
        "preprocess/transforms/resample.py",
        "larger = shown > best + np.float32(NEGLIGIBLE)",
        "larger = shown >= best",
        "preprocess/test_transforms.py",
    ),
    "the cgroup's quota is ignored": (
        "core/machine.py",
        "            found.append(int(quota) // int(period))\n",
        "            pass\n",
        "core/test_machine.py",
    ),
    "a file is written in place": (
        "core/files.py",
        "    with replacing(path) as temporary:\n        temporary.write_bytes(",
        "    if True:\n        path.write_bytes(",
        "core/test_files.py",
    ),
    "the number of an ended process is believed": (
        "core/litter.py",
        ' or _began(note["process"]) != note.get("began")',
        "",
        "core/test_litter.py",
    ),
    "a daemon's number is believed whoever has it now": (
        "slurm/sandbox/sandbox.py",
        "Path(command).name == name.split()[0] and ",
        "",
        "slurm/test_jobspec.py::test_a_number_that_another_process_has_is_no_daemon",
    ),
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


class Watch:
    """A plugin of pytest: which functions of a file each test calls, and how long each takes."""

    def __init__(self, path: Path):
        self.end, self.name = "/" + str(path), ""
        self.calls: dict[int, set[str]] = {}  # first line of a function -> tests
        self.seconds: dict[str, float] = {}

    def trace(self, frame: Any, event: str, arg: Any) -> None:
        if frame.f_code.co_filename.endswith(self.end):
            self.calls.setdefault(frame.f_code.co_firstlineno, set()).add(self.name)

    def pytest_collection_finish(self) -> None:
        sys.settrace(self.trace)
        threading.settrace(self.trace)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.name = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self) -> None:
        sys.settrace(None)
        calls = {line: sorted(tests) for line, tests in self.calls.items()}
        modules = sorted(name for name in sys.modules if name.partition(".")[0] in BEFOREHAND)
        Path("watched").write_text(json.dumps([calls, self.seconds, modules]))


class Only:
    """A plugin of pytest: these tests alone, in this order."""

    def __init__(self, names: list[str]):
        self.place = {name: number for number, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if item.nodeid in self.place]
        items.sort(key=lambda item: self.place[item.nodeid])


def tested(clone: Path, files: Iterable[str], limit: float, plugin: Any = None) -> bool:
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
            words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not long and not slow"]
            words += [f"tests/{name}" for name in files]
            code = int(pytest.main(words, plugins=[plugin] if plugin else []))
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
        time.sleep(0.01)


def functions(source: str) -> dict[int, int]:
    """Line -> first line of the innermost function around it, as its code says it."""
    found = {}
    for node in ast.walk(ast.parse(source)):  # outer ones come first
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found |= dict.fromkeys(range(node.body[0].lineno, node.end_lineno + 1), first)
    return found


def dependents(module: str) -> set[str]:
    """The module and all of ours that import it at their top level, or import such."""
    needs = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = "segfleet." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            wanted = set()
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom):
                    wanted |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
                elif isinstance(node, ast.Import):
                    wanted |= {a.name for a in node.names}
            needs[name.removesuffix(".__init__")] = wanted
    found = {"segfleet." + module.removesuffix(".py").replace("/", ".")}
    while more := {name for name, wanted in needs.items() if wanted & found} - found:
        found |= more
    return found


def examine(clone: Path, module: str, per: int, seed: int, again: dict | None) -> dict:
    """In a process of its own, which imports beforehand all that its tests need but what hangs on
    the module. A fault meets the tests that call its function, the quickest first; one that they
    miss meets all."""
    start, results = time.monotonic(), clone / "results"
    if not tested(clone, SUBJECTS[module], 1800, Watch(Path(module))):
        sys.exit(f"{module}: its tests fail without any fault:\n{(clone / 'log').read_text()}")
    limit = 20 + 3 * (time.monotonic() - start)
    results.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            results.write_text(json.dumps(tried(clone, module, per, seed, limit, again)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if not results.exists():
        sys.exit(f"{module}: see above")
    return json.loads(results.read_text())


def as_shipped(clone: Path, module: str) -> None:
    """Not by its name: a file that is not as shipped changes what runs are called."""
    table = clone / "pipeline" / "sources.json"
    shipped = json.loads(table.read_text())
    if module in shipped["files"]:
        from segfleet.pipeline.sources import source_hash

        shipped["files"][module] = source_hash(clone / module)
        table.write_text(json.dumps(shipped))


def tried(clone: Path, module: str, per: int, seed: int, limit: float, again: dict | None) -> dict:
    """What came of the faults that are drawn; of `again`, what was found before, its survivors."""
    calls, seconds, modules = json.loads((clone / "watched").read_text())
    hang = dependents(module)
    for name in modules:
        if name not in hang:
            with contextlib.suppress(Exception):  # of a library's own making
                importlib.import_module(name)
    assert not hang & sys.modules.keys()
    path = clone / module
    source = path.read_text(encoding="utf-8")
    around, every = functions(source), list(mutants(source))
    chosen = sorted(random.Random(seed).sample(range(len(every)), min(per, len(every))))
    if again:
        left = {*again["survivors"], *again["equivalent"]}
        chosen = [n for n, (_, line, change) in enumerate(every) if f"{line}: {change}" in left]
    survivors = []
    stamp = path.stat().st_mtime
    path.write_text(ast.unparse(ast.parse(source)), encoding="utf-8")
    if not tested(clone, SUBJECTS[module], limit):  # or every fault would be noticed
        raise RuntimeError(f"fails without any fault:\n{(clone / 'log').read_text()}")
    for number in chosen:
        faulty, line, change = every[number]
        path.write_text(faulty, encoding="utf-8")
        as_shipped(clone, module)
        stamp += 10  # compiled files are told apart by whole seconds
        os.utime(path, (stamp, stamp))
        near = sorted(calls.get(str(around.get(line)), ()), key=lambda name: seconds.get(name, 0))
        files = [name for name in SUBJECTS[module] if any(f"tests/{name}::" in n for n in near)]
        if (near and not tested(clone, files, limit, Only(near))) or not tested(
            clone, SUBJECTS[module], limit
        ):
            said = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", (clone / "log").read_text(), re.M)
            print(f"{line}: {change}: {said[0] if said else 'hung or did not start'}", flush=True)
            continue
        survivors.append(f"{line}: {change}")
        print(f"{module}:{line} survived: {change}", flush=True)
    path.write_text(source, encoding="utf-8")
    as_shipped(clone, module)
    os.utime(path, (stamp + 10, stamp + 10))
    count = again["tried"] if again else len(chosen)
    facts = {"possible": len(every), "tried": count, "killed": count - len(survivors)}
    return facts | judged(module, survivors)


def judged(module: str, survivors: list[str]) -> dict:
    """Apart: the survivors that are no fault, as `EQUIVALENT` says."""
    lines = (ROOT / module).read_text(encoding="utf-8").splitlines()
    known = {}
    for survivor in survivors:
        line, _, change = survivor.partition(": ")
        why = EQUIVALENT.get(module, {}).get((lines[int(line) - 1].strip(), change))
        if why:
            known[survivor] = why
    return {"survivors": [one for one in survivors if one not in known], "equivalent": known}


def by_hand(clone: Path, modules: list[str]) -> dict[str, bool]:
    """Name -> whether a test noticed, of the faults in these modules."""
    found = {}
    for name, (module, text, instead, tests) in NAMED.items():
        if module not in modules:
            continue
        path = clone / module
        source = path.read_text(encoding="utf-8")
        assert text in source, f"{name}: {module} has no {text!r}"
        if not tested(clone, [tests], 600):
            sys.exit(f"{name}: {tests} fails without it:\n{(clone / 'log').read_text()}")
        path.write_text(source.replace(text, instead), encoding="utf-8")
        found[name] = not tested(clone, [tests], 600)
        path.write_text(source, encoding="utf-8")
        print(f"{'noticed' if found[name] else 'SURVIVED'}: {name}", flush=True)
    return found


def keep(name: str, found: dict) -> None:
    """Beside what other processes of this script have found meanwhile."""
    RESULT.touch()
    with open(RESULT, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = json.loads(file.read() or "{}")
        done[name] = done.get(name, {}) | found if name == "by hand" else found
        file.seek(0)
        file.write(json.dumps(dict(sorted(done.items())), indent=1) + "\n")
        file.truncate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(SUBJECTS), metavar="MODULE")
    parser.add_argument("--per", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--again", action="store_true", help="those that survived, once more")
    parser.add_argument("--named", action="store_true", help="those made by hand, and no others")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="segfleet-mutants-") as folder:
        clone, package = Path(folder) / "clone", Path(folder) / "path" / "segfleet"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        package.mkdir(parents=True)
        for room in ROOMS:  # before what is installed, in this process and in those tests start
            (package / room).symlink_to(clone / room)
        os.environ["PYTHONPATH"] = str(package.parent)
        os.environ.setdefault("SEGFLEET_TEST_DATA", str(ROOT.parent / "shared" / "data"))
        os.environ |= {"SEGFLEET_DEVICE": "cpu", "PYTHONUTF8": "1"}
        # as workers of one pytest, which share what is compiled
        os.environ |= {"PYTEST_XDIST_WORKER": "gw0", "PYTEST_DEBUG_TEMPROOT": folder}
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False  # tests are compiled once
        sys.path.insert(0, str(package.parent))
        for heavy in ("torch", "numpy", "scipy.ndimage", "h5py", "nibabel"):
            __import__(heavy)
        if given.named:
            asked = [module for module, *_ in NAMED.values()]
            asked = asked if given.modules == list(SUBJECTS) else given.modules
            keep("by hand", by_hand(clone, asked))
        for module in () if given.named else given.modules:
            before = json.loads(RESULT.read_text())[module] if given.again else None
            found = examine(clone, module, given.per, given.seed, before) | {"seed": given.seed}
            keep(module, found)
            print(module, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
