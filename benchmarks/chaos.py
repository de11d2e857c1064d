"""Kills by seed over everything that runs for long, and what is left of it.

    python benchmarks/chaos.py [--kills 200] [--seconds 3600] [--work FOLDER] [--only WORD]

Scenarios: training with DDP and ZeRO 0 to 3 (two ranks, two loader processes each), saving (every
step), staging, scoring, preprocessing, predicting and a sweep. A chain starts the scenario in a
fresh folder and kills it up to four times, each time given the same command again, and then lets it
end. A kill is SIGKILL,

    inside      of the process that makes the n-th change to a file, before that change, or
    anywhere    of one process of the tree, or of the command itself, at some moment, or it is
    ctrl-c      SIGINT to the command and what a terminal would send it to, at some moment; of the
                impatient twice.

n, the moment and who it is are drawn by the chain's seed. After each kill all that ran must go; at
the end the result must be that of an undisturbed run, bit by bit, with no half-written file, no
temporary folder and no shared memory left. Commands are forks of a warm process (`forked.py`), so
nearly all of their time is work that a kill can hit. With --seconds it stops after that time and
goes on later with the same --work; chain n is the same whenever it is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import forked
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from conftest import write_tiny_store  # noqa: E402

CACHES = ("torchinductor",)  # torch's own, which is meant to stay
LONGEST = 600.0  # seconds of one command; more is a hang
KILLS = 4  # of a chain at most
DEEPSPEED = "engine.name=deepspeed"


# --- what is killed -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scenario:
    words: list[str]  # of segfleet; paths are relative to the scenario's own folder
    results: tuple[str, ...]  # globs whose bytes must be the same
    before: tuple[str, ...] = ()  # folders of the world that are copied into it
    share: float = 1.0  # of the chains


def scenarios() -> dict[str, Scenario]:
    weights = ("runs/**/done.json:checkpoint", "runs/**/evaluation.json:summary")
    train = ["train", "tiny.yaml", "--ranks", "2", "data.workers=2"]
    store = ["preprocess", "msd", "--raw", "../raw", "--workers", "2", "--out", "made"]
    zero = {
        f"train zero{n}": Scenario(
            words=[*train, DEEPSPEED, f"engine.options.zero={n}"], results=weights, share=0.75
        )
        for n in range(4)
    }
    return {
        "train ddp": Scenario(words=train, results=weights, share=1.5),
        **zero,
        "save": Scenario(words=["train", "tiny.yaml", "save_every=1"], results=weights),
        "stage": Scenario(
            words=["train", "tiny.yaml", "--stage-to", "$TMPDIR/../staged"],
            results=weights,
            share=1.5,
        ),
        "score": Scenario(
            words=["evaluate", "tiny", "evaluation.mirror=[1]"],
            results=("runs/**/evaluation.json:summary",),
            before=("runs",),
            share=1.5,
        ),
        "preprocess": Scenario(words=store, results=("made/**/*",)),
        "preprocess hdf5": Scenario(words=[*store, "--format", "hdf5"], results=("made/**/*",)),
        "predict": Scenario(
            words=["predict", "tiny", "../images", "--out", "predicted"],
            results=("predicted/*.png", "predicted/*.nii.gz"),
            before=("runs",),
            share=1.5,
        ),
        "sweep": Scenario(words=["sweep", "space.yaml", "--slots", "2"], results=weights[:1]),
    }


def build(world: Path) -> None:
    import numpy as np
    from PIL import Image

    write_tiny_store(world / "store", 2, "zarr", 6, 1, 24, 1)
    stages = [
        {"name": "base", "epochs": 2, "steps": 8, "lr": 1e-2},
        {"name": "tune", "epochs": 1, "steps": 8, "lr": 1e-3, "inherit": "weights+optimizer"},
    ]
    recipe = {
        "name": "tiny",
        "data": {"store": str(world / "store"), "batch": 4, "patch": [16, 16]},
        "model": {"name": "unet_lite_standard", "options": {"width": 2}},
        "stages": stages,
        "save_every": 4,
    }
    (world / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    axes = [{**stages[0], "epochs": 1}, {**stages[1], "lr": [1e-3, 1e-4]}]
    space = {"name": "space", "base": {**recipe, "name": "space"}, "stages": axes}
    (world / "space.yaml").write_text(yaml.safe_dump(space))
    (world / "images").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(world / "images" / f"image{number}.png")
    done(world, ["datasets", "msd", "phantom", "raw", "--cases", "6"])
    done(world, ["train", "tiny.yaml"])


def done(folder: Path, words: list[str]) -> float:
    """Seconds of a command that must end well."""
    begin, err = time.monotonic(), folder / "stderr"
    code = forked.run(folder, words, seconds=LONGEST, err=err, TMPDIR=str(folder.parent / "tmp"))
    if code != 0:
        raise SystemExit(f"{words}: {code}\n{err.read_text()[-3000:]}")
    return time.monotonic() - begin


def fresh(world: Path, folder: Path, scenario: Scenario) -> None:
    for name in ("here", "tmp", "staged"):
        shutil.rmtree(folder.parent / name, ignore_errors=True)
    (folder.parent / "tmp").mkdir(parents=True)
    folder.mkdir()
    for name in ("tiny.yaml", "space.yaml"):
        shutil.copy(world / name, folder / name)
    for name in scenario.before:
        shutil.copytree(world / name, folder / name)
    for name in ("raw", "images"):
        if not (folder.parent / name).exists():
            shutil.copytree(world / name, folder.parent / name)


# --- how ------------------------------------------------------------------------------------------


class Changes:
    """Counts the changes to files that all processes of a command make together, and kills the one
    that is about to make number `limit`. Shared memory that forks inherit."""

    NAMES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
    WRITING = os.O_WRONLY | os.O_RDWR

    def __init__(self) -> None:
        self.shared, self.own = mmap.mmap(-1, 64), os.getpid()
        fsync = os.fsync

        def counted(handle: int) -> None:
            self.add()
            fsync(handle)

        os.fsync = counted
        sys.addaudithook(self.heard)

    def heard(self, event: str, words: tuple) -> None:
        if event in self.NAMES or (
            event == "open" and isinstance(words[2], int) and words[2] & self.WRITING
        ):
            self.add()

    def add(self) -> None:
        if os.getpid() == self.own:
            return
        count = self.count + 1
        self.shared[:8] = count.to_bytes(8, "little")
        if count == int.from_bytes(self.shared[8:16], "little"):
            self.shared[16:32] = Path("/proc/self/comm").read_bytes().strip().ljust(16, b"\0")
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def count(self) -> int:
        return int.from_bytes(self.shared[:8], "little")

    @property
    def victim(self) -> str:
        return self.shared[16:32].rstrip(b"\0").decode()

    def arm(self, limit: int) -> None:
        """`limit` 0: never."""
        self.shared[:] = bytes(8) + limit.to_bytes(8, "little") + bytes(48)


def kill(
    folder: Path, scenario: Scenario, rng: random.Random, calm: dict, changes: Changes
) -> dict | None:
    """One start and one kill; None if it had ended before, which is well."""
    inside, share, own = rng.random() < 0.5, rng.uniform(0.05, 0.95), rng.random() < 0.4
    choice, ended, tree = rng.random(), {}, {}
    asked, twice = rng.random() < 0.25, rng.random() < 0.3
    # a sweep's changes are made by Ray's processes
    inside = inside and not asked and calm["changes"] > 20
    changes.arm(max(1, int(share * calm["changes"])) if inside else 0)
    begin = time.monotonic()
    child = start(folder, scenario)
    while child not in forked.reap(ended) and not changes.victim:
        if not inside and time.monotonic() - begin > share * calm["seconds"]:
            if asked:
                victim = "command"
                interrupt(child, twice)
                break
            tree = forked.tree()
            number = child if own or not tree else sorted(tree)[int(choice * len(tree))]
            forked.end({number: ""})
            victim = tree.get(number, "?")
            break
        if time.monotonic() - begin > LONGEST:
            break
        time.sleep(0.005)
    else:
        victim = changes.victim
        if not victim:  # it ended first
            return None
    begin = time.monotonic()
    while (left := forked.tree()) and time.monotonic() - begin < LONGEST:
        forked.reap(ended)
        if child in ended and ended[child] == -signal.SIGKILL and time.monotonic() - begin > 60:
            break
        time.sleep(0.02)
    forked.end(left)
    forked.reap(ended)
    return {
        "how": "ctrl-c" if asked else "inside" if inside else "anywhere",
        "at": round(share, 2),
        "victim": victim,
        "command": ended.get(child),
        "seconds": round(time.monotonic() - begin, 1),
        "processes_left": len(left),
    }


def interrupt(command: int, twice: bool) -> None:
    """Ranks are sessions of their own, which no terminal reaches."""
    for _ in range(1 + twice):
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(command, signal.SIGINT)
        time.sleep(0.1 * twice)


def start(folder: Path, scenario: Scenario) -> int:
    tmp = str(folder.parent / "tmp")
    return forked.start(folder, scenario.words, err=folder / "stderr", TMPDIR=tmp)


def chain(world: Path, folder: Path, name: str, seed: int, calm: dict, changes: Changes) -> dict:
    scenario, rng = scenarios()[name], random.Random(seed)
    fresh(world, folder, scenario)
    memory, kills = shared_memory(), []
    for _ in range(KILLS):
        if (found := kill(folder, scenario, rng, calm, changes)) is None:
            break
        kills.append(found)
    changes.arm(0)
    for _ in range(3):
        again = forked.run(
            folder,
            scenario.words,
            seconds=LONGEST,
            err=folder / "stderr",
            TMPDIR=str(folder.parent / "tmp"),
        )
        if again == 0:
            break
    end = time.monotonic() + 5
    while (left := forked.tree()) and time.monotonic() < end:
        time.sleep(0.05)
        forked.reap({})
    forked.end(left)
    found = outcome(folder, scenario)
    differs = sorted(
        path for path in {*found, *calm["right"]} if found.get(path) != calm["right"].get(path)
    )
    said = (folder / "stderr").read_text()
    return {
        "scenario": name,
        "seed": seed,
        "kills": kills,
        "again": again,
        "same": again == 0 and not differs,
        "differs": differs[:5],
        "processes_left": len(left) + sum(one["processes_left"] for one in kills),
        "files_left": [*litter(folder), *sorted(shared_memory() - memory)],
        "tracebacks": said.count("Traceback (most recent call last)"),
        "said": said[-2000:] if "Traceback" in said else "",
    }


# --- what is left ---------------------------------------------------------------------------------


def outcome(folder: Path, scenario: Scenario) -> dict[str, str]:
    """What must be the same: of `glob:key` that key of a document (a checkpoint: its weights)."""
    found = {}
    for result in scenario.results:
        glob, _, key = result.partition(":")
        for path in sorted(path for path in folder.glob(glob) if path.is_file()):
            name = str(path.relative_to(folder))
            if key == "checkpoint":
                last = path.parent / "checkpoints" / json.loads(path.read_text())[key]
                found[name] = sha((last / "weights.safetensors").read_bytes())
            elif key:
                found[name] = sha(json.dumps(json.loads(path.read_text())[key]).encode())
            else:
                found[name] = sha(path.read_bytes())
    return found


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def litter(folder: Path) -> list[str]:
    """Half-written files of the scenario, temporary folders that killed processes left."""
    places = (folder, folder.parent / "staged")
    half = [
        path
        for place in places
        for path in place.rglob("*")
        if ".partial" in path.name or path.name == "stop"
    ]
    temporary = folder.parent / "tmp"
    left = [
        path
        for path in temporary.iterdir()
        if not path.name.startswith(CACHES) and not is_pythons(path)
    ]
    return [str(path.relative_to(folder.parent)) for path in (*half, *left)]


def is_pythons(path: Path) -> bool:
    """Whether Python made it to see if files can be made in a folder, which it does once a process
    (`tempfile.gettempdir`); killed in between, it leaves it, under a name that says nothing."""
    return (
        re.fullmatch("[a-z0-9_]{8}", path.name) is not None
        and path.is_file()
        and (path.read_bytes() in (b"", b"blat"))
    )


def shared_memory() -> set[str]:
    """What lies in /dev/shm and belongs to nobody who lives: torch and multiprocessing put the
    number of its maker into a name."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        numbers = [part for part in path.name.split("_") if part.isdigit()]
        if path.name.startswith("torch_") and not any(
            Path(f"/proc/{number}").exists() for number in numbers
        ):
            found.add(str(path))
    return found


