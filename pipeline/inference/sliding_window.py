"""Whole images through a network that takes patches: overlapping tiles, Gaussian weights, mirrored
copies (specs: nnU-Net inference)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segfleet.core.errors import InputError

Forward = Callable[[Tensor], Tensor]


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
    keep_on: torch.device | str | None = None,
) -> Tensor:
    """(C, Z, Y, X) image -> (K, Z, Y, X) float32: the weighted mean of what `forward` says of every
    tile.

    The image may be of any type; its tiles become float32, those of integers times `scale`.
    forward maps (B, C, *S) to (B, K, *S), probabilities or logits, with S = patch (dims=3) or
    patch[1:] (dims=2: slice by slice, up to `batch` tiles of any slices at a time). `patch` and
    `mirror_axes` are in axes (z, y, x) = (0, 1, 2). An image smaller than the patch is padded with
    zeros on both sides and cut afterwards. Tiles are moved to `device` (default: the image's), sums
    are kept on `keep_on` (default: the image's), so a volume larger than the GPU's memory still
    passes. The order of summation is
    fixed: same input, same bits. Of several `forward`, networks of one size, the mean: each goes
    over the whole image and is dropped before the next is asked for, into the same sums, so memory
    does not grow with their number. Raises InputError for an impossible patch, overlap or axis,
    FloatingPointError when the network's output is not finite.
    """
    patch = _checked(image_CZYX, patch, overlap, mirror_axes, batch, dims)
    device = torch.device(device) if device is not None else image_CZYX.device
    keep_on = torch.device(keep_on) if keep_on is not None else image_CZYX.device
    padded, inner = _padded(image_CZYX, patch)
    weight = importance(patch, keep_on)
    total, weights = None, torch.zeros(padded.shape[1:], device=keep_on)
    flips = [axis + 2 - (3 - dims) for axis in mirror_axes]
    networks = iter([forward] if callable(forward) else forward)
    with torch.no_grad():
        while (network := next(networks, None)) is not None:
            for boxes in _batches(_boxes(padded.shape[1:], patch, overlap, dims), batch):
                tiles = torch.stack([padded[(slice(None), *box)] for box in boxes]).to(device)
                tiles = tiles.float() if tiles.is_floating_point() else tiles.float() * scale
                tiles = tiles[:, :, 0] if dims == 2 else tiles
                found = mirrored(network, tiles, flips).float().to(keep_on)
                if found.shape[2:] != tiles.shape[2:]:
                    raise InputError(
                        f"sliding window: the network gave size {tuple(found.shape[2:])} for a "
                        f"tile of {tuple(tiles.shape[2:])}"
                    )
                found = found[:, :, None] if dims == 2 else found
                if total is None:
                    total = torch.zeros((found.shape[1], *padded.shape[1:]), device=keep_on)
                for box, one in zip(boxes, found, strict=True):
                    total[(slice(None), *box)] += one * weight
                    weights[box] += weight
            network = None  # before the next is loaded
    total = total.div_(weights)[(slice(None), *inner)]
    if not total.sum().isfinite():
        raise FloatingPointError(
            "sliding window: the network's output is not finite (NaN or infinity): the training "
            "diverged"
        )
    return total.contiguous()


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


def _boxes(
    shape: Sequence[int], patch: Sequence[int], overlap: float, dims: int
) -> Iterator[tuple[slice, ...]]:
    starts = [tile_starts(size, p, overlap) for size, p in zip(shape, patch, strict=True)]
    if dims == 2:
        starts[0] = list(range(shape[0]))
    for corner in itertools.product(*starts):
        yield tuple(slice(start, start + p) for start, p in zip(corner, patch, strict=True))


def _batches(boxes: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(boxes, size)):
        yield chunk
