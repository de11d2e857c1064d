"""The ranks that train together. One process is a single rank, so no caller asks whether a process
group exists."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from segfleet.core.errors import InputError, explain
from segfleet.pipeline.devices import driver
from segfleet.pipeline.launch.rendezvous import JoinFailed, NotOurs, SealedStore, join, prove
from segfleet.pipeline.stop import Interrupted

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
TIMEOUT = datetime.timedelta(minutes=30)
DESCRIPTORS = 65_536


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

    def start_max(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to take the largest over the ranks of each of `values` (on the CPU); what is
        returned waits for the answer."""
        return lambda: values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's thing, in the order of ranks, on every rank: JSON, so tuples are lists."""
        return [value]

    def share(self, value: Any) -> Any:
        """Rank 0's thing on every rank: JSON, as for `gather`."""
        return value

    def barrier(self) -> None:
        pass

    def give_up(self, message: str) -> None:
        """End this process at once, from any thread: another rank hangs. Whoever started it may put
        its own way in place of this."""
        sys.stderr.write(f"segfleet: {message}\n")
        sys.stderr.flush()
        os._exit(Interrupted.exit_code)

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
        store: SealedStore,
        device: torch.device | None = None,
    ):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.device = device or pick_device(local_rank)
        check_devices(rank, size, store, place_of(self.device))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.store = (
            store  # torch calls its methods whenever a group is made, and keeps no reference
        )
        # tensors on the CPU go by gloo in either case: one mesh of connections, not two
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self.control = dist.group.WORLD
        prove(self.control, rank, size, store)
        self._flag = torch.zeros(1, dtype=torch.int32)

    def sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        self._flag[0] = flag
        dist.all_reduce(self._flag, group=self.control)
        return bool(self._flag[0])

    def start_max(self, values: Tensor) -> Callable[[], Tensor]:
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> Tensor:
            work.wait()
            return values

        return answer

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._all_texts(json.dumps(value).encode())]

    def share(self, value: Any) -> Any:
        text = json.dumps(value).encode() if self.rank == 0 else b""
        count = torch.tensor([len(text)])
        dist.broadcast(count, src=0, group=self.control)
        body = _tensor(text, int(count))
        dist.broadcast(body, src=0, group=self.control)
        return json.loads(body.numpy().tobytes())

    def _all_texts(self, text: bytes) -> list[bytes]:
        """Of every rank: the lengths first, for a collective takes equal ones."""
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(text)]), group=self.control)
        longest = max(map(int, counts))
        bodies = [torch.empty(longest, dtype=torch.uint8) for _ in counts]
        dist.all_gather(bodies, _tensor(text, longest), group=self.control)
        return [
            body.numpy()[: int(count)].tobytes() for body, count in zip(bodies, counts, strict=True)
        ]

    def barrier(self) -> None:
        self.any(False)  # torch's own would wait for the GPU

    def close(self) -> None:
        dist.destroy_process_group()


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank out of those it was granted, or the CPU. Raises InputError where there
    is a GPU whose driver is too old: a CPU would silently take weeks."""
    if os.environ.get("SEGFLEET_DEVICE", "cuda") != "cuda":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if problem := driver.fault():
        raise InputError(f"device: {problem}; or set SEGFLEET_DEVICE=cpu.")
    return torch.device("cpu")


def device_of(text: str | None) -> torch.device:
    """The device that a user names for one process: cpu, cuda, cuda:1; None: the best there is.
    Raises InputError."""
    if text is None:
        return pick_device(0)
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if not match:
        raise InputError(f"device: found '{text}', expected cpu, cuda or the number of one, cuda:1")
    number, there = int(match[1] or 0), torch.cuda.device_count() if text != "cpu" else 0
    if text != "cpu" and number >= there:
        raise InputError(
            f"device: found '{text}', but this process sees {there} GPU(s); `segfleet doctor` "
            "says why"
        )
    return torch.device("cpu") if text == "cpu" else torch.device("cuda", number)


def place_of(device: torch.device) -> list[str]:
    """The host, the device and the model of the device of a rank, as every other process would name
    them: a process may see its granted GPU as cuda:0 when its neighbour does so, too."""
    if device.type == "cpu":
        return [socket.gethostname(), "cpu", ""]
    properties = torch.cuda.get_device_properties(device)
    return [socket.gethostname(), str(properties.uuid), properties.name]


def check_devices(rank: int, size: int, store: dist.Store, place: list[str]) -> None:
    """Every rank has a GPU of its own, or all of them the CPU. Raises InputError on every rank, in
    place of what NCCL would say. One read of all places, by rank 0."""
    store.set(f"place/{rank}", json.dumps(place))
    if rank == 0:
        texts = [store.get(f"place/{other}") for other in range(size)]
        places = [json.loads(text) for text in texts]
        if warning := mixture(places):
            sys.stderr.write(f"segfleet: {warning}\n")
        store.set("places", _fault(places))
    if fault := store.get("places").decode():
        raise InputError(fault)


def _fault(places: list[list[str]]) -> str:
    """What is wrong with the devices of the ranks; empty: nothing."""
    cpu = "SEGFLEET_DEVICE=cpu trains on the CPUs"
    ranks, devices = Counter(host for host, *_ in places), defaultdict(set)
    for host, device, *_ in places:
        devices[host].add(device)
    without = [host for host, kinds in devices.items() if "cpu" in kinds]
    if without and any(kinds != {"cpu"} for kinds in devices.values()):
        return (
            f"ranks: found GPUs on some nodes and none on {', '.join(without)}; expected one kind "
            f"of device for all {len(places)} ranks. Leave those nodes out, or {cpu}"
        )
    for host, kinds in devices.items():
        if kinds != {"cpu"} and ranks[host] > len(kinds):
            return (
                f"ranks: found {ranks[host]} on {host}, which has {len(kinds)} GPU(s) for them; "
                f"expected a GPU for every rank. Use --ranks {len(kinds)} (in a job "
                f"--gpus-per-node {len(kinds)}), or {cpu}"
            )
    return ""


def mixture(places: list[list[str]]) -> str:
    """One sentence if the ranks' GPUs are of several models; else empty."""
    hosts: dict[str, dict[str, int]] = {}
    for host, device, model in places:
        if device != "cpu":
            count = hosts.setdefault(model, {})
            count[host] = count.get(host, 0) + 1
    if len(hosts) < 2:
        return ""
    groups = [
        f"{sum(count.values())} x {model} on {', '.join(count)}"
        for model, count in sorted(hosts.items())
    ]
    return (
        f"ranks: found GPUs of {len(groups)} models: {'; '.join(groups)}. Every step waits for the "
        "slowest, and other nodes may round otherwise"
    )