# --- all of it ------------------------------------------------------------------------------------


def calm_run(world: Path, folder: Path, scenario: Scenario, changes: Changes) -> dict:
    """What an undisturbed run gives, how long it takes, how often it changes a file."""
    fresh(world, folder, scenario)
    changes.arm(0)
    seconds = done(folder, scenario.words)
    facts = {"seconds": seconds, "changes": changes.count, "right": outcome(folder, scenario)}
    if not facts["right"] or (left := litter(folder)):
        raise SystemExit(f"{scenario.words}: {facts}, {left}")
    return facts


def main(options: argparse.Namespace) -> int:
    work = options.work.resolve()
    world, folder, log = work / "world", work / "at" / "here", work / "log.jsonl"
    forked.warm("deepspeed", "segfleet.pipeline.engines.deepspeed")
    changes = Changes()
    if not (work / "built").exists():
        shutil.rmtree(work, ignore_errors=True)
        (work / "tmp").mkdir(parents=True)
        world.mkdir()
        build(world)
        (work / "built").touch()
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known, end = {row["seed"] for row in rows}, time.monotonic() + options.seconds
    table, seed = scenarios(), -1
    if not any(options.only in name for name in table):
        raise SystemExit(f"--only: found '{options.only}', expected a word of: {', '.join(table)}")
    names, shares = list(table), [one.share for one in table.values()]
    with open(log, "a") as file:
        while sum(len(row["kills"]) for row in rows) < options.kills and time.monotonic() < end:
            seed += 1
            drawn = random.Random(1000 + seed).choices(names, shares)[0]
            name = names[seed] if seed < len(names) else drawn  # each once, then by their shares
            if seed in known or options.only not in name:
                continue
            right = work / f"{name}.json"
            if not right.exists():
                right.write_text(json.dumps(calm_run(world, folder, table[name], changes)))
            begin = forked.cpu_seconds()
            row = chain(world, folder, name, seed, json.loads(right.read_text()), changes)
            row["cpu_seconds"] = round(forked.cpu_seconds() - begin, 1)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)
            report(rows, options.kills)
    return report(rows, options.kills, say=True)


