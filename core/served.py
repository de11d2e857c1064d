"""Imported first by the server that worker processes start from (multiprocessing's forkserver).

A process that is killed while it asks for a worker leaves one without orders, of which Python
prints a traceback. Nobody waits for that worker, so nothing is printed.
"""

from __future__ import annotations

import sys
from pickle import UnpicklingError
from types import TracebackType


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for a worker that never got its orders."""
    last = trace
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = last.tb_frame if last is not None else None
    reading = place is not None and place.f_globals.get("__name__") == "multiprocessing.spawn"
    if not (reading and issubclass(kind, (EOFError, UnpicklingError, ConnectionError))):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report
