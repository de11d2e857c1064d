"""The store as this node's ranks read it: where it is, or from a copy on a disk of the node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.preprocess.stores.base import ShardStore, open_store
from segfleet.preprocess.stores.staged_copy import LocalCopy, Unwanted, local_copy


@contextmanager
def on_node(
    store: ShardStore, folder: str, ranks: Ranks, stop: StopRequest, report: Callable[[str], None]
) -> Iterator[ShardStore]:
    """`store` from its copy below `folder`, which the first rank of the node makes while the others
    wait; or `store` itself if there is no room. Same content, hence same results. Raises InputError
    for a folder that cannot be used, Interrupted when all agree to stop.
    """
    copy = local_copy(store.root, folder)
    maker = Maker(copy, report) if ranks.local_rank == 0 else None
    # agreed again and again: no collective waits as long as a copy may take
    while ranks.any(maker is not None and maker.busy()):
        if ranks.any(stop.asked()):
            if maker:
                maker.end()
            raise Interrupted(
                "stopped while the store was copied; the same command goes on with the copy"
            )
    if maker and maker.error:
        raise maker.error
    with copy.in_use() as root:
        local = open_store(root) if copy.whole() else store
        try:
            yield local
        finally:
            local.close()


class Maker:
    """Makes the copy in a thread."""

    def __init__(self, copy: LocalCopy, report: Callable[[str], None]):
        self.copy, self.report, self.error, self.ended = copy, report, None, threading.Event()
        self.thread = threading.Thread(target=self._make, daemon=True)
        self.thread.start()

    def busy(self) -> bool:
        self.thread.join(0.1)
        return self.thread.is_alive()

    def end(self) -> None:
        self.ended.set()
        self.thread.join()

    def _make(self) -> None:
        try:
            self.copy.make(self.report, self.ended.is_set)
        except Unwanted:
            pass
        except BaseException as error:
            self.error = error
