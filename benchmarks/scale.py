"""How cost grows with the number of pictures, from the raw folder to the first epoch.

    python benchmarks/scale.py 2000 20000 100000      pictures of 64 x 64, kept in --folder
    python benchmarks/scale.py 20000 --label before   figures of another version beside today's
    python benchmarks/scale.py 100000 --table         a manifest without shards: open, draws
    python benchmarks/scale.py 20000 --only check     steps of this name; others keep their figures

Every step is a process of its own: CPU seconds of it and of all that it started, the largest
resident memory of any one of them, and the files that are there afterwards. Check and preprocess
run with one worker and with two. `open` and `draws` are measured inside their process, without
imports; a loader process's own memory is what it does not share (USS).

CPU seconds grow with what else the machine does: `loop_ms` is what a fixed loop of Python took
beside a step, so steps of different hours may be compared.

Results: benchmarks/results/scale.json, by label and number of pictures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

RESULTS = Path(__file__).parent / "results/scale.json"
PR_SET_CHILD_SUBREAPER = 36
EDGE = 64
PATIENT = 10  # pictures of one

OPEN = """
import json, os, resource, sys, time
from segfleet.preprocess.stores.base import open_store
import numpy, pydantic
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
first, before = time.process_time(), resident()
store = open_store(sys.argv[1])
count = len(store.manifest.cases)
print(json.dumps({"inside_s": round(time.process_time() - first, 3), "cases": count,
                  "grown_mb": round(resident() - before, 1)}))
"""

DRAWS = """
import json, sys, time
from segfleet.preprocess.stores.base import open_store
from segfleet.pipeline.data.sampler import PatchSampler
store = open_store(sys.argv[1])
manifest = store.manifest
train = set(manifest.fold("kfold", 0)["train"])
first = time.process_time()
sampler = PatchSampler(cases=manifest.cases.among(train),
                       patch=(1, 32, 32), batch=16, foreground=1 / 3, seed=7)
steps = len(train) // 16
for index in range(steps * 16):
    sampler.draw(0, 0, index, steps)
print(json.dumps({"inside_s": round(time.process_time() - first, 3), "draws": steps * 16}))
"""

BATCH = """
import json, os, sys, time
import psutil
from segfleet.preprocess.stores.base import open_store
from segfleet.pipeline.data import loader
from segfleet.pipeline.data.sampler import PatchSampler
if __name__ == "__main__":
    store = open_store(sys.argv[1])
    manifest = store.manifest
    train = set(manifest.fold("kfold", 0)["train"])
    sampler = PatchSampler(cases=manifest.cases.among(train),
                           patch=(1, 32, 32), batch=16, foreground=1 / 3, seed=7)
    patches = loader.Patches(store, sampler, 0, 100, None, False)
    batches = loader.batches(patches, loader.Schedule(0, 1, 100, 16, 1, 0, 1), 2)
    next(batches)
    own = []
    for child in psutil.Process().children(recursive=True):
        if child.num_threads() > 1:
            own.append(round(child.memory_full_info().uss / 2**20, 1))
    print(json.dumps({"loader_uss_mb": sorted(own)}))
    batches.close()
"""


def write_pictures(root: Path, count: int) -> Path:
    """`count` pictures of noise and a bright spot, a mask beside each, ten of a patient; once."""
    raw = root / f"raw-{count}"
    if (raw / "complete").exists():
        return raw
    shutil.rmtree(raw, ignore_errors=True)
    for part in ("images", "masks"):
        (raw / part).mkdir(parents=True)
    generator = np.random.default_rng(count)
    rows = ["case,patient"]
    for index in range(count):
        name = f"case{index:06d}"
        picture = generator.integers(40, 160, (EDGE // 4, EDGE // 4, 3), dtype=np.uint8)
        picture = Image.fromarray(picture).resize((EDGE, EDGE), Image.Resampling.BILINEAR)
        mask = Image.new("L", (EDGE, EDGE))
        y, x, size = generator.integers(4, EDGE - 24, 2).tolist() + [int(generator.integers(6, 20))]
        box = (x, y, x + size, y + size)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        ImageDraw.Draw(picture).ellipse(box, fill=(220, 120, 90))
        picture.save(raw / "images" / f"{name}.png", compress_level=1)
        mask.save(raw / "masks" / f"{name}.png", compress_level=1)
        rows.append(f"{name},p{index // PATIENT:05d}")
    (raw / "patients.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (raw / "complete").touch()
    return raw


def loop_ms() -> float:
    """CPU ms of a fixed loop of Python, the median of many."""
    taken = []
    for _ in range(60):
        began, seen = time.process_time(), {}
        for number in range(20_000):
            seen[number % 977] = str(number)
        taken.append(time.process_time() - began)
    return round(1e3 * sorted(taken)[30], 2)


def measured(command: Sequence[str], scratch: Path) -> dict:
    """A command and all it leaves behind: CPU seconds, wall seconds, largest resident memory of a
    process, and what it prints."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    log = open(scratch / "out.txt", "w+", encoding="utf-8")
    loop = loop_ms()
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    cpu, most, code = 0.0, 0, None
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            break
        cpu += usage.ru_utime + usage.ru_stime
        most = max(most, usage.ru_maxrss)
        if pid == child.pid:
            code = child.returncode = os.waitstatus_to_exitcode(status)
    wall = round(time.monotonic() - began, 2)
    log.seek(0)
    text = log.read()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{text[-3000:]}")
    return {
        "cpu_s": round(cpu, 2),
        "wall_s": wall,
        "peak_mb": round(most / 1024, 1),
        "loop_ms": [loop, loop_ms()],
        "text": text,
    }


