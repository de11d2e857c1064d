"""Augmentation where the network is (`data.augment.device: auto`). Loader processes draw and read;
the training process moves what they read to the device and computes patches there.

What is drawn is what the CPU draws, and what is computed agrees with it (docs/augmentation.md), but
for the noise, whose stream is one of its own. Plain operations on tensors of any device; no number
is read back and no shape depends on a value, so the host never waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segfleet.pipeline.data.augment import SIGMA, draw_intensity, draw_spatial, flat
from segfleet.pipeline.data.geometry import source
from segfleet.pipeline.data.intensity import SMALL, low_resolution
from segfleet.pipeline.data.normals import normals
from segfleet.pipeline.data.sampler import Draw
from segfleet.pipeline.sections import Augment
from segfleet.preprocess.stores.base import Box

RADIUS = int(3 * SIGMA[1] + 0.5)  # of the widest blur
KINDS = {"float32": torch.float32, "int64": torch.int64}  # of tables
Batched = TypeVar("Batched")


def each_tensor(
    batch: Batched, change: Callable, kinds: tuple[type, ...] = (Tensor, np.ndarray)
) -> Batched:
    """The batch with every tensor of it (or array, of one that came through a pipe) changed; or
    whatever is of `kinds`."""
    held = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: part for name, part in held.items() if isinstance(part, kinds)}
    return replace(batch, **{name: change(part) for name, part in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is read for a patch, and what becomes of it. Voxel (z, y, x) of the patch lies at
    lines[a, z] + lines[a, Z + y] + lines[a, Z + Y + x] + shifts[a] along axis a of the box."""

    box: Box
    lines: np.ndarray  # (3, Z + Y + X) float32
    shifts: np.ndarray | None  # (3, *knots) float32, joined linearly from corner to corner
    moved: bool  # between voxels; otherwise all positions are whole numbers
    drawn: dict  # of `draw_intensity`
    in_plane: bool

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.box)


def drawn_sample(
    options: Augment, rng: np.random.Generator, draw: Draw, patch: tuple[int, ...], channels: int
) -> Sample:
    """The numbers that the CPU draws, in its order; flips and turns become lines that run
    backwards."""
    spatial = draw_spatial(options, rng, patch, draw.case.spacing)
    box, grid = source(replace(spatial, flips=(), turns=0, shifts=None), draw.start, patch)
    lines = [list(three) for three in (grid.lines if grid else _upright(patch))]
    shifts = spatial.shifts
    if shifts is not None:
        low = np.floor(shifts.min((1, 2, 3))).astype(int).tolist()
        high = np.ceil(shifts.max((1, 2, 3))).astype(int).tolist()
        box = tuple(slice(s.start + l, s.stop + h) for s, l, h in zip(box, low, high, strict=True))
        for three, l in zip(lines, low, strict=True):
            three[0] = three[0] - np.float32(l)
        shifts = np.flip(np.rot90(shifts, spatial.turns, (2, 3)), [1 + a for a in spatial.flips])
    for three in lines:
        for _ in range(spatial.turns):
            three[1], three[2] = three[2][::-1], three[1]
        for axis in spatial.flips:
            three[axis] = three[axis][::-1]
    return Sample(
        box=box,
        lines=np.stack([np.concatenate(three) for three in lines]),
        shifts=None if shifts is None else shifts.astype(np.float32),
        moved=grid is not None,
        drawn=draw_intensity(options, rng, channels),
        in_plane=flat(patch, draw.case.spacing),
    )


