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


sys.excepthook = _report
