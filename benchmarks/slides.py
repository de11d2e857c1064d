"""Pictures of the size of slides: time and memory of the check, preprocessing and prediction.

    python benchmarks/slides.py
    python benchmarks/slides.py --edge 8000

A tiled TIFF in colours (deflate) of EDGE x EDGE pixels with a black and white mask (PNG), beside a
small case, in the layout `folder`. The network of the prediction is one convolution: what is
measured is what the rest takes. Memory is the most that all processes of a step held together.

Result: benchmarks/results/slides.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "slides.json"
TILE = 512
STEPS = ("check", "preprocess", "predict")


def make(folder: Path, edge: int) -> None:
    """A pink ground with dark discs, drawn tile by tile; the mask shows the discs."""
    import tifffile
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.indices((TILE, TILE)) - TILE // 2
    disc = y**2 + x**2 < (TILE // 4) ** 2
    noise = rng.integers(0, 12, (TILE, TILE, 1))
    tile = (np.where(disc[..., None], (110, 60, 140), (230, 200, 230)) + noise).astype(np.uint8)
    for name, size in (("small", 2 * TILE), ("slide", edge)):
        count = -(-size // TILE)
        tifffile.imwrite(
            folder / f"images/{name}.tif", (tile for _ in range(count**2)), shape=(size, size, 3),
            dtype=np.uint8, tile=(TILE, TILE), compression="zlib", photometric="rgb",
        )  # fmt: skip
        mask = np.tile(disc, (count, count))[:size, :size]
        Image.fromarray(mask).save(folder / f"masks/{name}.png")


def step(name: str, raw: Path, out: Path) -> None:
    from segfleet.preprocess.building.build import build
    from segfleet.preprocess.building.request import BuildRequest
    from segfleet.preprocess.checking.check import survey
    from segfleet.preprocess.readers.base import open_reader

    if name == "check":
        survey(open_reader("folder", raw), workers=1).raise_problems()
    elif name == "preprocess":
        build(BuildRequest("folder", raw, out / "store", workers=1))
    else:
        predict(raw, out)


def predict(raw: Path, out: Path) -> None:
    import torch

    from segfleet.core.parallel import Apart
    from segfleet.pipeline.inference.ensemble import Member
    from segfleet.pipeline.inference.predict import Wishes, predict_files
    from segfleet.pipeline.task import make_task
    from segfleet.preprocess.stores.manifest import load_manifest

    manifest = load_manifest(out / "store")
    task, conv = make_task(manifest.dataset, "softmax"), torch.nn.Conv2d(3, 2, 3, padding=1)
    member = Member(
        forward=lambda: lambda tiles: task.scores(conv(tiles)),
        plan=manifest.plan, task=task, patch=(1, TILE, TILE), overlap=0.0,
    )  # fmt: skip
    with Apart() as apart:
        answer = predict_files(
            [member], manifest.dataset, [raw / "images/slide.tif"], out / "found",
            wishes=Wishes(read=lambda one: one.read_apart(apart)),
        )  # fmt: skip
    assert not answer["failed"], answer["failed"]


def measured(name: str, raw: Path, out: Path) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, __file__, "--step", name, str(raw), str(out)]
    process, peak = subprocess.Popen(words), 0
    while process.poll() is None:
        peak = max(peak, sum(map(held, family(process.pid))))
        time.sleep(0.1)
    assert process.returncode == 0, f"{name} failed"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(cpu, 1), "peak_gib": round(peak / 2**30, 2)}


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [one for child in task.read_text().split() for one in family(int(child))]
        except OSError:
            continue  # it has ended
    return found


def held(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edge", type=int, default=20_000)
    parser.add_argument("--step", nargs=3, metavar=("NAME", "RAW", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step(options.step[0], Path(options.step[1]), Path(options.step[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "out"
        make(raw, options.edge)
        stored = (raw / "images/slide.tif").stat().st_size
        values = 3 * options.edge**2
        document = {"edge": options.edge, "values_gib": round(values / 2**30, 2),
                    "file_mib": round(stored / 2**20, 1)}  # fmt: skip
        for name in STEPS:
            document[name] = measured(name, raw, out)
            print(name, document[name], flush=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
