"""Preprocessing of the same raw volumes by segfleet and by nnU-Net v2: voxels per processor second,
memory, and a run killed half way.

    python benchmarks/preprocess.py [--cases 8] [--killed-cases 24] [--venv DIR] [--folder DIR]
    [--out benchmarks/results/preprocess.json]

Two synthetic sets in nnU-Net's layout, CT and MR, with differing spacings, so that every case is
resampled. Both programs check, measure, plan, resample and write with one process; processor time
is that of all their processes. Programs take a while to start: the cost of a voxel is taken between
a run over all cases and a run over two ("marginal"), and the whole run is reported as well. Memory
is the largest sum of proportional set sizes (PSS) of all processes of a run. nnU-Net is installed
into an environment of its own (--venv, kept between runs; without its optional packages, so that no
other torch comes along).

    --memory      segfleet alone on one CT of 1000 x 512 x 512 voxels: preprocess_memory.json
    --labels      a label of 104 classes resampled: preprocess_labels.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

TORCH = "torch==2.13.0"
BARE = (
    "nnunetv2",
    "acvl-utils",
    "dynamic-network-architectures",
    "batchgenerators",
    "batchgeneratorsv2",
    "fft-conv-pytorch",
)
WITH = (
    "connected-components-3d dicom2nifti nibabel SimpleITK scikit-image scikit-learn scipy pandas "
    "tifffile imagecodecs einops blosc2"
)
WITH += " tqdm matplotlib seaborn requests yacs graphviz threadpoolctl"
# name -> id, channel, middle spacing in mm
SETS = {
    "CT": (901, "CT", (2.5, 0.8, 0.8)),
    "MR": (902, "MRI", (1.2, 1.0, 1.0)),
}
SHAPE = (96, 224, 224)
LONG = (1000, 512, 512)  # a whole-body CT
FEW = 2
INTERVAL = 0.05  # s between two looks at memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--killed-cases", type=int, default=24)
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache/segfleet/nnunet")
    parser.add_argument("--folder", type=Path, default=None, help="scratch; removed at the end")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/preprocess.json"
    )
    parser.add_argument(
        "--memory", action="store_true", help="only measure the peak memory of one long CT"
    )
    parser.add_argument("--labels", action="store_true", help="only resample a label")
    options = parser.parse_args()
    if options.labels:
        return many_classes(options.out.with_name("preprocess_labels.json"))
    if options.memory:
        return long_ct(options.folder, options.out.with_name("preprocess_memory.json"))
    nnunet = install(options.venv)
    folder = Path(tempfile.mkdtemp(prefix="preprocess-", dir=options.folder))
    try:
        found = {name: measure(name, folder, options.cases, nnunet) for name in SETS}
        found["killed half way"] = killed(folder, options.killed_cases)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    document = {
        "machine": machine,
        "nnunetv2": version(nnunet),
        "shape": SHAPE,
        "cases": options.cases,
        "results": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def many_classes(out: Path) -> None:
    """Processor time a new voxel, of the product and of the maps of all classes, one after the
    other, which it has to equal to the bit."""
    from segfleet.preprocess.transforms.resample import resample_label, resample_probabilities

    shape, new_shape = (96, 160, 160), (140, 200, 200)
    rng = np.random.default_rng(0)
    seeds = rng.random((200, 3)) * np.array(shape)  # of organs, each around its own point
    grid = np.indices(shape).reshape(3, -1).T
    far, nearest = cKDTree(seeds).query(grid)
    label = np.where(far < 16, nearest % 104 + 1, 0).reshape(shape).astype(np.uint8)
    began = time.process_time()
    found = resample_label(label, new_shape)
    ours = time.process_time() - began
    began = time.process_time()
    values = np.unique(label)
    expected, best = np.full(new_shape, values[0]), None
    for value in values:
        shown = resample_probabilities((label == value)[None], new_shape)[0]
        if best is not None:
            expected[shown > best + np.float32(1e-6)] = value
        best = shown if best is None else np.maximum(best, shown)
    maps = time.process_time() - began
    assert np.array_equal(found, expected)
    voxels = int(np.prod(new_shape))
    document = {
        "classes": len(values) - 1,
        "shape": shape,
        "new_shape": new_shape,
        "us_a_voxel": round(1e6 * ours / voxels, 4),
        "us_a_voxel_by_maps": round(1e6 * maps / voxels, 4),
        "times": round(maps / ours, 1),
        "equal_to_the_bit": True,
    }
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def install(venv: Path) -> Path:
    """The bin folder of an environment with nnU-Net v2."""
    place = venv / "bin"
    if not (place / "nnUNetv2_plan_and_preprocess").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        for packages in ([TORCH], ["--no-deps", *BARE], WITH.split()):
            subprocess.run([str(place / "pip"), "install", "--quiet", *packages], check=True)
    return place


def version(place: Path) -> str:
    command = [
        str(place / "python"),
        "-c",
        "from importlib.metadata import version; print(version('nnunetv2'))",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measure(name: str, folder: Path, cases: int, nnunet: Path) -> dict:
    """Both programs over all cases and over few."""
    number, _, _ = SETS[name]
    out: dict = {}
    for count in (FEW, cases):
        raw = write_set(folder / f"raw-{count}", name, count)
        ours = run(segfleet(raw, folder / f"store-{name}-{count}"))
        places = {
            f"nnUNet_{kind}": str(folder / f"{kind}-{count}")
            for kind in ("raw", "preprocessed", "results")
        }
        command = [
            str(nnunet / "nnUNetv2_plan_and_preprocess"),
            "-d",
            str(number),
            "-c",
            "3d_fullres",
            "-npfp",
            "1",
            "-np",
            "1",
        ]
        theirs = run([*command, "--verify_dataset_integrity"], places)
        out[count] = {"voxels": count * int(np.prod(SHAPE)), "segfleet": ours, "nnunetv2": theirs}
    result: dict = {"runs": out}
    for who in ("segfleet", "nnunetv2"):
        cost = out[cases][who]["cpu_s"] - out[FEW][who]["cpu_s"]
        result[f"{who} voxels per cpu second"] = round(
            (out[cases]["voxels"] - out[FEW]["voxels"]) / cost
        )
    result["ratio marginal"] = round(
        result["segfleet voxels per cpu second"] / result["nnunetv2 voxels per cpu second"], 2
    )
    result["ratio whole run"] = round(
        out[cases]["nnunetv2"]["cpu_s"] / out[cases]["segfleet"]["cpu_s"], 2
    )
    result["memory, nnunetv2 over segfleet"] = round(
        out[cases]["nnunetv2"]["peak_mb"] / out[cases]["segfleet"]["peak_mb"], 2
    )
    return result


def long_ct(place: Path | None, out: Path) -> None:
    """Peak memory of one worker on LONG, resampled to a finer grid; the result goes to `out`."""
    with tempfile.TemporaryDirectory(prefix="preprocess-", dir=place) as name:
        root = Path(name) / "Dataset903_Long"
        image, label = np.empty(LONG, np.int16), np.zeros(LONG, np.uint8)
        draw, (y, x) = (
            np.random.default_rng(0),
            np.meshgrid(
                *(np.linspace(-1, 1, n, dtype=np.float32) for n in LONG[1:]), indexing="ij"
            ),
        )
        noise = (30 * draw.standard_normal((16, *LONG[1:]), dtype=np.float32)).astype(np.int16)
        for z in range(len(image)):
            side = 0.3 * np.sin(6 * z / len(image))
            label[z] = (((x - side) / 0.3) ** 2 + (y / 0.25) ** 2 < 1).astype(np.uint8) + (
                ((x - side) / 0.08) ** 2 + (y / 0.08) ** 2 < 1
            )
            image[z] = (
                np.where((x / 0.85) ** 2 + (y / 0.7) ** 2 < 1, 40, -1000)
                + 60 * label[z]
                + noise[draw.integers(16)]
            )
        for path, array in (("imagesTr/case000_0000", image), ("labelsTr/case000", label)):
            (root / path).parent.mkdir(parents=True)
            nib.save(
                nib.Nifti1Image(array.T, np.diag([0.8, 0.8, 1.0, 1.0])), root / f"{path}.nii.gz"
            )
        del image, label, array
        describe(root, "CT", 1)
        found = run([*segfleet(root, Path(name) / "store"), "--spacing", "1.0x0.75x0.75"])
        shape = json.loads((Path(name) / "store/manifest.json").read_text(encoding="utf-8"))[
            "cases"
        ][0]["shape"]
    volume = 4 * np.prod(LONG) / 2**20
    document = {
        "shape": LONG,
        "stored_shape": shape,
        **found,
        "as_float32_mb": round(volume),
        "ratio": round(found["peak_mb"] / volume, 2),
    }
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def killed(folder: Path, cases: int) -> dict:
    """Kill segfleet after half of the processor time a whole run takes; what the same command then
    needs to finish."""
    raw = write_set(folder / f"raw-{cases}", "CT", cases)
    whole = run(segfleet(raw, folder / "whole"))
    run(segfleet(raw, folder / "halved"), stop_at=whole["cpu_s"] / 2)
    assert not (folder / "halved").exists(), "it was faster than its half"
    rest = run(segfleet(raw, folder / "halved"))
    same = (folder / "halved/manifest.json").read_bytes() == (
        folder / "whole/manifest.json"
    ).read_bytes()
    ratios = {
        f"rest over whole, {kind}": round(rest[kind] / whole[kind], 2)
        for kind in ("cpu_s", "wall_s")
    }
    return {"cases": cases, "whole": whole, "rest": rest, "same store": same, **ratios}


def segfleet(raw: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "segfleet.cli.main",
        "preprocess",
        "nnunet",
        "--raw",
        str(raw),
        "--out",
        str(out),
        "--workers",
        "1",
    ]


def run(
    command: list[str], environ: dict[str, str] | None = None, stop_at: float | None = None
) -> dict[str, float]:
    """Processor and wall seconds and peak memory of a command and all its processes, which are
    killed at `stop_at` processor seconds."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    pipe = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    process = subprocess.Popen(command, env={**os.environ, **single, **(environ or {})}, **pipe)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], pss_mb(process.pid))
            if stop_at is not None and cpu_s(process.pid) >= stop_at:
                os.killpg(process.pid, signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _, errors = process.communicate()
        if process.returncode and (stop_at is None or process.returncode != -signal.SIGKILL):
            raise SystemExit(f"{command[0]} failed:\n{errors[-3000:]}")
    finally:
        done.set()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "cpu_s": round(cpu, 2),
        "wall_s": round(time.monotonic() - start, 2),
        "peak_mb": round(peak[0]),
    }


