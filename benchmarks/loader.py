"""The whole training loader, from the store to an augmented batch, against nnU-Net's: voxels per
CPU second.

    python benchmarks/loader.py --nnunet ENVIRONMENT/bin/python [--rounds 3] [--only 64x128x128]
    [--workers 0 2] [--out benchmarks/results/loader.json]

The same synthetic cases are written once by each program's own writer (nnU-Net: float32, level 5,
the filter it picks per array, its blocks and chunks). Both then draw batches of two with their
default training augmentation, in turns, each in a process of its own, one thread a process, every
round with another seed; what is counted is the CPU time of that process and its loader processes
after the first batches, so start-up is left out. nnU-Net's targets for deep supervision are left
out too, since ours are made on the device. ENVIRONMENT holds nnunetv2 (benchmarks/preprocess.py
installs one).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

# name -> patch, shape of a case, channels, cases, batches of a turn
SETS = {
    "32x48x32": ((32, 48, 32), (36, 50, 35), 1, 40, 400),
    "64x128x128": ((64, 128, 128), (110, 280, 280), 1, 4, 30),
    "128x128x128": ((128, 128, 128), (160, 220, 220), 1, 3, 16),
    "128x128x128, 4 channels": ((128, 128, 128), (140, 180, 150), 4, 3, 8),
    "256x256x3": ((1, 256, 256), (1, 320, 360), 3, 40, 400),
    "512x512x1": ((1, 512, 512), (1, 512, 512), 1, 40, 240),
}
BATCH = 2


def synthetic(
    shape: tuple[int, ...], channels: int, seed: int, colour: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(C, z, y, x) float32, smooth organs with noise, as normalised; uint8 label of up to 4."""
    from scipy import ndimage

    draw = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) if n > 1 else np.zeros(1) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    label, image = np.zeros(shape, np.uint8), np.zeros((channels, *shape), np.float32)
    for organ in range(10):
        centre, radius = draw.uniform(-0.6, 0.6, 3), draw.uniform(0.1, 0.4, 3)
        if shape[0] == 1:
            centre[0] = 0
        inside = sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radius, strict=True))
        label[inside < 1] = 1 + organ % 4
        image[:, inside < 1] = draw.uniform(-1.5, 1.5, (channels, 1))
    for channel in image:
        grain = draw.standard_normal(shape, dtype=np.float32)
        texture = ndimage.gaussian_filter(grain, [2 if n > 1 else 0 for n in shape])
        channel += 0.3 * texture / texture.std() + 0.1 * draw.standard_normal(shape, np.float32)
    if colour:
        image = np.rint(np.clip(image * 50 + 128, 0, 255)) / np.float32(255)
    return image.astype(np.float32), label


