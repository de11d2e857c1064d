"""How a batch gets from a loader process to its rank: through shared memory that both keep.

A tensor that torch sends costs new shared memory, its pages, a connection to fetch it by and a
mapping: 3 ms a 2D batch, twice what it takes to make. Here a loader process has one room of a few
slots, which travels once; then it fills slot after slot and sends their numbers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from segfleet.core.litter import remove_shared_memory
from segfleet.pipeline.data.device_augment import Batched, each_tensor

PREFETCH = 2  # batches a loader process is asked for beyond those that its rank has been given
SLOTS = PREFETCH + 1  # and the one that the rank is taking
LINE = 64  # bytes: where parts begin; the first line of a slot holds the turn


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in its slot."""

    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, slot: Tensor) -> Tensor:
        count = math.prod(self.shape) * self.dtype.itemsize
        return slot[self.start : self.start + count].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Held(Generic[Batched]):
    """A batch with `Part`s for tensors. `memory` (slots, bytes) comes with the first of a room."""

    batch: Batched
    sender: str
    turn: int
    memory: Tensor | None

    def taken(self, pin: bool = False) -> Batched:
        """The batch, copied out of its slot, which is then free. In the order of sending."""
        if self.memory is not None:
            ROOMS[self.sender] = self.memory
        slot = ROOMS[self.sender][self.turn % SLOTS]

        def copied(part: Part) -> Tensor:
            stored = part.of(slot)
            return torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pin).copy_(stored)

        batch = each_tensor(self.batch, copied, (Part,))
        if int(_turn(slot)) != self.turn:
            raise RuntimeError(f"a loader process wrote batch {int(_turn(slot))} over {self.turn}")
        return batch

    def pin_memory(self) -> Batched:
        """For `DataLoader`, whose thread calls it."""
        return self.taken(pin=True)


ROOMS: dict[str, Tensor] = {}  # by sender, in the receiving process


class Sender:
    """Puts batches into slots, in a loader process. Where shared memory is full they become arrays,
    which go through the pipe.

    Here and not where they are sent: a thread of multiprocessing does that, which fails silently,
    and the batch would be waited for in vain.
    """

    def __init__(self, name: str):
        """`name`: in common with the other processes of a loader."""
        self.name, self.turn = name, 0
        self.room: Tensor | None = None
        self.full = False  # whether there was no room for one

    def __call__(self, batch: Batched) -> Batched | Held[Batched]:
        if not self.full:
            try:
                return self._held(batch)
            except RuntimeError:
                # not again at every batch: torch gives the file its name first, and leaves it;
                # those of rooms that are in use have none any more
                self.full = True
                remove_shared_memory(os.getpid())
        return each_tensor(batch, lambda part: part.numpy())

    def _held(self, batch: Batched) -> Batched | Held[Batched]:
        parts: list[tuple[Part, Tensor]] = []
        end = LINE

        def placed(tensor: Tensor) -> Part:
            nonlocal end
            part = Part(end, tuple(tensor.shape), tensor.dtype)
            parts.append((part, tensor))
            end += -(-tensor.nbytes // LINE) * LINE
            return part

        batch, fresh = each_tensor(batch, placed), None
        if not parts:  # a failure
            return batch
        if self.room is None or end > self.room.shape[1]:
            # boxes differ in size: not a new room for each that is a little larger
            size = end if self.room is None else -(-end * 5 // 4 // LINE) * LINE
            self.room = fresh = torch.empty((SLOTS, size), dtype=torch.uint8).share_memory_()
        self.turn += 1
        slot = self.room[self.turn % SLOTS]
        _turn(slot).fill_(self.turn)
        for part, tensor in parts:
            part.of(slot).copy_(tensor)
        worker = getattr(get_worker_info(), "id", 0)
        return Held(batch, f"{self.name} {worker}", self.turn, fresh)


def forget(name: str) -> None:
    """Let go of the rooms of a loader that has ended."""
    for sender in [key for key in ROOMS if key.startswith(f"{name} ")]:
        del ROOMS[sender]


def _turn(slot: Tensor) -> Tensor:
    return slot[:8].view(torch.int64)
