"""Every kind of file that segfleet keeps, damaged in six ways, against every command that reads it.

    python benchmarks/damage.py [--work FOLDER] [--seconds N] [--only WORD]

A small world is made once: raw data, a store (Zarr and HDF5), two finished runs, one that was
stopped, predictions, scores, a model file, a sweep, folds. Of every kind of file one is then
flipped (two bits in its middle), truncated, emptied, filled with zeros, deleted, or swapped with
another's of its kind, in a fresh copy of that world, and a command is run, a fork of a process that
has everything imported (`forked.py`). What is right is what the same command says and leaves in the
undamaged world, run twice: what differs between the two is no result.

JSON documents are crafted, too: valid, without their hash, but of another kind,
nested deeply, all their numbers texts, all their texts numbers, all values null, or numbers that no
float holds. Whoever writes into a run folder may change its results, so of these only tracebacks
and hangs are faults.

    same      exit code 0 and the same results
    told      exit code 0, some results missing or made anew, and a warning names the file
    refused   another exit code and one message
    wrong     exit code 0 and another result, or one missing that nobody speaks of
    crafted   exit code 0 after a document was crafted
    traceback, hang: what they say

`wrong`, `traceback` and `hang` are faults. With --seconds it stops after that time and goes on with
the same --work where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import stat
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from crafted import changed

HERE = Path(__file__).resolve().parent
LONGEST = 90.0  # seconds of a command
FAULTS = ("wrong", "traceback", "hang")
DEAR = ("train", "train on", "evaluate", "evaluate hdf5", "evaluate on", "sweep", "best")
# these make no results but what they say
READERS = ("report", "status", "compare", "export", "export ome", "check", "score", "sweep status")
DAMAGES = ("flip", "truncate", "empty", "zeros", "delete", "swap")
CRAFTS = ("list", "deep", "texts", "numbers", "nulls", "huge")
# another file of the kind may be put in place of these, and nothing can know: they are the input
INPUT = ("raw/", "images/", "truth/", "one.segfleet")

Result = dict[str, Any]
NETWORK = {
    "features": [4, 8],
    "strides": [[1, 1, 1], [2, 2, 2]],
    "kernels": [[3, 3, 3], [3, 3, 3]],
    "conv_per_stage": [1, 1],
    "conv_per_decoder": [1],
}


# --- the world ------------------------------------------------------------------------------------


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "data": {"store": "store", "batch": 2, "patch": [16, 16, 16], "workers": 0},
        "model": {"name": "plain_unet_3d", "options": NETWORK},
        "evaluation": {"every": 1, "mirror": []},
        "stages": [
            {"name": "base", "epochs": 2, "steps": 4, "lr": 1e-2},
            {"name": "tune", "epochs": 2, "steps": 4, "lr": 1e-3, "inherit": "weights"},
        ],
        "save_every": 4,
        **changes,
    }


def longer() -> list[dict[str, Any]]:
    first, second = recipe("")["stages"]
    return [first, {**second, "epochs": 6}]


def segfleet(where: Path, *words: str, code: int = 0) -> None:
    err = where.parent / "building"
    found = forked.run(where, list(words), seconds=600, err=err)
    if found != code:
        raise SystemExit(f"segfleet {' '.join(words)}: {found}\n{err.read_text()[-3000:]}")


def build(world: Path) -> None:
    world.mkdir(parents=True)
    segfleet(world, "datasets", "msd", "phantom", "raw", "--cases", "6")
    for name, form in (("store", "zarr"), ("store5", "hdf5"), ("other", "zarr")):
        seed = "7" if name == "other" else "12345"
        segfleet(
            world,
            "preprocess",
            "msd",
            "--raw",
            "raw",
            "--out",
            name,
            "--format",
            form,
            "--seed",
            seed,
        )
    for name, changes in (
        ("one", {}),
        ("two", {"seed": 1}),
        ("half", {"seed": 2, "stages": longer()}),
        ("five", {"seed": 3, "data": {**recipe("")["data"], "store": "store5"}}),
    ):
        (world / f"{name}.yaml").write_text(yaml.safe_dump(recipe(name, **changes)))
    for name in ("one", "two", "five"):
        segfleet(world, "train", f"{name}.yaml")
    for fold in range(1, 5):
        segfleet(world, "train", "one.yaml", f"data.fold={fold}")
    stop_half_way(world)
    for name in ("images", "truth"):
        (world / name).mkdir()
    for path in sorted((world / "raw" / "imagesTr").glob("phantom_*"))[:2]:
        shutil.copy(path, world / "images" / path.name.replace(".nii", "_0000.nii"))
        shutil.copy(world / "raw" / "labelsTr" / path.name, world / "truth" / path.name)
    uid = leaf(world, "one").name
    segfleet(world, "predict", uid, "images", "--out", "predictions", "--probabilities")
    segfleet(world, "evaluate", uid, "--on", "other")
    segfleet(world, "export", "model", uid, "--to", "one.segfleet")
    segfleet(world, "export", "model", leaf(world, "two").name, "--to", "two.segfleet")
    space = {"name": "space", "base": recipe("space", stages=[{"epochs": 1}]), "stages": []}
    space["stages"] = [
        {"name": "base", "epochs": 1, "steps": 4, "lr": [1e-2, 1e-3]},
        {"name": "tune", "epochs": 1, "steps": 4, "lr": 1e-3, "inherit": "weights"},
    ]
    (world / "space.yaml").write_text(yaml.safe_dump(space))
    segfleet(world, "sweep", "space.yaml", "--slots", "1")


def stop_half_way(world: Path) -> None:
    """The run `half`, killed in its second stage."""
    known = set(world.glob("runs/*"))
    process = forked.start(world, ["train", "half.yaml"], err=world.parent / "building")
    ended: dict[int, int] = {}
    while process not in forked.reap(ended):
        time.sleep(0.005)
        new = set(world.glob("runs/*")) - known
        if any(list(run.glob("*/checkpoints/step-00000008")) for run in new):
            forked.end({process: "command"})
    while forked.tree():
        time.sleep(0.05)
        forked.reap(ended)
    if (leaf(world, "half") / "done.json").exists():
        raise SystemExit("half was done before it could be killed")


def leaf(world: Path, name: str, fold: int = 0) -> Path:
    for path in sorted(world.glob("runs/*/*/recipe.json")):
        document = json.loads(path.read_text())
        if document["name"] == name and document["data"]["fold"] == fold:
            return path.parent
    raise SystemExit(f"no run {name}")


# --- what is damaged, and how ---------------------------------------------------------------------


def kinds(world: Path) -> dict[str, list[str]]:
    """Kind of file -> all of it, paths from the world. Numbers and names of runs make no kind."""
    uids = {path.parent.name: str(n) for n, path in enumerate(sorted(world.rglob("recipe.json")))}
    names = {leaf(world, name): name for name in ("one", "two", "half", "five")}
    for folder, name in list(names.items()):
        names[folder.parent] = f"{name}-base"
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(world.rglob("*")):
        text = path.relative_to(world).as_posix()
        if not path.is_file() or path.name == "lock" or "/code/" in text or "tfevents" in text:
            continue
        if re.search(r"ray\.log|/\.(?!predictions/)|\.yaml$", text):
            continue
        owner = next((f for f in path.parents if f in names), None)
        if owner:
            text = f"runs/{names[owner]}/{path.relative_to(owner).as_posix()}"
        elif text.startswith("runs/") and not text.startswith(("runs/sweeps", "runs/folds")):
            text = "runs/rest/" + "/".join(text.split("/")[3:])
        for uid in uids:
            text = text.replace(uid, "UID")
        text = re.sub(r"[0-9a-f]{12,}", "HASH", text)
        text = re.sub(r"\d+(\.\d+)*", "0", text)
        found[text].append(path.relative_to(world).as_posix())
    return found


# kinds of one kind in this sense are damaged once: the second run adds nothing to the first
SKIP = re.compile(
    r"^(runs/two|runs/rest|other/|two\.segfleet|runs/five/(?!recipe)|store5?/\.|raw/\._)"
)


def partner(kind: str, path: str, found: dict[str, list[str]]) -> str | None:
    """Another of the same kind: of the run `two`, of another case, of the other store."""
    swaps = (
        ("runs/one", "runs/two"),
        ("runs/half", "runs/two"),
        ("runs/half-base", "runs/two-base"),
        ("runs/one-base", "runs/two-base"),
        ("store/", "other/"),
        ("one.segfleet", "two.segfleet"),
    )
    for ours, theirs in swaps:
        if kind.startswith(ours):
            others = found.get(kind.replace(ours, theirs, 1))
            if others:
                return others[-1]
    others = [other for other in found[kind] if other != path]
    return others[0] if others else None


def damage(world: Path, path: str, how: str, other: str | None, try_only: bool = False) -> bool:
    """Whether there was anything to do."""
    file = world / path
    data = file.read_bytes()
    if how == "swap":
        if other is None or (new := (world / other).read_bytes()) == data:
            return False
    elif how == "delete":
        file.unlink()
        return True
    else:
        middle = len(data) // 2
        new = {
            "flip": data[:middle]
            + bytes(b ^ 1 for b in data[middle : middle + 2])
            + data[middle + 2 :],
            "truncate": data[:middle],
            "empty": b"",
            "zeros": bytes(len(data)),
        }.get(how)
        new = crafted(file, data, how) if how in CRAFTS else new
        if new is None or new == data:
            return False
    if not try_only:
        file.write_bytes(new)
    return True


def crafted(path: Path, data: bytes, how: str) -> bytes | None:
    """A document as somebody may have written it; None for what is none."""
    if path.suffix not in (".json", ".jsonl"):
        return None
    if how == "deep":
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    if how == "list":
        return b"[1, 2]\n"
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    try:
        return b"\n".join(
            json.dumps(changed(json.loads(line), how)).encode() for line in lines if line.strip()
        )
    except ValueError:
        return None


# --- commands -------------------------------------------------------------------------------------


def commands(world: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (words, the kinds of files that it is tried with)."""
    one, two = leaf(world, "one").name, leaf(world, "two").name
    case = "phantom_000"
    return {
        "train": (["train", "one.yaml", "--json"], "store/|runs/one"),
        "train on": (["train", "half.yaml", "--json"], "runs/half"),
        "evaluate": (["evaluate", one, "--json"], "store/|runs/one"),
        "evaluate hdf5": (["evaluate", leaf(world, "five").name, "--json"], "store0/|runs/five"),
        "evaluate on": (["evaluate", one, "--on", "other", "--json"], "runs/one"),
        "report": (["report", one, "--csv", "--json"], "runs/one"),
        "status": (["status", "--json"], "runs/"),
        "compare": (["compare", one, two, "--json"], "runs/one"),
        "predict": (
            ["predict", one, "images", "--out", "predictions", "--probabilities", "--json"],
            "runs/one|predictions/|images/",
        ),
        "predict anew": (
            ["predict", one, "images", "--out", "fresh", "--json"],
            "runs/one|images/",
        ),
        "predict model": (
            ["predict", "one.segfleet", "images", "--out", "fresh", "--json"],
            "one.segfleet",
        ),
        "score": (
            ["score", "predictions", "--truth", "truth", "--out", "scores", "--json"],
            "predictions/|truth/",
        ),
        "best": (["best", "space", "--json"], "runs/sweeps|store/"),
        "export": (["export", "model", one, "--to", "new.segfleet", "--json"], "runs/one"),
        "export ome": (["export", "ome-zarr", "store", case, "--to", "x.zarr", "--json"], "store/"),
        "preprocess": (
            ["preprocess", "msd", "--raw", "raw", "--out", "store", "--json"],
            "store/|raw/",
        ),
        "preprocess verify": (
            ["preprocess", "msd", "--raw", "raw", "--out", "store", "--verify", "--json"],
            "store/",
        ),
        "preprocess hdf5": (
            ["preprocess", "msd", "--raw", "raw", "--out", "store5", "--format", "hdf5", "--json"],
            "store0/",
        ),
        "check": (["datasets", "msd", "check", "raw", "--json"], "raw/"),
        "sweep": (["sweep", "space.yaml", "--slots", "1", "--json"], "runs/sweeps"),
        "sweep status": (["sweep", "status", "space.yaml", "--json"], "runs/sweeps|runs/one"),
    }