def pss_mb(session: int) -> float:
    """Of all processes of a session."""
    return (
        sum(
            int(line.split()[1])
            for text in each(session, "smaps_rollup")
            for line in text.splitlines()
            if line.startswith("Pss:")
        )
        / 1024
    )


def cpu_s(session: int) -> float:
    """Of all processes of a session that still run: user and system time."""
    ticks = sum(
        sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in each(session, "stat")
    )
    return ticks / os.sysconf("SC_CLK_TCK")


def each(session: int, name: str) -> Iterator[str]:
    """A file of /proc of every process of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                yield (folder / name).read_text()
        except OSError:
            continue  # it has ended


def write_set(raw: Path, name: str, cases: int) -> Path:
    """A data set in nnU-Net's layout; the same files for both programs."""
    number, channel, spacing = SETS[name]
    root = raw / f"Dataset{number}_{name}"
    if (root / "dataset.json").is_file():
        return root
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    for index in range(cases):
        draw = np.random.default_rng([number, index])
        image, label = volume(draw, channel == "CT")
        own = np.array(spacing) * draw.uniform(0.8, 1.25, 3)
        affine = np.diag([*own[::-1], 1.0])
        nib.save(
            nib.Nifti1Image(image.T, affine), root / "imagesTr" / f"case{index:03d}_0000.nii.gz"
        )
        nib.save(nib.Nifti1Image(label.T, affine), root / "labelsTr" / f"case{index:03d}.nii.gz")
    describe(root, channel, cases)
    return root


def describe(root: Path, channel: str, cases: int) -> None:
    labels = {"background": 0, "organ": 1, "tumour": 2}
    facts = {
        "channel_names": {"0": channel},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")


def volume(draw: np.random.Generator, ct: bool) -> tuple[np.ndarray, np.ndarray]:
    """int16 (Z, Y, X): a body with organs and noise, in air (CT) or in an empty margin (MR); and
    its labels."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij")
    image, label = (
        np.where((x / 0.85) ** 2 + (y / 0.7) ** 2 < 1, np.float32(40), np.float32(-1000)),
        np.zeros(SHAPE, np.uint8),
    )
    body = image > 0
    for organ in range(8):
        centre, radius = draw.uniform(-0.4, 0.4, 3), draw.uniform(0.08, 0.3, 3)
        inside = (
            sum(((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), centre, radius, strict=True))
            < 1
        )
        image[inside], label[inside] = draw.uniform(-80, 250), 1 + organ % 2
    image += ndimage.gaussian_filter(draw.standard_normal(SHAPE, dtype=np.float32), 1) * 60
    return (image if ct else np.where(body, image + 400, 0)).astype(np.int16), label


if __name__ == "__main__":
    main()
