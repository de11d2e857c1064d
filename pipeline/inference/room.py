"""How much of a GPU the sliding window may take: what is free, and what a tile costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from segfleet.core.machine import memory_budget

# Voxels of one pass: four tiles of 128 x 128 x 128 keep a GPU busy, and more of them only take
# memory.
MOST_VOXELS = 2**23
# Of what is free, the share that is used: fragments, cuDNN's workspaces and neighbours on the card
# take some.
SHARE = 0.8
# Volumes of float32 besides the sums of K classes: weights, and what arg-max and restoring hold.
BESIDES = 4


# Times its stored image that reading and resampling a case takes of the host's memory at most.
PREPARING = 16


def pinned(image: Tensor, device: torch.device | str) -> Tensor:
    """The image where a copy to the device begins: in pinned memory for a GPU."""
    return image.pin_memory() if torch.device(device).type == "cuda" else image


def roomy(image: Tensor) -> bool:
    """Whether the host has memory to prepare another case like this one."""
    return PREPARING * image.nbytes < memory_budget()


class CudaMemory:
    """What PyTorch's allocator says of one device."""

    def __init__(self, device: torch.device):
        self.device = device

    def free(self) -> int:
        """Bytes that this process could still take: the card's, and those it holds unused."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def begin(self) -> None:
        """From now on `peak` counts."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self.start = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most bytes held at once since `begin`, besides those held then."""
        return torch.cuda.max_memory_allocated(self.device) - self.start

    def drop_cache(self) -> None:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Layout:
    """Where the sums lie and how many tiles go through the network at once."""

    sums_on_device: bool
    batch: int


def layout(free: int, tile: int, sizes: tuple[int, int, int], asked: int) -> Layout:
    """The fastest layout that fits.

    free: bytes; tile: bytes that one tile took; sizes: voxels of a tile, voxels of the image,
    classes; asked: tiles per pass that the recipe wants, 1 (its default) leaves them to us: a power
    of two.
    """
    voxels, whole, classes = sizes
    sums = 4 * (classes + BESIDES) * whole
    room = SHARE * free
    on_device = sums + asked * tile <= room
    if asked > 1:
        return Layout(on_device, asked)
    left = room - sums if on_device else room
    fitting = max(1, min(int(left / max(tile, 1)), math.ceil(MOST_VOXELS / voxels)))
    return Layout(on_device, 2 ** (fitting.bit_length() - 1))


def padded_count(tiles: int, batch: int) -> int:
    """Tiles of a pass with those that fill it up: a power of two, `batch` at most. cuDNN searches
    its kernels anew for every size that it has not met, which takes longer than a few tiles."""
    return min(batch, 1 << (tiles - 1).bit_length())