def fork(world: Path, words: list[str]) -> tuple[int | None, str, str]:
    """Exit code (None: it hung), stdout, stderr of a command in a copy of this process."""
    out, err = world.parent / "stdout", world.parent / "stderr"
    err.unlink(missing_ok=True)
    limit = LONGEST * (4 if words[0] == "sweep" else 1)
    code = forked.run(world, words, seconds=limit, out=out, err=err)
    return code, read(out), read(err)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# --- what came out --------------------------------------------------------------------------------


def results(world: Path, out: str) -> Result:
    """Leaves of what a command printed, and of what lies there now that a user would take for a
    result."""
    found: Result = {}
    with_json = out[out.find("{") if "[" not in out[:1] else 0 :]
    try:
        flatten("said", json.loads(with_json), found)
    except ValueError:
        found["said"] = out
    for path in sorted(world.glob("runs/*/*/recipe.json")) + sorted(
        world.glob("runs/folds/*/recipe.json")
    ):
        folder, name = path.parent, path.parent.name
        done = folder / "done.json"
        if done.exists():
            try:
                last = json.loads(done.read_text())["checkpoint"]
                found[f"weights {name}"] = sha(
                    folder / "checkpoints" / last / "weights.safetensors"
                )
            except (ValueError, KeyError, OSError, TypeError, RecursionError):
                found[f"weights {name}"] = None
        for scores in folder.rglob("evaluation.json"):
            document(scores, f"score {scores.relative_to(world / 'runs')}", found)
    for folder in ("predictions", "fresh"):
        for path in sorted((world / folder).glob("*.nii.gz")):
            found[f"{folder}/{path.name}"] = sha(path)
        for path in sorted((world / folder).glob("*.npz")):
            found[f"{folder}/{path.name}"] = sha(path)
    document(world / "scores" / "evaluation.json", "scores", found)
    for path in (world / "store" / "manifest.json", world / "store5" / "manifest.json"):
        document(path, path.parent.name, found, "id")
    return found


