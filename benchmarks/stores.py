"""Random 3D patches from both store formats against zarr-python, h5py, raw npy and nnU-Net v2's
blosc2 layout.

    python benchmarks/stores.py [--seconds 1.5] [--folder DIR] [--out
    benchmarks/results/stores.json]

One process, one thread, warm page cache. Every reader returns the same float32 patch (checked) and
takes its turn in every round. Reported are medians of the processor time of one read, which a busy
machine does not falsify as it does the clock (also listed), and the ratio to nnU-Net's layout. That
one needs `pip install blosc2`; without it the ratio is to raw npy. h5py on our files needs `pip
install hdf5plugin`. Only our stores, and zarr-python on their files, verify checksums as they read.
Last, the same with 1 and 2 reading processes, as loaders have them: our stores and nnU-Net's in
turns.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import h5py
import numpy as np
import zarr
from scipy import ndimage

from segfleet.pipeline.data.unpack import unpack
from segfleet.preprocess.stores.base import store_module
from segfleet.preprocess.stores.chunks import chunk_of
from segfleet.preprocess.stores.manifest import CaseEntry, Dataset, Manifest, Plan

try:
    import blosc2
except ImportError:
    blosc2 = None
try:
    import hdf5plugin  # for h5py on our files
except ImportError:
    hdf5plugin = None

SHAPE, VOLUMES = (128, 256, 256), 4
PATCHES = {"3D": (64, 96, 96), "cube": (128, 128, 128)}
NNUNET = "nnU-Net 2.8 as it is (float32), kept open"


@dataclass
class Contender:
    """A way to read: `patch(volume, box)` gives float32 (C, z, y, x), `label(volume, box)` uint8;
    `bytes` on disk of image and label."""

    name: str
    patch: Callable
    label: Callable
    bytes: tuple[int, int]
    files: int
    write_s: float


def synthetic_ct(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU (Z, Y, X): a body in air, organs, smooth texture and 12 HU of noise; and the uint8
    label of the organs."""
    draw = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    hu, label = np.where(body, np.float32(40), np.float32(-1000)), np.zeros(SHAPE, np.uint8)
    for organ in range(12):
        centre, radius = draw.uniform(-0.5, 0.5, 3), draw.uniform(0.05, 0.3, 3)
        inside = ((z - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 + (
            (x - centre[2]) / radius[2]
        ) ** 2 < 1
        hu[inside], label[inside] = draw.uniform(-100, 300), 1 + organ % 4
    texture = ndimage.gaussian_filter(draw.standard_normal(SHAPE, dtype=np.float32), 3)
    hu += texture / texture.std() * 20 + draw.standard_normal(SHAPE, dtype=np.float32) * np.where(
        body, 12, 4
    )
    return np.clip(hu, -1024, 3000).round().astype(np.int16), label


def boxes(
    patch: tuple[int, int, int], seed: int = 1
) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
    draw = np.random.default_rng(seed)
    while True:
        at = [int(draw.integers(0, n - p + 1)) for n, p in zip(SHAPE, patch, strict=True)]
        z, y, x = (slice(a, a + p) for a, p in zip(at, patch, strict=True))
        yield int(draw.integers(VOLUMES)), (z, y, x)


def size(folder: Path, has: str = "") -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and has in f.as_posix())


def ours(
    folder: Path,
    fmt: str,
    images: list,
    labels: list,
    chunk: tuple[int, int, int],
    codec: str = "blosc",
) -> list[Contender]:
    """Our store of a format, and the library that reads a copy of the files (HDF5 would share open
    files between the two)."""
    began, module = time.process_time(), store_module(fmt)
    files: dict[str, dict] = {}
    shas: list[str] = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        writer = module.Writer(
            folder, f"data/case-{i}", chunk=chunk, dtype=image.dtype.name, codec=codec
        )
        shas.append(writer.write("case", image[None], label, None))
        files |= writer.publish()
    wrote = time.process_time() - began
    facts = {
        "spacing": (1, 1, 1),
        "crop": ((0, 1),) * 3,
        "raw_shape": SHAPE,
        "raw_spacing": (1, 1, 1),
        "key": "case",
        "shape": SHAPE,
    }
    cases = tuple(
        CaseEntry(id=f"case-{i}", group=str(i), shard=f"data/case-{i}", sha256=sha, **facts)
        for i, sha in enumerate(shas)
    )
    dataset = Dataset(
        name="synthetic", reader="none", dims=3, channels=("ct",), labels={"background": 0}
    )
    plan = Plan(
        target_spacing=(1, 1, 1),
        patch=PATCHES["3D"],
        normalisation=("none",),
        dtype=images[0].dtype.name,
    )
    store = module.Store(
        folder, Manifest(format=fmt, id="", dataset=dataset, plan=plan, cases=cases, files=files)
    )
    on_disk = (size(folder) if fmt == "hdf5" else size(folder, "/image/"), size(folder, "/label/"))

    plain = module.Store(folder, store.manifest)
    store.fill = unpack  # as the loader reads

    def lengths(box):
        return tuple(s.stop - s.start for s in box)

    title = f"segfleet {fmt} {'x'.join(map(str, chunk))}"
    found = [
        Contender(
            title,
            lambda i, box: store.image(cases[i], box, np.empty((1, *lengths(box)), np.float32)),
            lambda i, box: store.label(cases[i], box, np.empty(lengths(box), np.uint8)),
            on_disk,
            len(files),
            wrote,
        ),
        Contender(
            f"{title}, without a compiler",
            lambda i, box: plain.image(cases[i], box),
            lambda i, box: plain.label(cases[i], box),
            on_disk,
            len(files),
            wrote,
        ),
    ]
    if fmt == "hdf5" and hdf5plugin is None:
        return found
    copy = shutil.copytree(folder, folder.with_name(folder.name + "-copy"))
    if fmt == "zarr":
        arrays = [zarr.open_group(copy / f"{case.shard}.zarr", mode="r") for case in cases]
    else:
        arrays = [
            h5py.File(copy / f"{case.shard}.h5", "r", rdcc_nbytes=2**20)["case"] for case in cases
        ]
    library = "zarr-python" if fmt == "zarr" else "h5py"
    image, label = [a["image"] for a in arrays], [a["label"] for a in arrays]
    found.append(
        Contender(
            f"{library} on those files",
            lambda i, box: image[i][(slice(None), *box)].astype(np.float32),
            lambda i, box: label[i][box],
            on_disk,
            len(files),
            wrote,
        )
    )
    return found


def raw_npy(folder: Path, images: list, labels: list) -> Contender:
    began = time.process_time()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        np.save(folder / f"image-{i}.npy", image)
        np.save(folder / f"label-{i}.npy", label)
    wrote = time.process_time() - began
    image, label = (
        [np.load(folder / f"{kind}-{i}.npy", mmap_mode="r") for i in range(VOLUMES)]
        for kind in ("image", "label")
    )
    return Contender(
        "npy memmap, uncompressed",
        lambda i, box: image[i][box][None].astype(np.float32),
        lambda i, box: np.array(label[i][box]),
        (size(folder, "image-"), size(folder, "label-")),
        2 * VOLUMES,
        wrote,
    )


def nnunet_partition(
    patch: tuple[int, int, int], itemsize: int, block_bytes: float, chunk_bytes: float
) -> tuple[tuple, tuple]:
    """Chunk and block (C, z, y, x) by nnU-Net v2's rule: the block fits the inner cache, the chunk
    the outer one and 1.5 patches."""
    block = [2 ** math.ceil(math.log2(p)) for p in patch]
    while math.prod(block) * itemsize > block_bytes:
        axis = max(range(3), key=lambda a: block[a] / patch[a])
        block[axis] //= 2
    block = [min(b, n) for b, n in zip(block, SHAPE, strict=True)]
    chunk = list(block)
    while free := [a for a in range(3) if chunk[a] + block[a] <= min(1.5 * patch[a], SHAPE[a])]:
        axis = min(free, key=lambda a: chunk[a] / patch[a])
        if math.prod(chunk) // chunk[axis] * (chunk[axis] + block[axis]) * itemsize > chunk_bytes:
            break
        chunk[axis] += block[axis]
    return (1, *chunk), (1, *block)


def nnunet(
    folder: Path,
    images: list,
    labels: list,
    name: str,
    *,
    codec: str,
    level: int,
    block: float,
    chunk: float,
) -> list[Contender]:
    """One .b2nd per image and per label (int16, as nnU-Net keeps it), memory-mapped; of every array
    the filter that packs it better, none or shuffle, as nnU-Net 2.8 picks them."""
    blosc2.set_nthreads(1)
    began = time.process_time()

    def save(array: np.ndarray, kind: str, i: int) -> Path:
        chunks, blocks = nnunet_partition(PATCHES["3D"], array.itemsize, block, chunk)
        path = folder / f"{kind}-{i}.b2nd"
        packed = [
            blosc2.asarray(
                np.ascontiguousarray(array[None]),
                chunks=chunks,
                blocks=blocks,
                cparams={
                    "codec": blosc2.Codec[codec],
                    "clevel": level,
                    "filters": [blosc2.Filter[bits]],
                    "nthreads": 1,
                },
            )
            for bits in ("NOFILTER", "SHUFFLE")
        ]
        min(packed, key=lambda one: one.schunk.cbytes).save(str(path), mode="w")
        return path

    arrays = {"image": images, "label": [label.astype(np.int16) for label in labels]}
    paths = {
        kind: [save(array, kind, i) for i, array in enumerate(some)]
        for kind, some in arrays.items()
    }
    wrote = time.process_time() - began

    def opened(path: Path):
        return blosc2.open(urlpath=str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})

    image, label = ([opened(path) for path in paths[kind]] for kind in ("image", "label"))
    on_disk = size(folder, "image-"), size(folder, "label-")
    kept = Contender(
        f"{name}, kept open",
        lambda i, box: image[i][(slice(None), *box)].astype(np.float32, copy=False),
        lambda i, box: label[i][(slice(None), *box)][0].astype(np.uint8),
        on_disk,
        2 * VOLUMES,
        wrote,
    )
    each = Contender(
        f"{name}, opened per patch as it does",
        lambda i, box: opened(paths["image"][i])[(slice(None), *box)].astype(
            np.float32, copy=False
        ),
        lambda i, box: opened(paths["label"][i])[(slice(None), *box)][0].astype(np.uint8),
        on_disk,
        2 * VOLUMES,
        wrote,
    )
    return [kept, each]


