"""One function over many items, in processes, within a memory budget."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver, queues, resource_tracker
from typing import Any, TypeVar

from segfleet.core.litter import note_multiprocessing
from segfleet.core.machine import cpus, memory_budget
from segfleet.core.process import alive

Item = TypeVar("Item")
Result = TypeVar("Result")
WATCHED = (
    {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
    if hasattr(signal, "sigwaitinfo")
    else set()
)
SERVED = "segfleet.core.served"  # what a server of worker processes imports first
_function: Callable | None = None  # of a worker process
SMALL, MOST_AT_ONCE = 16 * 2**20, 64  # bytes and items that are handed over together
PR_SET_PDEATHSIG = 1  # of prctl: a signal when the process that started this one ends
MOST_IN_VAIN = 3  # pools that end before anything was handed to them
ENDING = 2.0  # seconds in which a process that removes its folder of sockets has ended
# what the start of a process raises where the server that it starts from was killed meanwhile; the
# next start begins another server
NO_SERVER = (EOFError, ConnectionError)
WORTH_A_PROCESS = 256 * 2**20  # bytes of work; a process takes about a second to start


def run(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    weights: Sequence[int],
    names: Sequence[str],
    workers: int | None = None,
    budget: int | None = None,
    died: Callable[[Item, str], Result] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (index, function(item)) as they finish.

    Args:
        function: importable, as are the items: they cross a process border, the function with all
        that is bound to it once per process, an item once. One worker and little work: everything
        runs in this process.
        weights: bytes each item needs. An item starts when the sum stays below the budget; one that
        is larger than all of it runs alone.
        names: what to call the items when a worker dies.
        died: what stands for the result of an item whose worker process dies, of what; without it
        that is an error. A library that crashes in one file costs this file.
        workers: processes at most; None: as many as there are cores and work for.
        budget: bytes; None: what the machine, the cgroup or SLURM leave.

    The first exception of `function` is raised, after the items in flight have ended.
    """
    work = sum(weights)
    workers = min(cpus(), 1 + work // WORTH_A_PROCESS) if workers is None else workers
    if min(workers, len(items)) <= 1 and work < WORTH_A_PROCESS:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    start_server("__main__", SERVED)
    waiting = list(range(len(items)))[::-1]
    in_vain = 0
    while waiting:
        suspects: list[int] = []
        before = len(waiting)
        pool = _Pool(function, max(1, min(workers, len(waiting))), budget or memory_budget())
        yield from pool.run(items, weights, waiting, suspects)
        in_vain = in_vain + 1 if len(waiting) == before else 0
        if in_vain == MOST_IN_VAIN:
            raise RuntimeError("worker processes are killed as they start (out of memory?)")
        for index in sorted(suspects):  # one of them took the pool along
            result, cause = _alone(function, items[index])
            if cause and died is None:
                raise RuntimeError(
                    f"a worker process died ({cause}) while it worked on one of: {names[index]}"
                )
            yield index, died(items[index], cause) if cause and died else result


@dataclass(frozen=True)
class _Pool:
    """Worker processes until all is done or one of them dies."""

    function: Callable
    workers: int
    budget: int

    def run(
        self, items: Sequence, weights: Sequence[int], waiting: list[int], suspects: list[int]
    ) -> Iterator[tuple[int, Any]]:
        """Takes from the end of `waiting`; `suspects` are what was being worked on when a worker
        died."""
        context = multiprocessing.get_context("forkserver")
        flying: dict[Future, list[int]] = {}
        weight = 0
        with ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_begin, initargs=(self.function,)
        ) as pool:
            try:
                while waiting or flying:
                    while (
                        waiting
                        and len(flying) < self.workers
                        and (not flying or weight + weights[waiting[-1]] <= self.budget)
                    ):
                        group = self._group(weights, waiting)
                        flying[_submit(pool, _call, [items[index] for index in group])] = group
                        del waiting[-len(group) :]
                        weight += sum(weights[index] for index in group)
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        group = flying[future]
                        results, error = future.result()
                        del flying[future]
                        weight -= sum(weights[index] for index in group)
                        yield from zip(group, results, strict=False)
                        if error is not None:
                            raise error
            except BrokenProcessPool:
                suspects += [index for group in flying.values() for index in group]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _group(self, weights: Sequence[int], waiting: list[int]) -> list[int]:
        """What one worker does next: one item, or several that are so small that handing them over
        one by one would take as long as the work. Never so many that another worker has none."""
        most = min(MOST_AT_ONCE, max(1, len(waiting) // (4 * self.workers)))
        group: list[int] = []
        weight = 0
        for index in reversed(waiting[-most:]):
            weight += weights[index]
            if group and weight > SMALL:
                break
            group.append(index)
        return group


def _submit(pool: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Future:
    """Raises BrokenProcessPool also where a process for it could not be started."""
    try:
        return pool.submit(function, *arguments)
    except NO_SERVER as error:
        _await_end_of_server()
        raise BrokenProcessPool(str(error)) from error


def _await_end_of_server() -> None:
    """Its files are closed a moment before it has ended, and until then no other one is started."""
    number = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    end = time.monotonic() + ENDING
    while number and alive(number) and time.monotonic() < end:
        time.sleep(0.01)


class Apart:
    """Calls functions in a process of its own, which a library that crashes takes along: the next
    call begins another. Started at the first call. One call at a time, from any thread."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What `function` returns. Raises what it raises, and Died if the process dies."""
        with self._lock:
            try:
                try:
                    future = self._submitted(function, *arguments)
                except BrokenProcessPool:  # it had died before, or could not be started
                    self._forget()
                    future = self._submitted(function, *arguments)
                return future.result()
            except BrokenProcessPool:
                self._forget()
                raise Died("the process that was to do this died") from None

    def _submitted(self, function: Callable, *arguments: Any) -> Future:
        if self._pool is None:
            start_server("__main__", SERVED)
            context = multiprocessing.get_context("forkserver")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_follow_parent)
        return _submit(self._pool, function, *arguments)

    def _forget(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


class Died(RuntimeError):
    """A process ended before it answered."""


def _alone(function: Callable, item: Any) -> tuple[Any, str]:
    """(result, "") of one item in a process of its own; (None, what ended it) if that dies. Raises
    what `function` raises."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(function, item, sender))
    try:
        process.start()
    except NO_SERVER:
        _await_end_of_server()
        process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        return None, _cause(process.exitcode)
    process.join()
    if error is not None:
        raise error
    return result, ""


def _send_result(function: Callable, item: Any, sender: Any) -> None:
    _follow_parent()
    try:
        answer: tuple[Any, Exception | None] = (function(item), None)
    except Exception as error:
        answer = (None, error)
    sender.send(answer)


def _cause(exitcode: int | None) -> str:
    try:
        name = signal.Signals(-(exitcode or 0)).name
    except ValueError:
        return f"exit code {exitcode}"
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name


def start_server(*modules: str) -> None:
    """Start the server that processes start from, which imports `modules`, unless it runs. With
    signals blocked, for it and all that it starts: SLURM warns every process of a job, a closed
    terminal hangs up on every one, and the parent decides."""
    note_multiprocessing()
    forkserver.set_forkserver_preload(list(modules))
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


def end_with_parent(last: Callable[[], None] = lambda: None) -> None:
    """From now on this process, started by multiprocessing, ends when its parent does, however that
    ends, after it has done `last`.

    A forkserver's child is no child of the process that asked for it, so the kernel tells it
    nothing; the parent holds the other end of a pipe. It ends with the forkserver, too, of whose
    death the kernel tells it: the parent takes it for dead then. To be called in the main thread.
    """
    parent: Any = multiprocessing.parent_process()
    server = os.getppid()

    def end(*_: object) -> None:
        try:
            last()
        finally:
            os._exit(1)

    def watch() -> None:
        parent.join()
        end()

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
    if sys.platform == "linux":
        signal.signal(signal.SIGRTMIN, end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGRTMIN})
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGRTMIN))
        if os.getppid() != server:  # it died before that
            end()


def guard_queues() -> None:
    """From now on this process, started by multiprocessing, ends when one of its queues cannot send
    something, which would be waited for in vain: Python prints a traceback and goes on. Nothing is
    said where its parent is ending, too."""
    parent: Any = multiprocessing.parent_process()

    def end(error: Exception, thing: Any) -> None:
        parent.join(ENDING)
        if parent.is_alive():
            sys.stderr.write(
                f"segfleet: process {os.getpid()} cannot hand over what it made and ends: "
                f"{type(error).__name__}: {error}\n"
            )
            sys.stderr.flush()
            os._exit(1)

    queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def _begin(function: Callable) -> None:
    global _function
    _function = function
    _follow_parent()


def _call(items: Sequence[Any]) -> tuple[list[Any], Exception | None]:
    """The results, up to the first item that fails, and why it did."""
    assert _function is not None
    results: list[Any] = []
    for item in items:
        try:
            results.append(_function(item))
        except Exception as error:
            error.add_note(traceback.format_exc())
            return results, error
    return results, None


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
