"""A search without Ray: a thread per node waits for its job. For back ends whose ranks run
elsewhere; the process that waits holds no model and needs little memory."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from segfleet.sweeps.order import Order
from segfleet.sweeps.search.tree_search import FINISHED, TreeSearch
from segfleet.sweeps.slurm_backend import Detached
from segfleet.sweeps.trial import perform

PACE = 0.5  # seconds between looks at what has happened


class Stopped(Exception):
    """The search ends this node."""


class Trial:
    """One node in the hands of a thread."""

    def __init__(self, name: str, detach: threading.Event):
        self.name, self.detach, self.stop = name, detach, threading.Event()
        self.validations: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.last: dict[str, Any] = {}

    def run(self, order: Order) -> dict[str, Any]:
        try:
            return perform(order, self.validations.put, self.watch)
        except Stopped:
            return self.last

    def watch(self) -> None:
        if self.detach.is_set():
            raise Detached
        if self.stop.is_set():
            raise Stopped


def drive(search: TreeSearch, slots: int, detach: threading.Event) -> None:
    """Until nothing is left. `detach`: set when this process is to exit while the jobs keep
    running; raises Detached then."""
    running: dict[Future, Trial] = {}
    count = 0
    with ThreadPoolExecutor(max_workers=slots) as pool:
        try:
            while True:
                order: Any = None
                while len(running) < slots and not detach.is_set():
                    trial = Trial(f"n{count}", detach)
                    order = search.next(trial.name)
                    if order is None or order == FINISHED:
                        break
                    count += 1
                    running[pool.submit(trial.run, order)] = trial
                if not running:
                    if detach.is_set():
                        raise Detached
                    if order == FINISHED:
                        return
                    detach.wait(PACE)  # for stages that other processes train
                    continue
                ended, _ = wait(running, timeout=PACE, return_when=FIRST_COMPLETED)
                for future, trial in list(running.items()):
                    while not trial.validations.empty():
                        trial.last = trial.validations.get()
                        if search.validated(trial.name, trial.last["epochs"], trial.last["dice"]):
                            trial.stop.set()
                    if future in ended:
                        del running[future]
                        if not isinstance(future.exception(), Detached):
                            search.ended(trial.name, future.result())
        except BaseException:
            detach.set()  # the threads, or the pool would wait for their jobs
            raise