def contenders(folder: Path, images: list, labels: list) -> list[Contender]:
    dtype = images[0].dtype

    def place(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    found = []
    if blosc2:
        how = {"codec": "LZ4HC", "level": 5, "block": 128 * 2**10, "chunk": 6 * 2**20}
        floats = [image.astype(np.float32) for image in images]
        found += nnunet(
            place("b2nd-f32"), floats, labels, NNUNET.removesuffix(", kept open"), **how
        )
        if dtype != np.float32:
            found += nnunet(place("b2nd"), images, labels, f"nnU-Net layout in {dtype}", **how)[:1]
    found.append(raw_npy(place("npy"), images, labels))
    chosen = chunk_of(PATCHES["3D"], SHAPE, dtype.itemsize)
    for chunk in dict.fromkeys((chosen, (32, 64, 64))):
        for fmt in ("zarr", "hdf5"):
            some = ours(place(f"{fmt}-{chunk}"), fmt, images, labels, chunk)
            found += some if chunk == chosen else some[:1]
    bare = ours(place("zarr-zstd"), "zarr", images, labels, chosen, "zstd")
    found += [replace(one, name=f"{one.name} --codec zstd") for one in bare[:1]]
    return found


def measure(
    found: list[Contender], patch: tuple[int, int, int], images: list, labels: list, seconds: float
) -> list[dict]:
    """Medians in ms over rounds in which every contender reads the same patch."""
    image_ms, label_ms, wall_ms = ({c.name: [] for c in found} for _ in range(3))
    deadline = time.perf_counter() + seconds * len(found)
    for turn, (i, box) in enumerate(boxes(patch)):
        for contender in found[turn % len(found) :] + found[: turn % len(found)]:
            wall, began = time.perf_counter(), time.process_time()
            image = contender.patch(i, box)
            between = time.process_time()
            label = contender.label(i, box)
            done, wall = time.process_time(), time.perf_counter() - wall
            if turn < 8:
                right = np.array_equal(
                    image[0], images[i][box].astype(np.float32)
                ) and np.array_equal(label, labels[i][box])
                assert right and image.dtype == np.float32, contender.name
            else:
                image_ms[contender.name].append(1e3 * (between - began))
                label_ms[contender.name].append(1e3 * (done - between))
                wall_ms[contender.name].append(1e3 * wall)
        if time.perf_counter() > deadline and turn > 12:
            break
    median = {c.name: statistics.median(image_ms[c.name]) for c in found}
    median_label = {c.name: statistics.median(label_ms[c.name]) for c in found}
    reference = next(
        (c for c in found if c.name == NNUNET), next(c for c in found if c.name.startswith("npy"))
    )
    return [
        {
            "reader": c.name,
            "image_ms": round(median[c.name], 3),
            "label_ms": round(median_label[c.name], 3),
            "wall_ms": round(statistics.median(wall_ms[c.name]), 3),
            "speed": round(
                (median[reference.name] + median_label[reference.name])
                / (median[c.name] + median_label[c.name]),
                2,
            ),
            "MB": round(sum(c.bytes) / 1e6, 1),
            "size": round(sum(c.bytes) / sum(reference.bytes), 2),
            "files": c.files,
            "write_MB_s": round(sum(a.nbytes for a in images + labels) / 1e6 / c.write_s),
            "rounds": len(image_ms[c.name]),
        }
        for c in found
    ]


def read_many(
    contender: Contender, patch: tuple[int, int, int], seed: int, count: int, tell
) -> None:
    """In a process of its own: ms of processor time per patch and label, the opening of the files
    not counted."""
    some = boxes(patch, seed)
    for _ in range(8):
        i, box = next(some)
        contender.patch(i, box), contender.label(i, box)
    began = time.process_time()
    for _ in range(count):
        i, box = next(some)
        contender.patch(i, box), contender.label(i, box)
    tell.put(1e3 * (time.process_time() - began) / count)


def measure_workers(
    found: list[Contender], patch: tuple[int, int, int], rounds: int = 5, count: int = 30
) -> list[dict]:
    """Medians over rounds in which our stores and nnU-Net's are read by the same number of
    processes, one contender after another."""
    context = multiprocessing.get_context("fork")
    chosen = [c for c in found if c.name == NNUNET]
    chosen += [
        next(c for c in found if c.name.startswith(f"segfleet {fmt}")) for fmt in ("zarr", "hdf5")
    ]
    rows = []
    for workers in (1, 2):
        taken: dict[str, list[float]] = {c.name: [] for c in chosen}
        for turn in range(rounds):
            for contender in chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]:
                tell = context.SimpleQueue()
                orders = [(contender, patch, 100 * turn + w, count, tell) for w in range(workers)]
                children = [context.Process(target=read_many, args=order) for order in orders]
                for child in children:
                    child.start()
                taken[contender.name] += [tell.get() for _ in children]
                for child in children:
                    child.join()
        medians = {name: statistics.median(ms) for name, ms in taken.items()}
        for name, ms in medians.items():
            speed = round(medians[chosen[0].name] / ms, 2)
            rows.append(
                {
                    "reader": name,
                    "workers": workers,
                    "ms": round(ms, 3),
                    "speed": speed,
                    "rounds": rounds,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="per reader, patch size and dtype"
    )
    parser.add_argument(
        "--folder", type=Path, help="the disk to measure; default: a temporary folder"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "stores.json"
    )
    arguments = parser.parse_args()
    made = [synthetic_ct(seed) for seed in range(VOLUMES)]
    labels = [label for _, label in made]
    variants = {
        "int16": [hu for hu, _ in made],
        "float16": [((hu - hu.mean()) / hu.std()).astype(np.float16) for hu, _ in made],
    }
    machine = {
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "zarr": zarr.__version__,
        "h5py": h5py.__version__,
    }
    machine |= {"hdf5": h5py.version.hdf5_version, "blosc2": getattr(blosc2, "__version__", None)}
    result = {"machine": machine, "shape": SHAPE, "volumes": VOLUMES, "tables": {}, "workers": {}}
    folder = Path(tempfile.mkdtemp(prefix="stores-", dir=arguments.folder))
    try:
        for dtype, images in variants.items():
            found = contenders(folder / dtype, images, labels)
            for patch in PATCHES.values():
                title = f"{dtype}, patch {'x'.join(map(str, patch))}"
                rows = measure(found, patch, images, labels, arguments.seconds)
                result["tables"][title] = rows
                print(
                    f"\n{title}\n{'reader':58} image ms label ms  (wall)  speed     MB   size "
                    "files write MB/s"
                )
                for r in rows:
                    times = (
                        f"{r['image_ms']:8.2f} {r['label_ms']:8.2f} {r['wall_ms']:7.2f} "
                        f"{r['speed']:6.2f}"
                    )
                    print(
                        f"{r['reader']:58} {times} {r['MB']:6.1f} {r['size']:6.2f} "
                        f"{r['files']:5d} {r['write_MB_s']:10d}"
                    )
                result["workers"][title] = measure_workers(found, patch)
                for r in result["workers"][title]:
                    print(
                        f"{r['workers']} reading: {r['reader']:47} {r['ms']:8.2f} "
                        f"{r['speed']:24.2f}"
                    )
    finally:
        shutil.rmtree(folder)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
