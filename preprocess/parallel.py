"""One function over many items, in processes, within a memory budget."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from segfleet.preprocess.memory import cpus, memory_budget

Item, Result = TypeVar("Item"), TypeVar("Result")
WORTH_A_PROCESS = 256 * 2**20  # bytes of work; a process takes about a second to start


def run(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    weights: Sequence[int],
    names: Sequence[str],
    workers: int | None = None,
    budget: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (index, function(item)) as they finish.

    Args:
        function: importable, as are the items: they cross a process border. One worker: everything runs in this process.
        weights: bytes each item needs. An item starts when the sum stays below the budget; one that is larger than all of it runs alone.
        names: what to call the items when a worker dies.
        workers: processes at most; None: as many as there are cores and work for.
        budget: bytes; None: what the machine, the cgroup or SLURM leave.

    The first exception of `function` is raised, after the items in flight have ended.
    """
    workers = min(cpus(), 1 + sum(weights) // WORTH_A_PROCESS) if workers is None else workers
    if min(workers, len(items)) <= 1:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    budget = memory_budget() if budget is None else budget
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_follow_parent) as pool:
        waiting, flying, weight = list(range(len(items)))[::-1], {}, 0
        try:
            while waiting or flying:
                while waiting and len(flying) < workers and (not flying or weight + weights[waiting[-1]] <= budget):
                    index = waiting.pop()
                    weight += weights[index]
                    flying[pool.submit(function, items[index])] = index
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    index = flying[future]
                    result = future.result()
                    del flying[future]
                    weight -= weights[index]
                    yield index, result
        except BrokenProcessPool:
            suspects = ", ".join(names[index] for index in sorted(flying.values()))
            raise RuntimeError(f"a worker process died (killed, or out of memory) while it worked on one of: {suspects}") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ctrl-C is the parent's affair; when the parent is killed, its workers end at once rather than write on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
