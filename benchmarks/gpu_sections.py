"""What `benchmarks/gpu.py` measures, section by section. A section yields (row, function that
returns the facts of that row)."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_yardstick
import loader as loading
import selective_scan
import torch
from torch import Tensor

from segfleet.models import registry
from segfleet.models.profile import count_macs
from segfleet.pipeline.data import loader
from segfleet.pipeline.data.sampler import PatchSampler
from segfleet.pipeline.engines.base import Engine
from segfleet.pipeline.inference.sliding_window import Window
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.pipeline.run import StageFolder
from segfleet.pipeline.scoring.evaluate import Measures, evaluate_cases
from segfleet.pipeline.scoring.score import forward_of
from segfleet.pipeline.sections import Augment
from segfleet.pipeline.sections import Engine as EngineSection
from segfleet.pipeline.stop import Paused, StopRequest
from segfleet.pipeline.task import make_task
from segfleet.pipeline.training.begin import build
from segfleet.pipeline.training.context import Context
from segfleet.pipeline.training.progress import Progress
from segfleet.pipeline.training.saves import Saves
from segfleet.pipeline.training.stream import Stream
from segfleet.preprocess.stores.base import ShardStore, open_store
from segfleet.preprocess.stores.manifest import Dataset, Manifest, Plan, layout_of

Rows = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
TINY = "16x32x32"
loading.SETS[TINY] = ((16, 32, 32), (24, 40, 40), 1, 3, 4)
# (bf16, TF32) dense, multiply and add apart: the vendor's data sheets
PEAKS = {"H200": (989e12, 494e12), "H100": (989e12, 494e12), "A100": (312e12, 156e12)}
SUITE = ("tests/models/test_scan_triton.py",)


@dataclass(frozen=True, kw_only=True)
class Bench:
    device: torch.device
    quick: bool
    folder: Path
    known: Callable[[str, str], dict[str, Any]]  # (section, row) -> its facts; {}: not taken yet

    @property
    def data(self) -> str:
        return TINY if self.quick else "128x128x128"

    @property
    def steps(self) -> int:
        return 2 if self.quick else 20

    @property
    def features(self) -> tuple[int, ...]:
        return (4, 8, 8) if self.quick else gpu_yardstick.FEATURES

    def store(self) -> ShardStore:
        """Made once for all sections."""
        folder = self.folder / "store"
        if not (folder / "manifest.json").exists():
            loading.write_ours(self.data, folder)
        return open_store(folder)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], Any], warm: int = 3) -> float:
        """Of a step: the median of groups of five, each waited for at its end alone, as in
        training; fewer where they are slow."""
        group = 1 if self.quick else 5
        for _ in range(1 if self.quick else warm):
            step()
        self.wait()
        times: list[float] = []
        while len(times) < self.steps // group and sum(times) * group < 8:
            start = time.perf_counter()
            for _ in range(group):
                step()
            self.wait()
            times.append((time.perf_counter() - start) / group)
        return statistics.median(times)

    def recipe(self, model: str, **engine: Any) -> Recipe:
        """Of the store, with nnU-Net's optimizer."""
        options = {"features": list(self.features)} if model == "plain_unet_3d" else {}
        document = {
            "name": "gpu",
            "data": {"store": str(self.folder / "store"), "batch": 2, "split": "all"},
            "model": {"name": model, "options": options},
            "optimizer": {"name": "sgd", "weight_decay": 3e-5},
            "stages": [{"epochs": 1, "steps": 8, "lr": 1e-2}],
            "engine": {"precision": "bf16", **engine},
            "trackers": [],
        }
        return parse(document)

    def engine(self, recipe: Recipe, manifest: Manifest) -> Engine:
        """As the training loop builds it."""
        context = Context(
            recipe=recipe,
            stores=lambda _: _Of(manifest),
            folders=[StageFolder(path=self.folder / "nothing", index=0)],
            ranks=Ranks(self.device),
            asked_to_stop=lambda: False,
            warn=lambda words: None,
            validate=lambda engine, settings: {},
        )
        return build(context, 0)[0]


@dataclass(frozen=True)
class _Of:
    """All that building an engine asks of a store."""

    manifest: Manifest


