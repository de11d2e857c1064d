"""One function over many items, in processes, within a memory budget."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

from segfleet.core.machine import cpus, memory_budget

Item, Result = TypeVar("Item"), TypeVar("Result")
WATCHED = (
    {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2} if hasattr(signal, "sigwaitinfo") else set()
)
_function: Callable | None = None  # of a worker process
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
        function: importable, as are the items: they cross a process border, the function with all
        that is bound to it once per process, an item once. One worker: everything runs in this
        process.
        weights: bytes each item needs. An item starts when the sum stays below the budget; one that
        is larger than all of it runs alone.
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
    _start_forkserver()
    with ProcessPoolExecutor(
        min(workers, len(items)),
        mp_context=context,
        initializer=_begin,
        initargs=(function,),
    ) as pool:
        waiting, flying, weight = list(range(len(items)))[::-1], {}, 0
        try:
            while waiting or flying:
                while (
                    waiting
                    and len(flying) < workers
                    and (not flying or weight + weights[waiting[-1]] <= budget)
                ):
                    index = waiting.pop()
                    weight += weights[index]
                    flying[pool.submit(_call, items[index])] = index
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    index = flying[future]
                    result = future.result()
                    del flying[future]
                    weight -= weights[index]
                    yield index, result
        except BrokenProcessPool:
            suspects = ", ".join(names[index] for index in sorted(flying.values()))
            raise RuntimeError(
                "a worker process died (killed, or out of memory) while it worked on one of: "
                f"{suspects}"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_forkserver() -> None:
    """With signals blocked, for it and all that it starts: SLURM sends warnings to every process of
    a job, and the parent decides."""
    if not WATCHED:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        resource_tracker.ensure_running()
        # the tracker lets SIGTERM through when it has started
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """From now on this process, started by multiprocessing, ends when its parent does, however that
    ends.

    A forkserver's child is no child of the process that asked for it, so the kernel tells it
    nothing; the parent holds the other end of a pipe.
    """
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _begin(function: Callable) -> None:
    global _function
    _function = function
    _follow_parent()


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)


def _follow_parent() -> None:
    """Ctrl-C and other signals are the parent's affair; when it is killed, its workers end at once
    rather than write on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    parent: Any = multiprocessing.parent_process()

    def obey() -> None:  # the pool ends its workers by SIGTERM when one of them has died
        while signal.sigwaitinfo(WATCHED).si_pid != parent.pid:
            pass
        os._exit(1)

    if WATCHED:
        threading.Thread(target=obey, daemon=True).start()