def document(path: Path, name: str, into: Result, key: str = "summary") -> None:
    if path.exists():
        try:
            flatten(name, json.loads(path.read_text())[key], into)
        except (ValueError, KeyError, TypeError, RecursionError):
            into[name] = None


def flatten(name: str, thing: Any, into: Result) -> None:
    if isinstance(thing, dict):
        for key, value in thing.items():
            flatten(f"{name}.{key}", value, into)
    elif isinstance(thing, list):
        for key, value in enumerate(thing):
            flatten(
                f"{name}.{value['run'] if isinstance(value, dict) and 'run' in value else key}",
                value,
                into,
            )
    elif not re.search(r"date|finished|seconds|remaining", name):
        into[name] = thing


def sha(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def judge(
    code: int | None, err: str, out: str, found: Result, right: Result, path: str, how: str
) -> tuple[str, str]:
    """The verdict and what speaks for it."""
    last = " | ".join(err.strip().splitlines()[-3:])[-400:]
    if code is None:
        return "hang", last
    if "Traceback (most recent call last)" in err + out:
        return "traceback", last
    if code:
        return ("refused", last) if err.strip() else ("wrong", f"exit code {code} without a word")
    if how in CRAFTS:
        return "crafted", last
    other = sorted(
        key for key in right if key in found and found[key] != right[key] and found[key] is not None
    )
    gone = sorted(key for key in right if found.get(key) is None and right[key] is not None)
    named = any(part in err for part in names_of(path))
    if not other and not gone:
        return "same", last
    shown = "; ".join(f"{key}: {found.get(key)} for {right[key]}" for key in (other + gone)[:4])
    if how == "delete":  # a run without its score is what anybody may see: trained, not scored
        other = [key for key in other if (found[key], right[key]) != ("trained", "done")]
    if named or (how == "delete" and not other):
        return "told", f"{shown} -- {last}"
    return "wrong", shown


def makes(command: str, key: str) -> bool:
    """Whether a command has to make this result; what it does not make and does not change is as
    it was found."""
    if command in READERS:
        return key.startswith("said")
    if command.startswith("predict"):
        return key.startswith(("said", "predictions/", "fresh/"))
    return "/on/" not in key or command == "evaluate on"


def names_of(path: str) -> Iterator[str]:
    parts = Path(path).parts
    yield Path(path).name
    yield from (part.partition(".")[0] for part in parts if part.startswith("phantom_"))
    yield from (
        part for part in parts if part.startswith(("step-", "phantom_")) or part.endswith(".zarr")
    )


# --- all of it ------------------------------------------------------------------------------------


def rights(world: World, name: str, words: list[str]) -> Result:
    """What the command says and leaves where nothing is damaged, as far as that is the same
    twice."""
    seen = []
    for _ in range(2):
        world.mend()
        code, out, err = fork(world.place, words)
        if code != 0:
            raise SystemExit(f"{name}: {code} in the undamaged world\n{err}")
        seen.append(results(world.place, out))
    return {key: value for key, value in seen[0].items() if seen[1].get(key) == value}


class World:
    """A copy of the pristine world that is put right again after each case: what changed, and no
    more."""

    def __init__(self, pristine: Path, place: Path):
        self.pristine, self.place = pristine, place
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(pristine, place, symlinks=True)
        self.known = self._facts()

    def _facts(self) -> dict[str, tuple]:
        found = {}
        for folder, folders, files in os.walk(self.place):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                facts = os.lstat(path)
                is_folder = stat.S_ISDIR(facts.st_mode)
                found[path] = () if is_folder else (facts.st_size, facts.st_mtime_ns, facts.st_ino)
        return found

    def mend(self) -> None:
        now = self._facts()
        for path in sorted(now.keys() - self.known.keys(), reverse=True):
            Path(path).rmdir() if now[path] == () else Path(path).unlink()
        for path, facts in self.known.items():
            if now.get(path) == facts:
                continue
            if facts == ():
                Path(path).mkdir()
                continue
            Path(path).unlink(missing_ok=True)
            shutil.copy2(self.pristine / Path(path).relative_to(self.place), path)
            new = os.lstat(path)
            self.known[path] = (new.st_size, new.st_mtime_ns, new.st_ino)


def main(options: argparse.Namespace) -> int:
    work = options.work.resolve()
    pristine, log = work / "pristine", work / "log.jsonl"
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    forked.warm()
    if not (work / "built").exists():
        shutil.rmtree(work, ignore_errors=True)
        build(work / "world")  # where it will be damaged: recipes hold whole paths
        (work / "world").rename(pristine)
        (work / "built").touch()
    world = World(pristine, work / "world")
    found = kinds(pristine)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["command"], row["kind"], row["damage"]) for row in rows}
    end = time.monotonic() + options.seconds
    every = list(cases(pristine, found, options.only))
    rightly: dict[str, Result] = {}
    with open(log, "a") as file:
        for name, kind, how in every:
            if (name, kind, how) in known:
                continue
            if time.monotonic() > end:
                print(f"{len(rows)} of {len(every)}: the same command goes on")
                break
            words, path = commands(pristine)[name][0], found[kind][-1]  # of checkpoints the latest
            if name not in rightly:
                rightly[name] = rights(world, name, words)
            world.mend()
            damage(world.place, path, how, partner(kind, path, found))
            before = results(world.place, "")
            begin, cpu = time.monotonic(), forked.cpu_seconds()
            code, out, err = fork(world.place, words)
            now, right = results(world.place, out), rightly[name]
            right = {
                key: value
                for key, value in right.items()
                if makes(name, key) or now.get(key) != before.get(key)
            }
            verdict, why = judge(code, err, out, now, right, path, how)
            why = why.replace(str(HERE.parent), ".")
            row = {"command": name, "kind": kind, "damage": how, "verdict": verdict}
            row |= {"seconds": round(time.monotonic() - begin, 2), "why": why}
            row["cpu_seconds"] = round(forked.cpu_seconds() - cpu, 2)
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            if verdict in FAULTS:
                print(json.dumps(row), flush=True)
    return report(rows, len(every))


