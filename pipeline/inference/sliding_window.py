"""Whole images through a network that takes patches: overlapping tiles, Gaussian weights, mirrored
copies (specs: nnU-Net inference)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.room import CudaMemory, layout, padded_count

Forward = Callable[[Tensor], Tensor]
Box = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a network looks at whole images: what `sliding_window` asks for, in axes (z, y, x)."""

    patch: Sequence[int]
    overlap: float = 0.5
    mirror_axes: Sequence[int] = ()
    batch: int = 1
    dims: int | None = None  # None: 2 for a patch of one slice, else 3
    device: torch.device | str = "cpu"

    def options(self) -> dict[str, Any]:
        """Keywords of `sliding_window`."""
        dims = self.dims or (2 if self.patch[0] == 1 else 3)
        return {**vars(self), "dims": dims}


def tile_starts(size: int, patch: int, overlap: float = 0.5) -> list[int]:
    """First voxels of the tiles along one axis: ceil((size - patch) / ((1 - overlap) * patch)) + 1
    of them, evenly spread."""
    assert size >= patch > 0, "pad the image first"
    # 1e-9: 0.3 * 10 is 2.9999999999999996
    count = math.ceil((size - patch) / ((1.0 - overlap) * patch) - 1e-9) + 1
    return [round((size - patch) * i / max(count - 1, 1)) for i in range(count)]