def join_ranks(rendezvous: Path) -> Ranks:
    """The ranks this process was started for: RANK, WORLD_SIZE and LOCAL_RANK say which; without
    them a single rank.

    Rank 0 lets the kernel choose a port and publishes it, with a token, in the file `rendezvous`.
    """
    if not all(name in os.environ for name in ENVIRONMENT):
        return Ranks()
    rank, size, local_rank = (int(os.environ[name]) for name in ENVIRONMENT)
    if size == 1:
        return Ranks(pick_device(local_rank))
    raise_descriptor_limit()
    host = os.environ.get("SEGFLEET_MASTER_HOST", "127.0.0.1")
    try:
        store = join(rendezvous, rank, size, host, TIMEOUT)
        return ProcessRanks(rank, size, local_rank, store)
    except (InputError, NotOurs, JoinFailed):
        raise
    except (RuntimeError, OSError) as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "of the host's name")
        raise JoinFailed(
            f"rank {rank} on {socket.gethostname()} could not join the other {size - 1}: "
            f"{' '.join(str(error).split())[:400]}. The nodes must reach each other on every port; "
            f"the interface was {interface} (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose "
            "another)"
        ) from error


def raise_descriptor_limit() -> None:
    """Every rank holds a connection to every other one; many systems start with 1024."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows; a limit that may not move
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _tensor(text: bytes, length: int) -> Tensor:
    return torch.frombuffer(bytearray(text.ljust(max(1, length))), dtype=torch.uint8)[:length]


def error_as_json(error: BaseException | None) -> dict[str, Any] | None:
    """An error as JSON, for the other ranks."""
    if error is None:
        return None
    explained = explain(error)
    words = explained[0] if explained else "".join(traceback.format_exception(error))
    kind = "FloatingPointError" if isinstance(error, FloatingPointError) else None
    return {
        "message": str(error) if kind else words,
        "code": explained and explained[1],
        "kind": kind,
    }


def error_from_json(document: dict[str, Any] | None) -> Exception | None:
    """What another rank failed with: the same to the user, and to the launcher."""
    if document is None:
        return None
    if document["kind"]:
        return FloatingPointError(document["message"])
    if document["code"] == Interrupted.exit_code:
        return Interrupted(document["message"])
    return (InputError if document["code"] == 2 else RuntimeError)(document["message"])


_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """Within it a loss sees this rank's samples alone, for what ranks do at their own pace."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over all ranks, with gradients: for what a loss takes over the whole batch. One
    collective each in forward and backward.

    Every rank then has the loss of the whole batch. The engines average gradients over the ranks,
    which is right for it.
    """
    together = not _apart and dist.is_initialized() and dist.get_world_size() > 1
    return _Sum.apply(value) if together else value


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