def report(rows: list[dict], wanted: int, say: bool = False) -> int:
    kills = [{"scenario": row["scenario"], **one} for row in rows for one in row["kills"]]
    faults = [
        row
        for row in rows
        if not row["same"] or row["processes_left"] or row["files_left"] or row["tracebacks"]
    ]
    own = [one["seconds"] for one in kills if one["victim"] == "command" and one["how"] != "ctrl-c"]
    asked = [one["seconds"] for one in kills if one["how"] == "ctrl-c"]
    others = [one["seconds"] for one in kills if one["victim"] != "command"]
    result = {
        "kills_wanted": wanted,
        "kills": len(kills),
        "chains": len(rows),
        "by_scenario": dict(sorted(Counter(one["scenario"] for one in kills).items())),
        "by_victim": dict(sorted(Counter(one["victim"] for one in kills).items())),
        "by_way": dict(sorted(Counter(one["how"] for one in kills).items())),
        "chains_with_equal_results": sum(row["same"] for row in rows),
        "processes_left": sum(row["processes_left"] for row in rows),
        "files_left": sum(len(row["files_left"]) for row in rows),
        "tracebacks": sum(row["tracebacks"] for row in rows),
        "longest_seconds_until_gone": max(own, default=0),
        "longest_seconds_until_the_command_ends": max(others, default=0),
        "longest_seconds_after_ctrl_c": max(asked, default=0),
        "exit_codes_after_ctrl_c": dict(
            sorted(Counter(str(one["command"]) for one in kills if one["how"] == "ctrl-c").items())
        ),
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in rows) / 60, 1),
        "faults": faults,
    }
    with suppress(OSError):
        (HERE / "results" / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    if say:
        print(json.dumps({key: value for key, value in result.items() if key != "faults"}))
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=86400.0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/segfleet-chaos"))
    parser.add_argument("--only", default="", help="a word of the scenario's name")
    code = main(parser.parse_args())
    sys.stdout.flush()
    os._exit(code)  # compilers complain of their own leaks at the end of a process