def files_in(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def write_table(root: Path, count: int) -> Path:
    """A manifest as that of `count` pictures with 256 sampled voxels each: no shards, no
    pictures."""
    from segfleet.preprocess.stores.case_table import CaseTable
    from segfleet.preprocess.stores.manifest import (
        CaseEntry,
        Dataset,
        Manifest,
        Plan,
        save_manifest,
    )

    store = root / f"table-{count}"
    store.mkdir(parents=True, exist_ok=True)
    if (store / "manifest.json").exists():
        return store
    draw = np.random.default_rng(count)
    grid = {"shape": (1, EDGE, EDGE), "raw_shape": (1, EDGE, EDGE), "spacing": (1.0,) * 3}
    cases = (
        CaseEntry(
            id=f"case{index:06d}",
            group=f"p{index // PATIENT:05d}",
            shard=f"shards/{index // 1000:05d}",
            key=f"case{index % 1000:05d}",
            crop=((0, 1), (0, EDGE), (0, EDGE)),
            raw_spacing=(1.0,) * 3,
            voxels={0: EDGE**2 - 300, 1: 300},
            foreground={1: tuple(draw.integers(0, EDGE**2, 256).tolist())},
            sha256=f"{index:064x}",
            source_sha256=f"{index:064x}",
            image_sha256=f"{index:032x}",
            image_file=f"images/case{index:06d}.png",
            **grid,
        )
        for index in range(count)
    )
    ids = [f"case{index:06d}" for index in range(count)]
    folds = tuple(
        {
            "train": tuple(name for n, name in enumerate(ids) if n % 5 != fold),
            "val": tuple(ids[fold::5]),
        }
        for fold in range(5)
    )
    names = ("R", "G", "B")
    dataset = {"name": "table", "reader": "folder", "dims": 2, "channels": names}
    manifest = Manifest(
        format="zarr",
        dataset=Dataset(**dataset, labels={"background": 0, "spot": 1}),
        plan=Plan(target_spacing=(0, 0, 0), patch=(1, 64, 64), normalisation=("rgb_to_0_1",) * 3),
        cases=CaseTable.of(cases),
        splits={"kfold": folds},
    )
    save_manifest(store, manifest)
    return store


def one_table(count: int, root: Path) -> dict:
    store, steps = write_table(root, count), {}
    for name, script in (("open", OPEN), ("draws", DRAWS)):
        found = measured([sys.executable, "-c", script, str(store)], root)
        lines = [line for line in found.pop("text").splitlines() if line.startswith("{")]
        steps[name] = {**found, **json.loads(lines[-1])}
        print(f"{count:>7,} {name:<28} {steps[name]}", flush=True)
    steps["bytes"] = sum(path.stat().st_size for path in store.iterdir())
    return steps


def one_size(count: int, root: Path, keep: bool, only: str) -> dict:
    raw, python = write_pictures(root, count), sys.executable
    segfleet = [python, "-m", "segfleet.cli.main"]
    steps: dict[str, dict] = {}

    def step(name: str, command: Sequence[str], **facts) -> None:
        if not name.startswith(only):
            return
        found = measured(command, root)
        lines = [line for line in found.pop("text").splitlines() if line.startswith("{")]
        inside = json.loads(lines[-1]) if command[0] == python and "-c" in command else {}
        inside = json.loads(lines[-1]) if name in ("open", "first batch", "draws") else inside
        steps[name] = {**found, **inside, **facts}
        print(f"{count:>7,} {name:<28} {steps[name]}", flush=True)

    for workers in (1, 2):
        check = ["datasets", "folder", "check", str(raw), "--workers", str(workers)]
        step(f"check, {workers} worker(s)", [*segfleet, *check])
    store = root / f"store-{count}"
    for workers in (2, 1) if "preprocess".startswith(only) or only.startswith("pre") else ():
        shutil.rmtree(store, ignore_errors=True)
        make = ["preprocess", "folder", "--raw", str(raw), "--out", str(store)]
        make += ["--workers", str(workers)]
        step(f"preprocess, {workers} worker(s)", [*segfleet, *make])
    steps["store"] = {
        "files": files_in(store),
        "bytes": sum(path.stat().st_size for path in store.rglob("*") if path.is_file()),
        "manifest_bytes": sum(path.stat().st_size for path in store.glob("*") if path.is_file()),
    }
    make = ["preprocess", "folder", "--raw", str(raw), "--out", str(store), "--workers", "1"]
    step("compare", [*segfleet, *make])
    script = root / "first_batch.py"
    script.write_text(BATCH, encoding="utf-8")
    step("open", [python, "-c", OPEN, str(store)])
    step("first batch", [python, str(script), str(store)])
    step("draws", [python, "-c", DRAWS, str(store)])
    if not keep:
        shutil.rmtree(store, ignore_errors=True)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, help="scratch; kept if given")
    parser.add_argument("--label", default="now")
    parser.add_argument("--only", default="", help="steps whose name begins so")
    parser.add_argument("--table", action="store_true", help="a manifest alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    root = options.folder or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    for count in options.pictures:
        if options.table:
            steps = one_table(count, root)
        else:
            steps = one_size(count, root, bool(options.folder), options.only)
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
        size = f"{count} cases, manifest alone" if options.table else str(count)
        mine = known.setdefault(options.label, {}).setdefault(size, {})
        mine |= {"load": round(os.getloadavg()[0], 1), **steps}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if not options.folder:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
