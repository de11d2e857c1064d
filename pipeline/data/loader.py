"""Samples become batches. Loader processes only compute; which samples, and in which order, is
decided by `PatchSampler`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segfleet.core.errors import ExitCode, InputError
from segfleet.core.litter import (
    note_shared_memory,
    remove_shared_memory,
)
from segfleet.core.parallel import (
    NO_SERVER,
    SERVED,
    end_with_parent,
    guard_queues,
    start_server,
)
from segfleet.pipeline.data import randomness
from segfleet.pipeline.data.augment import draw_intensity, draw_spatial, flat
from segfleet.pipeline.data.device_augment import Boxes, Room, augmented, drawn_sample, each_tensor
from segfleet.pipeline.data.geometry import mirror, resample, source
from segfleet.pipeline.data.handover import PREFETCH, Held, Sender, forget
from segfleet.pipeline.data.intensity import apply_intensity
from segfleet.pipeline.data.kernels import scratch
from segfleet.pipeline.data.masking import hidden
from segfleet.pipeline.data.sampler import Draw, MixedSampler, PatchSampler
from segfleet.pipeline.data.unpack import unpack
from segfleet.pipeline.sections import MOST_WORKERS, Augment, Mask
from segfleet.preprocess.stores.base import ShardStore


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. In 2D the slice axis is gone."""

    image: Tensor  # (B, C, *S) float32
    label: Tensor  # (B, *S) uint8
    cases: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """For `DataLoader`, which leaves a class with this method to itself. Left to it, tuples
        become lists before torch 2.9.1. Arrays, which came through a pipe, stay as they are."""
        return each_tensor(self, lambda part: part.pin_memory(), (Tensor,))


@dataclass(frozen=True)
class Failure:
    """A sample that could not be made; carried to the training process, which raises it there.
    Without a `case` none could be."""

    case: str
    phase: str
    message: str
    traceback: str
    user_error: bool

    @classmethod
    def of(cls, case: str, error: Exception) -> Failure:
        """While `error` is handled."""
        text, user = traceback.format_exc(), isinstance(error, InputError)
        return cls(case, "loading", str(error), text, user)


class LoaderError(RuntimeError):
    """A sample could not be made, through no fault of the user's input. Names the case and the
    phase."""


class LoaderDied(LoaderError):
    """A loader process is gone, or silent: one message, as its traceback is of no use."""

    exit_code = ExitCode.FAULT