def importance(patch: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(Z, Y, X) float32 weights of a tile: a Gaussian, sigma = patch / 8, about voxel patch // 2;
    zeros lifted to the smallest positive."""
    weight = torch.ones((1,) * len(patch), dtype=torch.float64)
    for axis, size in enumerate(patch):
        line = torch.exp(
            -0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / (size / 8)) ** 2
        )
        weight = weight * line.reshape([-1 if a == axis else 1 for a in range(len(patch))])
    weight = (weight / weight.max()).float()
    smallest = torch.where(weight > 0, weight, 1.0).min()
    return torch.where(weight == 0, smallest, weight).to(device)


def mirrored(forward: Forward, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Mean of `forward` over all flips of the tensor axes `axes` (of x), each flipped back: 2 **
    len(axes) passes."""
    total = forward(x)
    flips = [c for n in range(1, len(axes) + 1) for c in itertools.combinations(axes, n)]
    for flip in flips:
        total = total + forward(x.flip(flip)).flip(flip)
    return total / (len(flips) + 1)


def sliding_window(
    forward: Forward | Iterable[Forward],
    image_CZYX: Tensor,
    *,
    patch: Sequence[int],
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    batch: int = 1,
    dims: int,
    scale: float = 1.0,
    device: torch.device | str | None = None,
    memory: CudaMemory | None = None,
) -> Tensor:
    """(C, Z, Y, X) image -> (K, Z, Y, X) float32: the weighted mean of what `forward` says of every
    tile.

    The image may be of any type; its tiles become float32, those of integers times `scale`.
    forward maps (B, C, *S) to (B, K, *S), probabilities or logits, with S = patch (dims=3) or
    patch[1:] (dims=2: slice by slice, up to `batch` tiles of any slices at a time). `patch` and
    `mirror_axes` are in axes (z, y, x) = (0, 1, 2). An image smaller than the patch is padded with
    zeros on both sides and cut afterwards. Tiles go to `device` (default: the image's).

    On a GPU the image and the sums lie there while they fit, and so does the result; else they stay
    on the host, so a volume larger than the GPU's memory still passes. Of `batch` 1, the default of
    a recipe, several tiles go at once there, as many as its memory holds and as pay (a last pass is
    filled up). Only the rounding of the network depends on it. `memory`: says what a GPU has; by
    default `device`'s own.

    The order of summation is fixed: same input, same bits. Of several `forward`, networks of one
    size, the mean: each goes over the whole image and is dropped before the next is asked for,
    into the same sums, so memory does not grow with their number. Raises InputError for an
    impossible patch, overlap or axis, FloatingPointError when the network's output is not finite.
    """
    patch = _checked(image_CZYX, patch, overlap, mirror_axes, batch, dims)
    device = torch.device(device) if device is not None else image_CZYX.device
    if memory is None and device.type == "cuda":
        memory = CudaMemory(device)
    if memory is not None and image_CZYX.nbytes < memory.free() // 8:
        image_CZYX = image_CZYX.to(device, non_blocking=True)
    padded, inner = _padded(image_CZYX, patch)
    boxes = list(_boxes(padded.shape[1:], patch, overlap, dims))
    sums = _Sums(padded.shape[1:], patch, device if memory is None else None)
    tiles = _Tiles(padded, device, scale, dims, [axis + 2 - (3 - dims) for axis in mirror_axes])
    networks = iter([forward] if callable(forward) else forward)
    size = batch if memory is None else 0  # 0: one tile shows what it takes
    with torch.no_grad():
        while (network := next(networks, None)) is not None:
            at = 0
            while at < len(boxes):
                chunk = boxes[at : at + max(size, 1)]
                if memory is not None and not size:
                    memory.begin()
                count = len(chunk) if memory is None else padded_count(len(chunk), max(size, 1))
                outputs = None
                try:
                    outputs = tiles.through(network, chunk, count)
                except torch.OutOfMemoryError:
                    # a neighbour on the card may have grown
                    if memory is None or (len(chunk) == 1 and not sums.to_host()):
                        raise
                if outputs is None:  # outside `except`, which holds the tensors of the failed pass
                    memory.drop_cache()
                    size = max(1, count // 2)
                    continue
                if memory is not None and not size:
                    sizes = (math.prod(patch), math.prod(padded.shape[1:]), outputs.shape[1])
                    chosen = layout(memory.free(), memory.peak(), sizes, batch)
                    sums.place(outputs.shape[1], device if chosen.sums_on_device else "cpu")
                    size = chosen.batch
                sums.add(chunk, outputs)
                at += len(chunk)
            network = None  # before the next is loaded
    total = sums.mean()[(slice(None), *inner)]
    if not total.sum().isfinite():
        raise FloatingPointError(
            "sliding window: the network's output is not finite (NaN or infinity): the training "
            "diverged"
        )
    return total.contiguous()


class _Tiles:
    """The tiles of an image, padded, and what a network says of them."""

    def __init__(
        self, padded: Tensor, device: torch.device, scale: float, dims: int, flips: Sequence[int]
    ):
        self.padded, self.device, self.scale = padded, device, scale
        self.dims, self.flips = dims, flips

    def through(self, network: Forward, boxes: Sequence[Box], count: int) -> Tensor:
        """(B, K, Z, Y, X) float32 on the device, of the tiles in `boxes`; the last one fills up
        the pass to `count`."""
        filled = [*boxes, *[boxes[-1]] * (count - len(boxes))]
        tiles = torch.stack([self.padded[(slice(None), *box)] for box in filled])
        if self.device.type == "cuda" and tiles.device.type == "cpu":
            tiles = tiles.pin_memory()
        tiles = tiles.to(self.device, non_blocking=True)
        tiles = tiles.float() if tiles.is_floating_point() else tiles.float() * self.scale
        tiles = tiles[:, :, 0] if self.dims == 2 else tiles
        outputs = mirrored(network, tiles, self.flips).float()
        if outputs.shape[2:] != tiles.shape[2:]:
            raise InputError(
                f"sliding window: the network gave size {tuple(outputs.shape[2:])} for a tile of "
                f"{tuple(tiles.shape[2:])}"
            )
        return (outputs[:, :, None] if self.dims == 2 else outputs)[: len(boxes)]


class _Sums:
    """Weighted sums of tiles and of their weights, on a device or on the host.

    On the host, what a pass on a GPU gives is fetched through pinned memory while the next one
    runs, and added in the same order.
    """

    def __init__(self, shape: Sequence[int], patch: Sequence[int], where: torch.device | None):
        self.shape, self.patch, self.where = tuple(shape), patch, where
        self.total: Tensor | None = None
        self.waiting: tuple[Sequence[Box], Tensor, Any] | None = None

    def place(self, channels: int, where: torch.device | str) -> None:
        """Make the sums, there if they fit in one piece."""
        try:
            self._make(channels, torch.device(where))
        except torch.OutOfMemoryError:
            self._make(channels, torch.device("cpu"))

    def _make(self, channels: int, where: torch.device) -> None:
        self.total = torch.zeros((channels, *self.shape), device=where)
        self.weights = torch.zeros(self.shape, device=where)
        self.weight = importance(self.patch, where)
        self.where = where

    def to_host(self) -> bool:
        """Give the device's memory to the network; False if there is nothing to give."""
        if self.total is None or self.total.device.type == "cpu":
            return False
        self.total, self.weights, self.weight = (
            value.cpu() for value in (self.total, self.weights, self.weight)
        )
        self.where = self.total.device
        return True

    def add(self, boxes: Sequence[Box], outputs_BKZYX: Tensor) -> None:
        if self.total is None:
            self._make(outputs_BKZYX.shape[1], self.where)
        if outputs_BKZYX.device == self.total.device:
            self._add(boxes, outputs_BKZYX)
            return
        before, self.waiting = self.waiting, (boxes, *_fetched(outputs_BKZYX))
        self._settle(before)

    def _settle(self, waiting: tuple[Sequence[Box], Tensor, Any] | None) -> None:
        if waiting is not None:
            boxes, outputs, done = waiting
            done.synchronize()
            self._add(boxes, outputs)

    def _add(self, boxes: Sequence[Box], outputs_BKZYX: Tensor) -> None:
        for box, output in zip(boxes, outputs_BKZYX, strict=True):
            self.total[(slice(None), *box)] += output * self.weight
            self.weights[box] += self.weight

    def mean(self) -> Tensor:
        """(K, Z, Y, X), in the place of the sums."""
        self._settle(self.waiting)
        self.waiting = None
        return self.total.div_(self.weights)


def _fetched(outputs: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, on its way, and the event of its arrival."""
    host = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=True)
    host.copy_(outputs, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(outputs.device))
    return host, done


def _checked(
    image: Tensor,
    patch: Sequence[int],
    overlap: float,
    mirror_axes: Sequence[int],
    batch: int,
    dims: int,
) -> tuple[int, ...]:
    assert image.ndim == 4, f"expected (C, Z, Y, X), found {tuple(image.shape)}"
    if dims not in (2, 3):
        raise InputError(f"dims: found {dims}, expected 2 or 3")
    if len(patch) != 3 or min(patch) < 1:
        raise InputError(
            f"patch: found {tuple(patch)}, expected three sizes of at least 1 (z, y, x)"
        )
    if not 0 <= overlap < 1:
        raise InputError(
            f"overlap: found {overlap}, expected 0 or more and less than 1 (0.5 is usual)"
        )
    legal = (1, 2) if dims == 2 else (0, 1, 2)
    if len(set(mirror_axes)) != len(mirror_axes) or not set(mirror_axes) <= set(legal):
        raise InputError(
            f"mirror_axes: found {tuple(mirror_axes)}, expected different ones of {legal} (z, y, "
            f"x = 0, 1, 2) in {dims}D"
        )
    if batch < 1:
        raise InputError(f"batch: found {batch}, expected at least 1")
    return (1, *patch[1:]) if dims == 2 else tuple(patch)


def _padded(image: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The image padded with zeros to at least `patch`, and the box of the image inside."""
    missing = [max(p - size, 0) for p, size in zip(patch, image.shape[1:], strict=True)]
    inner = tuple(
        slice(m // 2, m // 2 + size) for m, size in zip(missing, image.shape[1:], strict=True)
    )
    if any(missing):
        image = F.pad(image, [side for m in reversed(missing) for side in (m // 2, m - m // 2)])
    return image, inner


def _boxes(shape: Sequence[int], patch: Sequence[int], overlap: float, dims: int) -> Iterator[Box]:
    starts = [tile_starts(size, p, overlap) for size, p in zip(shape, patch, strict=True)]
    if dims == 2:
        starts[0] = list(range(shape[0]))
    for corner in itertools.product(*starts):
        yield tuple(slice(start, start + p) for start, p in zip(corner, patch, strict=True))
