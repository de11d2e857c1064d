"""The ranks that train together. One process is a single rank, so nobody asks whether a process
group exists."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
TIMEOUT = datetime.timedelta(minutes=30)


class Ranks:
    """A single rank."""

    rank, size, local_rank = 0, 1, 0

    def __init__(self, device: torch.device | None = None):
        self.device = device or pick_device(0)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place, on every rank."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; the same answer on every rank."""
        return flag

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's thing, in the order of ranks, on every rank. Small plain data."""
        return [thing]

    def share(self, thing: Any) -> Any:
        """Rank 0's thing on every rank."""
        return thing

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class ProcessRanks(Ranks):
    """Ranks in processes: NCCL for tensors on GPUs, and gloo for decisions, which therefore never
    wait for a GPU."""

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        store: dist.Store,
        device: torch.device | None = None,
    ):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.device = device or pick_device(local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self.control = (
            dist.new_group(backend="gloo") if self.device.type == "cuda" else dist.group.WORLD
        )
        self._flag = torch.zeros(1, dtype=torch.int32)

    def sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.control if value.device.type == "cpu" else None)
        return value

    def any(self, flag: bool) -> bool:
        self._flag[0] = flag
        dist.all_reduce(self._flag, group=self.control)
        return bool(self._flag[0])

    def gather(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def share(self, thing: Any) -> Any:
        things = [thing]
        dist.broadcast_object_list(things, src=0, group=self.control)
        return things[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def close(self) -> None:
        dist.destroy_process_group()


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank out of those it was granted, or the CPU."""
    if torch.cuda.is_available() and os.environ.get("SEGFLEET_DEVICE", "cuda") == "cuda":
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def join_ranks(rendezvous: Path) -> Ranks:
    """The ranks this process was started for: RANK, WORLD_SIZE and LOCAL_RANK say which; without
    them a single rank.

    Rank 0 lets the kernel choose a port and publishes it in the file `rendezvous`; nobody derives
    or guesses one.
    """
    if not all(name in os.environ for name in ENVIRONMENT):
        return Ranks()
    rank, size, local_rank = (int(os.environ[name]) for name in ENVIRONMENT)
    if size == 1:
        return Ranks(pick_device(local_rank))
    host = os.environ.get("SEGFLEET_MASTER_HOST", "127.0.0.1")
    if rank == 0:
        store = dist.TCPStore(
            host, 0, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False
        )
        partial = rendezvous.with_suffix(".partial")
        partial.write_text(f"{host} {store.port}")
        os.replace(partial, rendezvous)
    else:
        deadline = time.monotonic() + 300
        while not rendezvous.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank} waited 300 s for rank 0 to publish its address in {rendezvous}"
                )
            time.sleep(0.02)
        host, port = rendezvous.read_text().split()
        store = dist.TCPStore(
            host, int(port), size, is_master=False, timeout=TIMEOUT, wait_for_workers=False
        )
    return ProcessRanks(rank, size, local_rank, store)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over all ranks, with gradients: for what a loss takes over the whole batch. One
    collective each in forward and backward.

    Every rank then has the loss of the whole batch. The engines average gradients over the ranks,
    which is right for it.
    """
    return _Sum.apply(value) if dist.is_initialized() and dist.get_world_size() > 1 else value


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