class Patches(Dataset):
    """Patches by (epoch, index): read, augmented. Picklable; opens its store in the process that
    reads."""

    def __init__(
        self,
        store: ShardStore | Sequence[ShardStore],
        sampler: PatchSampler | MixedSampler,
        stage: int,
        steps: int,
        augment: Augment | None,
        pinned: bool,
        on_device: bool = False,
    ):
        """`pinned`: batches are put where a GPU fetches them by itself. `on_device`: what is drawn
        is left to the device."""
        self.on_device = on_device and augment is not None
        self.stores = tuple(store) if isinstance(store, Sequence) else (store,)
        self.sampler, self.stage, self.steps = sampler, stage, steps
        self.augment, self.pinned = augment, pinned
        for opened in self.stores:
            opened.fill = unpack

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch | Boxes | Failure:
        """A micro-batch. `DataLoader` calls it with the list a batch sampler yields."""
        if self.on_device:
            return self._boxes(places)
        plan = self.stores[0].manifest.plan
        image = np.empty((len(places), len(plan.normalisation), *self.sampler.patch), np.float32)
        label = np.empty((len(places), *self.sampler.patch), np.uint8)
        cases = []
        for slot, (epoch, index) in enumerate(places):
            draw = self.sampler.draw(self.stage, epoch, index, self.steps)
            try:
                self._sample(draw, image[slot], label[slot])
            except Exception as error:
                return Failure.of(draw.case.id, error)
            cases.append(draw.case.id)
        images, labels = torch.from_numpy(image), torch.from_numpy(label)
        if self.sampler.patch[0] == 1:
            images, labels = images[:, :, 0], labels[:, 0]
        return Batch(images, labels, tuple(cases))

    def _sample(self, draw: Draw, image: np.ndarray, label: np.ndarray) -> None:
        """Fills in image (C, z, y, x) and label (z, y, x)."""
        patch, store = self.sampler.patch, self.stores[draw.store]
        if self.augment is None:
            z, y, x = (slice(s, s + p) for s, p in zip(draw.start, patch, strict=True))
            store.image(draw.case, (z, y, x), image)
            store.label(draw.case, (z, y, x), label)
            return
        rng = self._randomness(draw)
        spatial = draw_spatial(self.augment, rng, patch, draw.case.spacing)
        box, grid = source(spatial, draw.start, patch)
        if grid is None and not spatial.turns and not spatial.flips:
            store.image(draw.case, box, image)
            store.label(draw.case, box, label)
        else:
            size = tuple(s.stop - s.start for s in box)
            part = store.image(draw.case, box, scratch((len(image), *size)))
            outlined = store.label(draw.case, box, scratch(size, np.uint8))
            if grid is not None:
                resample(part, outlined, grid, image, label)
                part, outlined = image, label
            if grid is None or spatial.turns:
                turned = mirror(spatial, part, outlined)
                image[...], label[...] = (a.copy() for a in turned) if part is image else turned
        drawn = draw_intensity(self.augment, rng, len(image))
        # Here and not on a GPU: the same bits wherever the network is, and a training process that
        # draws no noise and waits for no mean.
        apply_intensity(
            torch.from_numpy(image),
            drawn,
            flat(patch, draw.case.spacing),
            store.manifest.plan.masked,
        )

    def _randomness(self, draw: Draw) -> np.random.Generator:
        place = (draw.stage, draw.epoch, draw.index)
        return randomness.generator(self.sampler.seed, randomness.AUGMENT, *place)

    def _boxes(self, places: list[tuple[int, int]]) -> Boxes | Failure:
        """What a device needs to make the batch: read and decoded, but not computed."""
        assert self.augment is not None, "nothing is left to the device"
        plans = [store.manifest.plan for store in self.stores]
        channels, patch = len(plans[0].normalisation), self.sampler.patch
        kinds = {plan.dtype for plan in plans}
        draws = [self.sampler.draw(self.stage, *place, self.steps) for place in places]
        samples = [
            drawn_sample(self.augment, self._randomness(draw), draw, patch, channels)
            for draw in draws
        ]
        room = Room(samples, channels, np.dtype(kinds.pop() if len(kinds) == 1 else np.float32))
        for draw, sample, (image, label) in zip(draws, samples, room, strict=True):
            try:
                self.stores[draw.store].image(draw.case, sample.box, image)
                self.stores[draw.store].label(draw.case, sample.box, label)
            except Exception as error:
                return Failure.of(draw.case.id, error)
        sample_plans = [plans[draw.store] for draw in draws]
        cases = tuple(draw.case.id for draw in draws)
        return room.boxes(
            patch, [plan.scale for plan in sample_plans], [p.masked for p in sample_plans], cases
        )


class MaskedPatches(Patches):
    """Batches of (image without the hidden voxels, float32 (B, C + 1, *S) image and mask). What is
    hidden is a pure function of (seed, stage, epoch, index), as all of a sample is."""

    def __init__(self, *parts, mask: Mask):
        super().__init__(*parts)
        self.mask = mask

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch | Boxes | Failure:
        batch = super().__getitems__(places)
        if not isinstance(batch, Batch):
            return batch
        drawn = [
            hidden(
                self.mask,
                self.sampler.patch,
                randomness.generator(self.sampler.seed, randomness.MASK, self.stage, epoch, index),
            )
            for epoch, index in places
        ]
        mask = torch.from_numpy(np.stack(drawn))
        mask = mask[:, 0] if self.sampler.patch[0] == 1 else mask
        mask = mask[:, None].float()
        return replace(
            batch, image=batch.image * (1 - mask), label=torch.cat([batch.image, mask], 1)
        )