def _upright(patch: Sequence[int]) -> list[list[np.ndarray]]:
    return [
        [np.arange(p, dtype=np.float32) * np.float32(a == b) for b, p in enumerate(patch)]
        for a in range(3)
    ]


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """One micro-batch of one rank that is not augmented yet: box after box, and behind the last one
    voxels that are never read, for batches of few sizes."""

    image: Tensor  # (n,) in the stored type, each box (C, z, y, x)
    label: Tensor  # (n / C,) uint8
    numbers: Tensor  # (m,) int64, all tables one after another
    tables: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, type and shape
    patch: tuple[int, ...]
    channels: int
    samples: int
    moved: int  # samples whose voxels are mixed; these come first in the tables of the geometry
    reduced: tuple[tuple[int, float, bool], ...]  # row (sample x channel), scale, in plane
    cases: tuple[str, ...]

    def pin_memory(self) -> Boxes:
        return each_tensor(self, lambda part: part.pin_memory(), (Tensor,))

    def unpacked(self) -> dict[str, Tensor]:
        """Views of `numbers`."""
        views, begin = {}, 0
        for name, kind, shape in self.tables:
            count = math.prod(shape)
            stop = begin + (count if kind == "int64" else (count + 1) // 2)
            part = self.numbers[begin:stop].view(KINDS[kind])[:count]
            views[name], begin = part.view(shape), stop
        return views


class Room:
    """Memory that the boxes of a batch are read into."""

    def __init__(self, samples: Sequence[Sample], channels: int, dtype: np.dtype):
        self.samples, self.channels = samples, channels
        self.voxels = [math.prod(sample.size) for sample in samples]
        total = _rounded(sum(self.voxels))
        self.image, self.label = np.empty(channels * total, dtype), np.empty(total, np.uint8)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of every sample the image (C, z, y, x) and the label (z, y, x) to be filled."""
        begin = 0
        for sample, voxels in zip(self.samples, self.voxels, strict=True):
            stop = begin + voxels
            image = self.image[self.channels * begin : self.channels * stop]
            yield (
                image.reshape(self.channels, *sample.size),
                self.label[begin:stop].reshape(sample.size),
            )
            begin = stop

    def boxes(
        self,
        patch: tuple[int, ...],
        scales: Sequence[float],
        masked: Sequence[Sequence[int]],
        cases: tuple[str, ...],
    ) -> Boxes:
        """`scales`: of each sample what its stored integers are multiplied by. `masked`: of each
        the channels whose background stays 0."""
        order = sorted(range(len(self.samples)), key=lambda k: not self.samples[k].moved)
        first = np.cumsum([0, *self.voxels[:-1]])
        moved = [k for k in order if self.samples[k].moved]
        tables = {
            "first": first[order],
            "size": np.array([self.samples[k].size for k in order]),
            "place": np.argsort(order),
            "lines": np.stack([self.samples[k].lines for k in order]),
        }
        if self.image.dtype.kind in "iu":
            tables["scale"] = np.array([scales[k] for k in order], np.float32)
        shifts = [self.samples[k].shifts for k in moved]
        if given := [s for s in shifts if s is not None]:
            tables["shifts"] = np.stack([given[0] * 0 if s is None else s for s in shifts])
        if any(masked):
            tables["masked"] = np.array([[c in m for c in range(self.channels)] for m in masked])
        tables |= _noise(self.samples) | _changes(self.samples, self.channels)
        numbers, layout = _packed(tables)
        return Boxes(
            image=torch.from_numpy(self.image),
            label=torch.from_numpy(self.label),
            numbers=torch.from_numpy(numbers),
            tables=layout,
            patch=patch,
            channels=self.channels,
            samples=len(self.samples),
            moved=len(moved),
            reduced=tuple(
                (k * self.channels + c, scale, sample.in_plane)
                for k, sample in enumerate(self.samples)
                for c, scale in enumerate(sample.drawn.get("low_resolution", ()))
                if scale is not None
            ),
            cases=cases,
        )


def _rounded(count: int) -> int:
    """Four sizes to each doubling: allocators keep what they had."""
    unit = 2 ** max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def _packed(tables: dict[str, np.ndarray]) -> tuple[np.ndarray, tuple]:
    """In one array, for one transfer."""
    parts, layout = [], []
    for name, table in tables.items():
        kind = "float32" if table.dtype.kind == "f" else "int64"
        layout.append((name, kind, table.shape))
        values = table.astype(kind).reshape(-1)
        if kind == "float32":
            values = np.append(values, np.zeros(values.size % 2, np.float32)).view(np.int64)
        parts.append(values)
    return np.concatenate(parts), tuple(layout)


def _noise(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    noisy = [k for k, sample in enumerate(samples) if "noise" in sample.drawn]
    if not noisy:
        return {}
    drawn = [samples[k].drawn["noise"] for k in noisy]
    return {
        "noise_rows": np.array(noisy),
        "noise_key": np.array([seed for _, seed in drawn]),
        "noise": np.array([sigma for sigma, _ in drawn], np.float32),
    }


def _changes(samples: Sequence[Sample], channels: int) -> dict[str, np.ndarray]:
    """Of every kind of change the rows (sample x channel) that have it, and its values."""
    tables: dict[str, np.ndarray] = {}
    for name in CHANGES:
        rows, values = [], []
        for k, sample in enumerate(samples):
            for c, value in enumerate(sample.drawn.get(name, ())):
                if value is not None:
                    rows.append(k * channels + c)
                    values.append(_taps(value, sample.in_plane) if name == "blur" else value)
        if rows and name != "low_resolution":
            tables |= {f"{name}_rows": np.array(rows), name: np.array(values, np.float32)}
    return tables


def _taps(sigmas: Sequence[float], in_plane: bool) -> np.ndarray:
    """(3, RADIUS + 1): weights of a blur along each axis, from the outside to the middle."""
    taps = np.zeros((3, RADIUS + 1))
    for axis, sigma in enumerate(sigmas):
        radius = 0 if axis == 0 and in_plane else int(3 * sigma + 0.5)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        taps[axis, RADIUS - radius :] = (weights / weights.sum())[: radius + 1]
    return taps


def augmented(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """Image (B, C, *S) float32 and label (B, *S) uint8, where the boxes are. In 2D the slice axis
    is gone."""
    tables = boxes.unpacked()
    parts = [
        _patches(boxes, tables, rows, rows.stop <= boxes.moved)
        for rows in (slice(0, boxes.moved), slice(boxes.moved, boxes.samples))
        if rows.stop > rows.start
    ]
    image, label = (
        torch.cat(some).index_select(0, tables["place"]) for some in zip(*parts, strict=True)
    )
    _change(image, tables, boxes.reduced)
    return (image[:, :, 0], label[:, 0]) if boxes.patch[0] == 1 else (image, label)


def _patches(
    boxes: Boxes, tables: dict[str, Tensor], rows: slice, moved: bool
) -> tuple[Tensor, Tensor]:
    """Image (B, C, z, y, x) and label of the samples `rows`, in one pass over their boxes."""

    def of_samples(table: Tensor) -> Tensor:
        return table.view(-1, 1, 1, 1)

    size = tables["size"][rows]
    shifts = None
    if moved and "shifts" in tables:
        shifts = F.interpolate(
            tables["shifts"], size=boxes.patch, mode="trilinear", align_corners=True
        )
    z, y, x = tables["lines"][rows].split(boxes.patch, -1)
    cells, fractions = [], []
    for a in range(3):
        at = (z[:, a, :, None, None] + y[:, a, None, :, None]) + x[:, a, None, None]
        at = at if shifts is None else at + shifts[:, a]
        last = of_samples(size[:, a] - 1)
        at = torch.minimum(at.clamp(min=0), last.float())
        cells.append(at.long())
        if moved:  # the cell has its upper corner inside the box
            cells[a] = torch.minimum(cells[a], (last - 1).clamp(min=0))
            fractions.append(at - cells[a].float())
    across, wide = of_samples(size[:, 1] * size[:, 2]), of_samples(size[:, 2])
    inside = cells[0] * across + cells[1] * wide + cells[2]
    corners = [torch.zeros_like(wide)]
    if moved:
        axes = (1, 2) if boxes.patch[0] == 1 else (0, 1, 2)
        fractions = [fractions[a] for a in axes]
        steps = [
            (across, wide, torch.ones_like(wide))[a] * (of_samples(size[:, a]) > 1) for a in axes
        ]
        corners = [
            sum(step * far for step, far in zip(steps, fars, strict=True))
            for fars in product((0, 1), repeat=len(axes))
        ]
    first, volume = of_samples(tables["first"][rows]), of_samples(size.prod(1))
    channels = []
    for channel in range(boxes.channels):
        begin = inside + (first * boxes.channels + volume * channel)
        values = [torch.take(boxes.image, begin + corner).float() for corner in corners]
        if "scale" in tables:
            values = [value * of_samples(tables["scale"][rows]) for value in values]
        for part in reversed(fractions):
            values = [a + part * (b - a) for a, b in zip(values[::2], values[1::2], strict=True)]
        channels += values
    labels = [torch.take(boxes.label, inside + (first + corner)) for corner in corners]
    return torch.stack(channels, 1), _vote(labels, fractions) if moved else labels[0]


def _vote(corners: list[Tensor], fractions: list[Tensor]) -> Tensor:
    """The label with the largest linear weight among the corners of each cell, of equals the
    smaller: a pass for every corner, however many labels there are."""
    sides = [(1 - part, part) for part in fractions]
    weights = [math.prod(some[1:], start=some[0]) for some in product(*sides)]
    chosen, best = corners[0], torch.full_like(fractions[0], -1)
    for own in corners:
        total = torch.zeros_like(best)
        for other, weight in zip(corners, weights, strict=True):
            total += weight * (other == own)
        better = (total > best) | ((total == best) & (own < chosen))
        best, chosen = torch.where(better, total, best), torch.where(better, own, chosen)
    return chosen


def _change(
    image: Tensor, tables: dict[str, Tensor], reduced: Sequence[tuple[int, float, bool]]
) -> None:
    """The changes of intensity, in place, in the order of `intensity.apply_intensity`."""
    outside = None
    if "masked" in tables:
        masked = tables["masked"].bool()[..., None, None, None]
        outside = ((image == 0) | ~masked).all(1, keepdim=True) & masked
    if "noise" in tables:
        samples = image.view(len(image), -1)
        noise = normals(tables["noise_key"], samples.shape[1]) * tables["noise"][:, None]
        rows = tables["noise_rows"]
        samples.index_copy_(0, rows, samples.index_select(0, rows) + noise)
    channels = image.view(-1, *image.shape[2:])
    for name, change in CHANGES.items():
        if change is None:
            for row, scale, in_plane in reduced:
                low_resolution(channels[row], scale, in_plane)
        elif name in tables:
            rows = tables[f"{name}_rows"]
            before = channels.index_select(0, rows)
            channels.index_copy_(0, rows, change(before, tables[name][..., None, None, None]))
    if outside is not None:
        image.masked_fill_(outside, 0.0)


def blur(rows: Tensor, taps: Tensor) -> Tensor:
    for axis, size in enumerate(rows.shape[1:], start=1):
        if size == 1:
            continue
        weights = taps[:, axis - 1].unbind(1)
        at = torch.arange(-RADIUS, size + RADIUS, device=rows.device).clamp(0, size - 1)
        padded = rows.index_select(axis, at)
        rows = padded.narrow(axis, RADIUS, size) * weights[RADIUS]
        for k in range(RADIUS):
            pair = padded.narrow(axis, k, size) + padded.narrow(axis, 2 * RADIUS - k, size)
            rows += pair * weights[k]
    return rows


def brightness(rows: Tensor, factor: Tensor) -> Tensor:
    return rows * factor


def contrast(rows: Tensor, factor: Tensor) -> Tensor:
    mean = rows.mean((1, 2, 3), keepdim=True)
    low, high = _range(rows)
    return torch.clamp((rows - mean) * factor + mean, low, high)


def gamma(rows: Tensor, power: Tensor) -> Tensor:
    variance, mean = torch.var_mean(rows, (1, 2, 3), keepdim=True)
    low, high = _range(rows)
    span = high - low
    raised = ((rows - low) / span.clamp(min=SMALL)) ** power * span + low
    own_variance, own_mean = torch.var_mean(raised, (1, 2, 3), keepdim=True)
    factor = variance.sqrt() / own_variance.sqrt().clamp(min=SMALL)
    return (raised - own_mean) * factor + mean


def gamma_inverted(rows: Tensor, power: Tensor) -> Tensor:
    return -gamma(-rows, power)


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.amin((1, 2, 3), keepdim=True), rows.amax((1, 2, 3), keepdim=True)


# In nnU-Net's order. Each takes (rows, z, y, x) and its values (rows, ..., 1, 1, 1).
CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "low_resolution": None,  # one by one: each is reduced to another size
    "gamma_inverted": gamma_inverted,
    "gamma": gamma,
}
