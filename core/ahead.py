"""The next item is prepared in the background while the present one is worked on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
PATIENCE = 5.0  # seconds that whoever stops waits for a preparation under way


def ahead(
    prepare: Callable[[Item], Value],
    items: Sequence[Item],
    *,
    background: bool,
    roomy: Callable[[Value], bool] = lambda value: True,
) -> Generator[tuple[Item, Callable[[], Value]], None, None]:
    """Every item, in order, and what gives its `prepare(item)`, once; that raises what `prepare`
    raised, so an error comes up with its own item.

    With `background` one thread prepares the next item from the moment on at which the present one
    is taken; two are there at once, never three. It waits where `roomy(present)` says that there is
    no memory for another. Without it everything runs in this thread, when it is asked for. Close it
    (`contextlib.closing`) to leave early: a preparation under way is waited for some seconds.
    """
    if not background:
        for item in items:
            yield item, functools.partial(prepare, item)
        return
    following: _Preparation | None = None

    def take(present: _Preparation, index: int) -> Any:
        nonlocal following
        value = present.take()
        if index + 1 < len(items) and roomy(value):
            following = _Preparation(prepare, items[index + 1])
        return value

    try:
        for index, item in enumerate(items):
            present, following = following or _Preparation(prepare, item), None
            yield item, functools.partial(take, present, index)
            del present
    finally:
        if following is not None:
            following.thread.join(PATIENCE)


class _Preparation:
    """One item in a thread, which ends with the process."""

    def __init__(self, prepare: Callable[[Any], Any], item: Any):
        self.value: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(
            target=self._run, args=(prepare, item), name="ahead", daemon=True
        )
        self.thread.start()

    def _run(self, prepare: Callable[[Any], Any], item: Any) -> None:
        try:
            self.value = prepare(item)
        except BaseException as error:
            self.error = error

    def take(self) -> Any:
        """The value, which is then no longer held here. Ctrl-C interrupts the wait."""
        self.thread.join()
        value, error, self.value, self.error = self.value, self.error, None, None
        if error is not None:
            raise error
        return value
