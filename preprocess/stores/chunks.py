"""The inner chunk of a shard: small enough that a random patch decodes little it does not need,
large enough to be worth a read."""

from __future__ import annotations

import math

SMALLEST = 64 * 2**10  # bytes of one decoded chunk
LARGEST = 256 * 2**10
HARDLY = 1.25  # an array that is no longer than this many patches is read almost whole

Shape = tuple[int, int, int]


def chunk_of(patch: Shape, shape: Shape, voxel_bytes: int = 2) -> Shape:
    """Chunk (z, y, x) in voxels for patches `patch` read at random places of arrays of about
    `shape`.

    Per axis the power of two nearest a quarter of the patch (a random patch of side p touches ((p +
    c) / p)^3 voxels per voxel wanted: 1.95 instead of 3.4 for half of it); then doubled or halved
    along the axis that is shortest or longest against the patch until a chunk holds 64 to 256 KiB,
    never longer than the array or the patch rounded up to a power of two. A small array that is
    hardly longer than the patch is one chunk. `voxel_bytes` counts all channels: a chunk holds
    every channel, since training reads them together. A 2D patch (1, y, x) gives (1, y, x).
    """
    hardly = all(s <= HARDLY * p for p, s in zip(patch, shape, strict=True))
    if hardly and math.prod(shape) * voxel_bytes <= LARGEST:
        return tuple(shape)
    limit = [min(s, 2 ** math.ceil(math.log2(p))) for p, s in zip(patch, shape, strict=True)]
    chunk = [min(_power_of_two(p / 4), most) for p, most in zip(patch, limit, strict=True)]

    def held() -> int:
        return math.prod(chunk) * voxel_bytes

    while held() < SMALLEST and chunk != limit:
        axis = min(
            (a for a in range(3) if chunk[a] < limit[a]), key=lambda a: (chunk[a] / patch[a], -a)
        )
        chunk[axis] = min(2 * chunk[axis], limit[axis])
    while held() > LARGEST and max(chunk) > 1:
        axis = max((a for a in range(3) if chunk[a] > 1), key=lambda a: (chunk[a] / patch[a], -a))
        chunk[axis] = -(-chunk[axis] // 2)
    return chunk[0], chunk[1], chunk[2]


def _power_of_two(length: float) -> int:
    """The power of two nearest `length`, at least 1; the smaller of two that are as near."""
    low = 2 ** max(0, math.floor(math.log2(length))) if length >= 1 else 1
    return low if length - low <= 2 * low - length else 2 * low