class Packed(Dataset):
    """Patches on their way to a loader process, which unpacks them when it is first asked: torch
    would unpack them before it can answer, and a store that is gone would look like a process that
    died."""

    def __init__(self, patches: Patches):
        self.content = pickle.dumps(patches)
        self.patches: Patches | None = None

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch | Boxes | Failure:
        if self.patches is None:
            try:
                self.patches = pickle.loads(self.content)  # this program's own
            except Exception as error:
                return Failure.of("", error)
            self.content = b""
        return self.patches.__getitems__(places)


class Schedule:
    """The batch sampler of one rank: (epoch, index) lists from step `begin` to the end of a stage,
    micro-batch by micro-batch.

    A batch is cut into micro-batches first and each of those among the ranks, so that the samples
    normalised and scored together are the same whatever the number of ranks.
    """

    def __init__(
        self,
        begin: int,
        epochs: int,
        steps: int,
        batch: int,
        accumulate: int,
        rank: int,
        size: int,
    ):
        self.micro = batch // accumulate // size
        self.first, self.last = begin, epochs * steps
        self.steps, self.batch, self.accumulate = steps, batch, accumulate
        self.offset = rank * self.micro

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.last):
            epoch, within = divmod(step, self.steps)
            for part in range(self.accumulate):
                whole = within * self.batch + part * (self.batch // self.accumulate)
                start = whole + self.offset
                yield [(epoch, start + k) for k in range(self.micro)]


def check_shares(batch: int, ranks: int, accumulate: int) -> None:
    """Every rank takes the same share of every batch. Raises InputError that names batches that
    would do."""
    if batch % (ranks * accumulate):
        unit = ranks * accumulate
        raise InputError(
            f"data.batch: found {batch}, which {ranks} rank(s) x {accumulate} accumulation "
            "step(s) cannot share evenly; "
            f"expected a multiple of {unit}, for example {unit * max(1, -(-batch // unit))}"
        )


TIMEOUT = 1800.0  # seconds without a batch after which a loader is given up
LOOK = 5.0  # seconds without a batch after which is looked whether a loader process died
TOO_SMALL = (
    "segfleet: /dev/shm is too small for the loader's batches, which go through pipes now and take "
    "longer. Make it larger (docker: --shm-size=2g), or set data.workers=0.\n"
)


def _start_worker(_: int) -> None:
    """Loader processes leave the decision to stop to the ranks, use one thread each and end with
    their rank, however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    note_shared_memory()
    end_with_parent(lambda: remove_shared_memory(os.getpid()))
    guard_queues()
    torch.set_num_threads(1)


def worker_count(requested: int | Literal["auto"], device: str, cores: int) -> int:
    """Loader processes of a rank on a `device` (a type) that has `cores` cores for itself.

    A GPU waits for nothing else, so all cores but two feed it, as many as pay. On a CPU the network
    needs them: a quarter loads.
    """
    if requested != "auto":
        return requested
    if device == "cpu":
        return min(MOST_WORKERS["cpu"], cores // 4)
    return min(MOST_WORKERS["cuda"], max(cores - 2, cores // 2))


def batches(patches: Patches, schedule: Schedule, workers: int) -> Iterator[Batch | Boxes]:
    """Micro-batches in order. Raises InputError or LoaderError with the case and the phase."""
    name = uuid.uuid4().hex
    collate: Callable[[Any], Any] = Sender(name) if workers else _as_made  # of what is one already
    loader = DataLoader(
        Packed(patches) if workers else patches,
        batch_sampler=schedule,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=collate,
        multiprocessing_context=_forkserver() if workers else None,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=patches.pinned,
        timeout=LOOK if workers else 0,
    )
    piped = False
    try:
        for batch in _in_time(loader):
            if isinstance(batch, Failure):
                where = f"{batch.phase} case {batch.case}" if batch.case else batch.phase
                if batch.user_error:
                    raise InputError(f"{where}: {batch.message}")
                raise LoaderError(f"{where}: {batch.message}\n{batch.traceback}")
            if isinstance(batch, Held):  # unless a thread took it, into pinned memory
                batch = batch.taken()
            elif isinstance(batch.image, np.ndarray):
                if not piped:
                    sys.stderr.write(TOO_SMALL)
                piped = True
                batch = each_tensor(batch, torch.from_numpy)
            yield batch
    finally:
        forget(name)


def training_batches(
    store: ShardStore,
    *,
    batch: int,
    steps: int,
    epochs: int = 1,
    patch: Sequence[int] | None = None,
    cases: Sequence[str] | None = None,
    foreground: float = 1 / 3,
    augment: Augment | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Augmented batches for a loop of one's own, `steps` of them in each of `epochs`.

    patch: voxels (z, y, x), by default the plan's. cases: ids, by default all of the store.
    foreground: share of each batch that is centred on a labelled voxel. augment: by default that of
    recipes. The batches are a pure function of these, whatever the number of `workers`. Raises
    InputError.
    """
    manifest = store.manifest
    chosen = manifest.cases if cases is None else tuple(manifest.case(name) for name in cases)
    z, y, x = patch or manifest.plan.patch
    sampler = PatchSampler(
        cases=chosen,
        patch=(z, y, x),
        batch=batch,
        foreground=foreground,
        seed=seed,
    )
    patches = Patches(store, sampler, 0, steps, augment or Augment(), pinned=False)
    stream = batches(patches, Schedule(0, epochs, steps, batch, 1, 0, 1), workers)
    return cast(Iterator[Batch], stream)  # nothing is left to a device


def _forkserver() -> multiprocessing.context.BaseContext:
    """Loader processes start from a server that has loaded this module: at once, and sharing its
    memory."""
    start_server(SERVED, __name__)
    return multiprocessing.get_context("forkserver")


def _in_time(loader: DataLoader) -> Iterator[Batch | Boxes | Failure]:
    """Raises LoaderDied soon after a loader process is gone, or when they give nothing for long.

    Loader processes are children of a server, so no signal reports their death: torch looks when a
    wait ends, which may therefore not be a long one, and can be asked again after it.
    """
    try:
        batches = iter(loader)
    except NO_SERVER as error:
        raise LoaderDied(
            "loading: the process that loader processes start from was killed (out of memory?). "
            "Run the same command again; data.workers=0 reads in the rank itself."
        ) from error
    since = time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            late = "timed out" in str(error)
            if late and time.monotonic() - since < TIMEOUT:
                continue
            for process in getattr(batches, "_workers", ()):
                process.kill()  # it may wait for ever for what the dead one held, deaf to SIGTERM
                process.join(5)
                remove_shared_memory(process.pid)
            reason = f"no batch for {TIMEOUT:.0f} s" if late else error
            raise LoaderDied(
                f"loading: {reason}. A loader process was killed (out of memory?) or hangs on a "
                "slow disk. Run the same command again; data.workers=0 reads in the rank itself."
            ) from error
        yield batch
        since = time.monotonic()


def _as_made(batch: Batch | Boxes | Failure) -> Batch | Boxes | Failure:
    return batch


def on_device(
    batch: Batch | Boxes, device: torch.device, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Image and label on the device, from pinned memory without waiting; augmented there, if that
    was left to it."""
    batch = each_tensor(batch, lambda part: part.to(device, non_blocking=True))
    image, label = augmented(batch) if isinstance(batch, Boxes) else (batch.image, batch.label)
    if channels_last:
        image = image.contiguous(
            memory_format=torch.channels_last if image.ndim == 4 else torch.channels_last_3d
        )
    return image, label