def idle(busy: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first beginning to the last end that no interval covers."""
    spans = sorted(busy)
    if not spans:
        return 1.0
    first, covered, reach = spans[0][0], 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return 1.0 - covered / (reach - first) if reach > first else 0.0


def profiled(bench: Bench, work: Callable[[], Any]) -> float:
    """How much of `work` the device idles."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds, acc_events=True) as found:
        work()
        bench.wait()
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return idle(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        # an annotation, such as that of the optimizer, spans the gaps between its kernels
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    )


def drawn(size: tuple[int, ...], channels: int, classes: int, bench: Bench) -> list[tuple]:
    """Two micro-batches of two on the device: (image, label)."""
    draw, made = torch.Generator().manual_seed(0), []
    for _ in range(2):
        image = torch.randn(2, channels, *size, generator=draw)
        label = torch.randint(0, classes, (2, *size), generator=draw, dtype=torch.uint8)
        image = image.to(bench.device)
        last = torch.channels_last if len(size) == 2 else torch.channels_last_3d
        made.append((image.contiguous(memory_format=last), label.to(bench.device)))
    return made


def forever(batches: list[tuple]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


# sections


def doctor(bench: Bench) -> Rows:
    from segfleet.pipeline.launch.doctor import check_machine

    yield "examine", check_machine


def tests(bench: Bench) -> Rows:
    """Those of the suite that need a GPU; on a CPU a quick one, to see that this runs."""
    for file in ("tests/test_layers.py",) if bench.quick else SUITE:

        def measure(file: str = file) -> dict[str, Any]:
            root = Path(__file__).resolve().parents[1]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
            last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
            return {"passed": done.returncode == 0, "said": last}

        yield Path(file).stem, measure


def resume(bench: Bench) -> Rows:
    """Eight steps at once, and four and four: the same bits?"""
    bench.store()
    for row in ("deterministic", "plain"):  # cuBLAS reads its setting at the first product

        def measure(row: str = row) -> dict[str, Any]:
            if row == "deterministic" and "deterministic" not in EngineSection.model_fields:
                return {"skipped": "engine.deterministic does not exist"}
            more = {"deterministic": True} if row == "deterministic" else {}
            recipe = bench.recipe("plain_unet_3d", **more).model_dump(mode="json")
            weights = []
            for name, pauses in (("whole", [None]), ("halves", [4, None])):
                root = bench.folder / f"{row}-{name}"
                for pause in pauses:
                    job = Train(recipe=recipe, root=root, score=False, pause_at=pause)
                    with suppress(Paused):
                        run_job(job, Ranks(bench.device), StopRequest())
                (file,) = root.glob("*/checkpoints/step-00000008/weights.safetensors")
                weights.append(file.read_bytes())
            return {"bitwise": int(weights[0] == weights[1])}

        yield row, measure


def yardstick(bench: Bench) -> Rows:
    """Voxels per second of a step on the same patches, in both programs."""
    size, classes = loading.SETS[bench.data][0], 5
    batches = drawn(size, 1, classes, bench)
    voxels = batches[0][1].numel()

    def theirs(compiled: bool) -> dict[str, Any]:
        free()
        model = gpu_yardstick.network(1, classes, bench.features)
        step, stream = gpu_yardstick.trainer(model, bench.device, compiled), forever(batches)
        seconds = bench.seconds(lambda: step(*next(stream)))
        return {"ms": 1e3 * seconds, "voxels_per_s": voxels / seconds}

    def ours(compiled: bool) -> dict[str, Any]:
        free()
        torch.backends.cudnn.benchmark = False  # theirs has set it; ours may, when it is built
        recipe = bench.recipe("plain_unet_3d", compile=compiled)
        engine, stream = bench.engine(recipe, bench.store().manifest), forever(batches)
        seconds = bench.seconds(lambda: engine.step(stream, 1e-2))
        return {"ms": 1e3 * seconds, "voxels_per_s": voxels / seconds}

    for compiled in (False,) if bench.quick else (True, False):
        word = "compiled" if compiled else "eager"
        yield f"nnunet {word}", lambda c=compiled: theirs(c)
        yield f"segfleet {word}", lambda c=compiled: ours(c)

    def ratio() -> dict[str, Any]:
        best = {
            side: max(
                bench.known("yardstick", f"{side} {word}").get("voxels_per_s", 0.0)
                for word in ("compiled", "eager")
            )
            for side in ("nnunet", "segfleet")
        }
        if not all(best.values()):
            raise RuntimeError("a side failed; --again measures it again")
        return {"times_nnunet": best["segfleet"] / best["nnunet"]}

    yield "ratio", ratio


def training(bench: Bench, workers: int) -> tuple[Stream, Engine]:
    store = bench.store()
    recipe = bench.recipe("plain_unet_3d")
    sampler = PatchSampler(
        cases=store.manifest.cases,
        patch=store.manifest.plan.patch,
        batch=2,
        foreground=1 / 3,
        seed=0,
    )
    on_device = bench.device.type != "cpu"
    patches = loader.Patches(store, sampler, 0, 100_000, Augment(), on_device)
    schedule = loader.Schedule(0, 1, 100_000, 2, 1, 0, 1)
    stream = Stream(loader.batches(patches, schedule, workers), bench.device, True)
    return stream, bench.engine(recipe, store.manifest)


def workers(bench: Bench) -> Rows:
    """From the store to the step: voxels per second, waiting, and the device's idle share."""
    for count in (0, 1) if bench.quick else (14, 8, 0):

        def measure(count: int = count) -> dict[str, Any]:
            stream, engine = training(bench, count)
            for _ in range(1 if bench.quick else 2 * count + 4):  # what lies ready is used up
                engine.step(stream, 1e-2)
            bench.wait()
            stream.waited, start, steps = 0.0, time.perf_counter(), 0
            while steps < bench.steps or time.perf_counter() - start < (0 if bench.quick else 8):
                engine.step(stream, 1e-2)
                steps += 1
                if time.perf_counter() - start > 15:
                    break
            bench.wait()
            seconds = time.perf_counter() - start
            few = 2 if bench.quick else 15

            def several() -> None:
                for _ in range(few):
                    engine.step(stream, 1e-2)

            voxels = 2 * torch.Size(loading.SETS[bench.data][0]).numel()
            facts = {
                "voxels_per_s": steps * voxels / seconds,
                "ms": 1e3 * seconds / steps,
                "waiting": stream.waited / seconds,
                "idle": profiled(bench, several),
            }
            close(stream)
            return facts

        yield str(count), measure


def close(stream: Any) -> None:
    """End its loader processes."""
    batches = getattr(stream, "batches", stream)
    if hasattr(batches, "close"):
        batches.close()
    free()


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def loader_alone(bench: Bench) -> Rows:
    bench.store()
    for count in (0, 1) if bench.quick else (14, 8, 0):

        def measure(count: int = count) -> dict[str, Any]:
            stream = loading.ours(bench.data, bench.folder / "store", count, 0)
            for _ in range(1 + count):
                next(stream)
            start, found, most = time.perf_counter(), 0, 0.2 if bench.quick else 5
            while time.perf_counter() - start < most:
                found += next(stream).shape[0]
            seconds = time.perf_counter() - start
            stream.close()
            voxels = torch.Size(loading.SETS[bench.data][0]).numel()
            return {"patches_per_s": found / seconds, "voxels_per_s": found * voxels / seconds}

        yield str(count), measure


def scan(bench: Bench) -> Rows:
    """Seconds of forward and backward of every form that runs here."""
    shapes = ((1, 4, 256, 16),) if bench.quick else selective_scan.GPU_SHAPES
    most = 0.1 if bench.quick else 0.7
    for shape in shapes:

        def measure(shape: tuple[int, int, int, int] = shape) -> dict[str, Any]:
            times = {}
            for name, form in selective_scan.forms(bench.device.type).items():
                if name in ("naive loop", "associative_scan"):
                    continue
                inputs = selective_scan.inputs(shape, bench.device.type)
                form(*inputs).sum().backward()  # compiles its kernels
                times[name] = sum(
                    selective_scan.clock(
                        form, selective_scan.inputs(shape, bench.device.type), most
                    )
                )
            ours = times.get("triton", min(times.values()))
            return {
                **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
                **{
                    f"times_{name}": seconds / ours
                    for name, seconds in times.items()
                    if seconds != ours
                },
            }

        yield str(shape[2]), measure


def window(bench: Bench) -> Rows:
    """Scoring whole cases: cases per second, and how long the device idles; mirrored and not."""
    store = bench.store()
    recipe, task = bench.recipe("plain_unet_3d"), make_task(store.manifest.dataset)
    cases = list(store.manifest.cases)[: 1 if bench.quick else None]
    ids = [case.id for case in cases]
    for row, batch, mirror in (("auto", 1, ()), ("two tiles", 2, ()), ("mirrored", 1, (2,))):

        def measure(batch: int = batch, mirror: tuple[int, ...] = mirror) -> dict[str, Any]:
            engine = bench.engine(recipe, store.manifest)
            with engine.evaluation() as model:
                forward = forward_of(model, task, recipe, bench.device)

                def score() -> dict[str, Any]:
                    return evaluate_cases(
                        forward,
                        store,
                        ids,
                        task,
                        Window(
                            patch=store.manifest.plan.patch,
                            mirror_axes=mirror,
                            batch=batch,
                            device=bench.device,
                        ),
                        Measures(distances=False),
                    )

                score()  # cuDNN looks for its kernels
                start = time.perf_counter()
                score()
                seconds = time.perf_counter() - start
                voxels = sum(torch.Size(case.shape).numel() for case in cases)
                return {
                    "cases_per_s": len(ids) / seconds,
                    "voxels_per_s": voxels / seconds,
                    "idle": profiled(bench, score),
                }

        yield row, measure


def stalls(bench: Bench) -> Rows:
    """How long a checkpoint keeps the loop from its next step, of the ten minutes between two; and
    what the steps beside its writing lose."""

    def measure() -> dict[str, Any]:
        manifest, recipe = bench.store().manifest, bench.recipe("plain_unet_3d", ema=0.99)
        engine, size = bench.engine(recipe, manifest), loading.SETS[bench.data][0]
        stream, ranks = forever(drawn(size, 1, 5, bench)), Ranks(bench.device)
        plain = bench.seconds(lambda: engine.step(stream, 1e-2))
        folder = StageFolder(path=bench.folder / "saved", index=0)
        saves = Saves(folder, recipe, ranks, step=0)
        lost = []
        for number in range(1, 4):
            bench.wait()
            start = time.perf_counter()
            saves.save(engine, Progress(step=number))
            engine.step(stream, 1e-2)
            bench.wait()
            lost.append(time.perf_counter() - start - plain)
            steps = 0
            start = time.perf_counter()
            while not saves.saver.poll() and time.perf_counter() - start < 30:
                engine.step(stream, 1e-2)
                bench.wait()
                steps += 1
            lost[-1] += max(0.0, time.perf_counter() - start - steps * plain)
            saves.saver.wait()
        stall = max(0.0, statistics.median(lost))
        return {"stall_ms": 1e3 * stall, "share": stall / (60 * recipe.save_minutes)}

    yield "stall", measure


def networks(bench: Bench) -> Rows:
    """A step of every network at its published size and channels, two images; with reduced options
    and small sizes if it is to be quick. Eager bf16 of all first: it says the most."""
    names = sorted(registry.specs())
    names = (
        [n for n in names if n in ("plain_unet_2d", "unet_lite_standard")] if bench.quick else names
    )
    modes = [("bf16", False), ("fp32", False), ("bf16", True), ("fp32", True)]
    for precision, compiled in modes[:1] if bench.quick else modes:
        for name in names:
            word = "compiled" if compiled else "eager"
            yield (
                f"{name} {precision} {word}",
                lambda name=name, precision=precision, compiled=compiled: network(
                    bench, name, precision, compiled
                ),
            )


def network(bench: Bench, name: str, precision: str, compiled: bool) -> dict[str, Any]:
    free()
    spec = registry.spec(name)
    size = spec.small_input if bench.quick else spec.paper_input
    options = dict(spec.reduced) if bench.quick else {}
    if spec.fixed_patch and "patch" not in options:
        options["patch"] = list(size)
    manifest = blank(spec, size)
    document = {
        "name": "gpu",
        "data": {"store": "nowhere", "batch": 2, "patch": list(size)},
        "model": {"name": name, "options": options},
        "stages": [{"epochs": 1, "lr": 1e-3}],
        "engine": {"precision": precision, "compile": compiled},
    }
    task = make_task(manifest.dataset)
    engine = bench.engine(parse(document), manifest)
    stream = forever(drawn(size, spec.in_channels, 2, bench))
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(lambda: engine.step(stream, 1e-3))
    with torch.device("meta"):
        meta = registry.build_model(
            name, in_channels=spec.in_channels, num_classes=task.channels, options=options
        )
    flops = 3 * 2 * count_macs(meta, (1, spec.in_channels, *size)) * 2  # backward: twice forward
    facts = {
        "size": list(size),
        "ms": 1e3 * seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": mfu(flops / seconds, precision),
        "gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "waits": waits(engine, stream) if cuda else None,
    }
    return facts


def mfu(rate: float, precision: str) -> float | None:
    """Of the card's peak; None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    found = next((peaks for model, peaks in PEAKS.items() if model in name), None)
    return found and rate / found[precision == "fp32"]


def waits(engine: Engine, stream: Iterator) -> str:
    """What makes the host wait for the device in a step; empty: nothing."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(stream, 1e-3)
        return ""
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def blank(spec: registry.ModelSpec, size: tuple[int, ...]) -> Manifest:
    """A data set without cases that has the network's channels, and one structure or more."""
    labels = {"background": 0, **{f"s{k}": k for k in range(1, max(2, spec.num_classes))}}
    patch = (1,) * (3 - len(size)) + tuple(size)
    channels = tuple(f"c{k}" for k in range(spec.in_channels))
    dataset = Dataset(name="blank", reader="none", dims=len(size), channels=channels, labels=labels)
    plan = Plan(target_spacing=(1, 1, 1), patch=patch, normalisation=("zscore",) * spec.in_channels)
    return Manifest(
        format="zarr", layout=layout_of("zarr"), id="blank", dataset=dataset, plan=plan,
        cases=(), files={},
    )  # fmt: skip


SECTIONS: dict[str, Callable[[Bench], Rows]] = {
    "doctor": doctor,
    "tests": tests,
    "resume": resume,
    "yardstick": yardstick,
    "workers": workers,
    "loader": loader_alone,
    "scan": scan,
    "window": window,
    "checkpoint": stalls,
    "networks": networks,
}
