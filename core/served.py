"""Imported first by the server that worker processes start from (multiprocessing's forkserver).

A process that is killed while it asks for a worker, or while it fetches what one has made, leaves a
worker alone, of which Python prints a traceback. Nobody waits for it, so nothing is printed.
"""

from __future__ import annotations

import sys
from pickle import UnpicklingError
from traceback import walk_tb
from types import TracebackType

# what reads a worker's orders, what hands over the numbers of its files, and the server itself
ALONE = {
    "multiprocessing.spawn",
    "multiprocessing.resource_sharer",
    "multiprocessing.forkserver",
}


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for a worker whose process is gone."""
    places = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(trace)]
    alone = not ALONE.isdisjoint(places) and places[-1].startswith("multiprocessing.")
    # OSError: of a pipe that is closed, of a semaphore that is removed
    if not (alone and issubclass(kind, (EOFError, UnpicklingError, OSError))):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report