def cases(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    _, shape, channels, count, _ = SETS[name]
    return [synthetic(shape, channels, seed, name == "256x256x3") for seed in range(count)]


def write_ours(name: str, folder: Path) -> None:
    from segfleet.preprocess.stores.base import store_module
    from segfleet.preprocess.stores.chunks import chunk_of
    from segfleet.preprocess.stores.manifest import (
        CaseEntry,
        Dataset,
        Manifest,
        Plan,
        layout_of,
        save_manifest,
    )
    from segfleet.preprocess.transforms.case_transforms import foreground

    patch, shape, channels, *_ = SETS[name]
    dtype = "uint8" if name == "256x256x3" else "float16"
    files, entries = {}, []
    chunk = chunk_of(patch, shape, channels * np.dtype(dtype).itemsize)
    writer = store_module("zarr").Writer(folder, "data/all", chunk=chunk, dtype=dtype)
    for k, (image, label) in enumerate(cases(name)):
        stored = np.rint(image * 255).astype("uint8") if dtype == "uint8" else image.astype(dtype)
        sha256 = writer.write(f"case-{k}", stored, label, None)
        voxels, drawn = foreground(label, f"case-{k}", None)
        entries.append(
            CaseEntry(
                id=f"case-{k}",
                group=str(k),
                shard="data/all",
                key=f"case-{k}",
                shape=shape,
                spacing=(1, 1, 1),
                crop=tuple((0, n) for n in shape),
                raw_shape=shape,
                raw_spacing=(1, 1, 1),
                voxels=voxels,
                foreground=drawn,
                sha256=sha256,
            )
        )
    files |= writer.publish()
    labels = {"background": 0, **{f"organ {k}": k for k in range(1, 5)}}
    save_manifest(
        folder,
        Manifest(
            format="zarr",
            layout=layout_of("zarr"),
            id="benchmark",
            dataset=Dataset(
                name="synthetic",
                reader="none",
                dims=2 if shape[0] == 1 else 3,
                channels=tuple(f"channel {c}" for c in range(channels)),
                labels=labels,
            ),
            plan=Plan(
                target_spacing=(1, 1, 1),
                patch=patch,
                normalisation=("zscore",) * channels,
                dtype=dtype,
                scale=1 / 255 if dtype == "uint8" else 1.0,
            ),
            cases=tuple(entries),
            files=files,
        ),
    )


def ours(name: str, folder: Path, workers: int, seed: int):
    from segfleet.pipeline.data import loader
    from segfleet.pipeline.data.sampler import PatchSampler
    from segfleet.pipeline.sections import Augment
    from segfleet.preprocess.stores.base import open_store

    store = open_store(folder)
    sampler = PatchSampler(
        cases=store.manifest.cases, patch=SETS[name][0], batch=BATCH, foreground=1 / 3, seed=seed
    )
    patches = loader.Patches(store, sampler, 0, 100_000, Augment(), False)
    schedule = loader.Schedule(0, 1, 100_000, BATCH, 1, 0, 1)
    for batch in loader.batches(patches, schedule, workers):
        yield batch.image


def write_nnunet(name: str, folder: Path) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import (
        comp_blosc2_params,
        nnUNetDatasetBlosc2,
    )

    patch = tuple(p for p in SETS[name][0] if p > 1)
    folder.mkdir()
    for k, (image, label) in enumerate(cases(name)):
        label = label.astype(np.int16)[None]
        places = DefaultPreprocessor._sample_foreground_locations(label, [1, 2, 3, 4])
        blocks, chunks = comp_blosc2_params(image.shape, patch, image.itemsize)
        blocks_seg, chunks_seg = comp_blosc2_params(label.shape, patch, label.itemsize)
        nnUNetDatasetBlosc2.save_case(
            image,
            label,
            {"class_locations": places},
            str(folder / f"case_{k}"),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks_seg,
            blocks_seg=blocks_seg,
        )


def nnunet(name: str, folder: Path, workers: int, seed: int):
    from types import SimpleNamespace

    import torch
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import (
        NonDetMultiThreadedAugmenter,
    )
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    np.random.seed(seed)
    torch.manual_seed(seed)
    patch = tuple(p for p in SETS[name][0] if p > 1)
    trainer = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch),
        print_to_log_file=lambda *a, **k: None,
    )
    rotation, dummy, first, axes = (
        nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
    )
    transforms = nnUNetTrainer.get_training_transforms(
        patch,
        rotation,
        None,
        axes,
        dummy,
        use_mask_for_norm=[False] * SETS[name][2],
        foreground_labels=[1, 2, 3, 4],
    )
    labels = SimpleNamespace(all_labels=[0, 1, 2, 3, 4], has_ignore_label=False)
    made = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder)),
        BATCH,
        first,
        patch,
        labels,
        oversample_foreground_percent=0.33,
        transforms=transforms,
    )
    if not workers:
        while True:
            yield next(made)["data"]
    several = NonDetMultiThreadedAugmenter(
        data_loader=made,
        transform=None,
        num_processes=workers,
        num_cached=max(6, workers // 2),
        seeds=[seed + k for k in range(workers)],
        pin_memory=False,
        wait_time=0.002,
    )
    try:
        while True:
            yield next(several)["data"]
    finally:
        several._finish()


SIDES = {"ours": (write_ours, ours), "nnunet": (write_nnunet, nnunet)}


def children() -> list[int]:
    """Processes under this one, at any depth."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            continue
    found, left = [], [os.getpid()]
    while left:
        parent = left.pop()
        below = [one for one, its in parents.items() if its == parent]
        found += below
        left += below
    return found


def cpu_seconds(below: list[int]) -> float:
    """Of this process and those `below` it, so far."""
    ended, total = resource.getrusage(resource.RUSAGE_CHILDREN), 0.0
    for one in below:
        with suppress(OSError):
            # in nanoseconds; /proc/PID/stat counts hundredths of a second
            total += sum(
                int((task / "schedstat").read_text().split()[0])
                for task in Path(f"/proc/{one}/task").iterdir()
            )
    return time.process_time() + ended.ru_utime + ended.ru_stime + total / 1e9


def memory(below: list[int]) -> int:
    """The largest PSS of a process, KiB."""
    most = 0
    for one in below:
        with suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            most = max(most, *(int(x.split()[1]) for x in lines if x.startswith("Pss:")))
    return most


def side(which: str, name: str, folder: Path, workers: int, seed: int) -> None:
    """In a process of its own: prints what was measured."""
    import torch

    torch.set_num_threads(1)
    if not folder.exists():
        return SIDES[which][0](name, folder)
    began = time.perf_counter()
    stream = SIDES[which][1](name, folder, workers, seed)
    image = next(stream)
    first = time.perf_counter() - began
    for _ in range(6 if workers else 2):
        next(stream)
    below, batches = children(), SETS[name][4]
    start = cpu_seconds(below)
    for _ in range(batches):
        next(stream)
    taken = cpu_seconds(below) - start
    voxels = batches * image.shape[0] * int(np.prod(image.shape[2:]))
    print(
        json.dumps(
            {
                "voxels_per_cpu_s": voxels / taken,
                "first_batch_s": first,
                "batches": batches,
                "worker_MiB": memory(below) / 1024,
            }
        ),
        flush=True,
    )
    if which == "nnunet":  # its processes outlive this one, and hold what it prints into
        for one in below:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nnunet", default="", help="python of an environment with nnunetv2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(SETS))
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 2])
    parser.add_argument(
        "--folder", type=Path, help="where cases are kept; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/loader.json")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        which, name, workers, seed = options.side
        return side(which, name, options.folder, int(workers), int(seed))
    pythons = {"ours": sys.executable}
    if options.nnunet:
        pythons["nnunet"] = options.nnunet
    scratch = None if options.folder else tempfile.TemporaryDirectory(prefix="loader-")
    folder = options.folder or Path(scratch.name)
    folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.only:
        places = {which: folder / f"{which} {name}" for which in pythons}

        def ask(
            which: str, workers: int, turn: int, name: str = name, places: dict = places
        ) -> dict | None:
            command = [pythons[which], __file__, "--side", which, name, str(workers), str(turn)]
            command += ["--folder", str(places[which])]
            noise = {**os.environ, "nnUNet_raw": "/tmp", "nnUNet_preprocessed": "/tmp"}
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                env={**noise, "nnUNet_results": "/tmp"},
            )
            lines = done.stdout.strip().splitlines()
            return json.loads(lines[-1]) if lines else None

        for which, place in places.items():
            if not place.exists():
                ask(which, 0, 0)
        for workers in options.workers:
            found: dict[str, list[dict]] = {which: [] for which in pythons}
            for turn in range(options.rounds):
                for which in list(pythons)[:: 1 - 2 * (turn % 2)]:
                    found[which].append(ask(which, workers, turn))
            row = {
                which: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
                # of all rounds together: which changes were drawn weighs more than the machine
                | {
                    "voxels_per_cpu_s": statistics.harmonic_mean(
                        [r["voxels_per_cpu_s"] for r in rows], [r["batches"] for r in rows]
                    )
                }
                for which, rows in found.items()
            }
            if "nnunet" in row:
                row["ratio"] = row["ours"]["voxels_per_cpu_s"] / row["nnunet"]["voxels_per_cpu_s"]
            result[f"{name}, {workers} workers"] = row
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            speeds = {w: f"{row[w]['voxels_per_cpu_s'] / 1e6:.2f} Mvoxel/CPU s" for w in pythons}
            print(
                f"{name}, {workers} workers: {speeds}, ratio {row.get('ratio', 0):.2f}, first "
                f"batch {row['ours']['first_batch_s']:.2f} s, worker "
                f"{row['ours']['worker_MiB']:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