def cases(pristine: Path, found: dict[str, list[str]], only: str) -> Iterator[tuple[str, str, str]]:
    """(command, kind, damage) in an order by chance, so that a part of them is a fair sample; what
    costs little first."""
    every = []
    for name, (_, pattern) in commands(pristine).items():
        for kind, paths in found.items():
            if SKIP.match(kind) or not re.match(pattern, kind):
                continue
            for how in DAMAGES + CRAFTS:
                possible = how == "delete" or damage(
                    pristine, paths[-1], how, partner(kind, paths[-1], found), try_only=True
                )
                if possible and not (how == "swap" and kind.startswith(INPUT)):
                    every.append((name, kind, how))
    random.Random(0).shuffle(every)
    every.sort(key=lambda case: case[0] in DEAR)
    return (case for case in every if only in " ".join(case))


def report(rows: list[dict[str, Any]], every: int) -> int:
    counts = Counter(row["verdict"] for row in rows)
    faults = [row for row in rows if row["verdict"] in FAULTS]
    document = {
        "cases": every,
        "tried": len(rows),
        "kinds": len({row["kind"] for row in rows}),
        "commands": sorted({row["command"] for row in rows}),
        "verdicts": dict(sorted(counts.items())),
        "longest_seconds": max((row["seconds"] for row in rows), default=0),
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in rows) / 60, 1),
        "faults": faults,
    }
    (HERE / "results" / "damage.json").write_text(json.dumps(document, indent=1) + "\n")
    print(
        json.dumps(
            {
                key: document[key]
                for key in ("cases", "tried", "kinds", "verdicts", "longest_seconds")
            }
        )
    )
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/segfleet-damage"))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--only", default="", help="a word of 'command kind damage'")
    sys.exit(main(parser.parse_args()))
