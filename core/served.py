"""Imported first by the server that worker processes start from (multiprocessing's forkserver).

A process that is killed while it asks for a worker leaves one without orders, of which Python
prints a traceback. Nobody waits for that worker, so nothing is printed.
"""

from __future__ import annotations

import sys
from pickle import UnpicklingError
from traceback import walk_tb
from types import TracebackType


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for a worker that never got its orders."""
    places = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(trace)]
    reading = "multiprocessing.spawn" in places and places[-1].startswith("multiprocessing.")
    # OSError: of a pipe that is closed, of a semaphore that is removed
    if not (reading and issubclass(kind, (EOFError, UnpicklingError, OSError))):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report
