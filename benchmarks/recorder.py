"""What a training step asks of the network: every collective with its bytes, and when the step
starts it and waits for it, of a real training that runs as rank 0 of any number of ranks.

The other ranks are pretended: this process group answers at once as if every rank had sent the
same. So the calls are those of the code as it is, of DistributedDataParallel and of DeepSpeed, for
512 ranks too, and the time between them is what this rank computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from network import START, WAIT, Event
from torch import Tensor


class Tape:
    """The events of this process, over all its groups of ranks."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.works: list[_Work] = []  # C++ holds no reference to what is Python
        self.promised: list[int] = []  # collectives that DistributedDataParallel waits for in C++
        self.aside = 0.0  # CPU seconds spent on answers, which no rank spends

    def note(self, kind: str, number: int = 0, call: str = "", size: int = 0) -> None:
        at = time.process_time() - self.aside
        self.events.append(Event(at=at, kind=kind, number=number, call=call, size=size))

    def backward_ended(self) -> None:
        """DistributedDataParallel has now waited for its buckets."""
        for number in self.promised:
            self.note(WAIT, number)
        self.promised.clear()


class Recorder(dist.ProcessGroup):
    """Rank 0 of `size` ranks that all hold what rank 0 holds."""

    def __init__(self, size: int, tape: Tape):
        super().__init__(0, size)
        self.ranks, self.tape = size, tape

    def _started(self, call: str, size: int, result: object, answer: Callable[[], object]):
        tape, number = self.tape, len(self.tape.works)
        if self.ranks > 1:  # else nothing is sent
            tape.note(START, number, call, size)
        begin = time.process_time()
        with torch.no_grad():
            answer()
        tape.works.append(_Work(tape, number, result))
        tape.aside += time.process_time() - begin
        return tape.works[-1]

    def getBackendName(self) -> str:
        return "recorder"

    def getRank(self) -> int:
        return 0

    def getSize(self) -> int:
        return self.ranks

    def broadcast(self, tensors, options):
        return self._started("broadcast", _bytes(tensors), tensors, lambda: None)

    def barrier(self, opts):
        return self._started("all_reduce", 4, [torch.zeros(1)], lambda: None)

    def allreduce(self, tensors, options):
        def answer() -> None:
            if options.reduceOp == dist.ReduceOp.SUM:
                for tensor in tensors:
                    tensor.mul_(self.ranks)

        return self._started("all_reduce", _bytes(tensors), tensors, answer)

    def allreduce_coalesced(self, tensors, options):
        return self.allreduce(tensors, options)

    def reduce(self, tensors, options):
        return self._started("reduce", _bytes(tensors), tensors, lambda: None)

    def allgather(self, outputs, inputs, options):
        def answer() -> None:
            for output in outputs[0]:
                output.copy_(inputs[0])

        return self._started("all_gather", self.ranks * _bytes(inputs), outputs, answer)

    def all_gather_single(self, output: Tensor, own: Tensor, options):
        def answer() -> None:
            inside = output.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            if not inside:  # in place, the others' pieces stay what they were
                output.view(self.ranks, -1).copy_(own.view(1, -1))

        return self._started("all_gather", _bytes([output]), [output], answer)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options):
        def answer() -> None:
            output.copy_(whole.view(self.ranks, -1)[0].view_as(output).mul(self.ranks))

        return self._started("reduce_scatter", _bytes([whole]), [output], answer)

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # torch < 2.13

    def reduce_scatter(self, outputs, inputs, options):
        def answer() -> None:
            outputs[0].copy_(inputs[0][0] * self.ranks)

        return self._started("reduce_scatter", _bytes(inputs[0]), outputs, answer)


class _Work(dist._Work):
    def __init__(self, tape: Tape, number: int, result: object):
        super().__init__()
        self.tape, self.number = tape, number
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout: object = None) -> bool:
        self.tape.note(WAIT, self.number)
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future:
        self.tape.promised.append(self.number)
        return self.future


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pretend(size: int) -> Tape:
    """What the process group of this process, rank 0 of `size`, is asked from now on."""
    tape = Tape()

    def create(store, rank, count, timeout):
        return Recorder(count, tape)

    dist.Backend.register_backend("recorder", create, devices=["cpu"])
    dist.init_process_group("recorder", store=dist.HashStore(), rank=0, world_size=size)
    return tape
