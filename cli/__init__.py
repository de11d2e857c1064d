"""The front door: one small file per command. Nothing imports this room."""

from __future__ import annotations

import sys
from types import TracebackType


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for Ctrl-C while `main.py` and what it needs are imported."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("segfleet: interrupted\n")
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # a worker process has one that says less: see core/served
    sys.excepthook = _report
