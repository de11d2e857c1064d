"""What collectives take, and what a step takes whose events are known: no more than arithmetic.

Gloo's algorithms are a ring for most collectives and a tree for broadcasts; NCCL chooses between a
ring and a tree. Times follow from the number of messages one after the other, their bytes, and what
a link carries (Thakur, Rabenseifner and Gropp 2005, Optimization of Collective Communication
Operations in MPICH).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STEP, START, WAIT = "step", "start", "wait"


@dataclass(frozen=True, kw_only=True)
class Event:
    """A moment of a rank's step: a step begins, a collective is started, one is waited for."""

    at: float  # CPU seconds of this process, in which it computes and does not wait
    kind: str
    number: int = 0  # of the collective
    call: str = ""
    size: int = 0  # bytes: what is reduced; what all ranks together gather or scatter


@dataclass(frozen=True, kw_only=True)
class Link:
    """What every rank has to the others."""

    rate: float  # bytes/s
    delay: float  # seconds from sending to arrival


def gloo(event: Event, ranks: int, link: Link) -> float:
    """Seconds of a collective over gloo: rings for most, a tree for broadcasts. A message is sent
    when the receiver has said that it waits for it, so a hop takes the delay twice."""
    hop, others, size = 2 * link.delay, ranks - 1, event.size
    if event.call == "broadcast":
        return math.ceil(math.log2(ranks)) * (hop + size / link.rate)
    passes = 2 if event.call in ("all_reduce", "reduce_scatter") else 1
    # two segments of every rank's piece are on their way at once
    full = others * size / ranks / link.rate + hop
    alone = others * (hop + size / ranks / 2 / link.rate)
    return passes * max(full, alone)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes with GPUs, and what NCCL makes of them."""

    gpus_per_node: int = 8
    inside: float = 300e9  # bytes/s of a GPU to the others of its node
    between: float = 100e9  # bytes/s of a node to the others
    hop_inside: float = 2e-6  # seconds of a message within a node
    hop_between: float = 6e-6  # and from node to node

    def nccl(self, event: Event, ranks: int) -> float:
        """Seconds of a collective: the better of a ring and a tree for reductions, a ring for what
        is gathered or scattered."""
        nodes = math.ceil(ranks / self.gpus_per_node)
        rate = min(self.inside, self.between) if nodes > 1 else self.inside
        around = nodes * self.hop_between * (nodes > 1) + (ranks - nodes) * self.hop_inside
        ring = around + (ranks - 1) / ranks * event.size / rate
        deep = math.ceil(math.log2(nodes)) * self.hop_between
        tree = deep + (min(ranks, self.gpus_per_node) - 1) * self.hop_inside + event.size / rate
        if event.call in ("all_gather", "reduce_scatter"):
            return ring
        return 2 * min(ring, tree) if event.call == "all_reduce" else min(ring, tree)


def replay(
    events: list[Event], seconds: Callable[[Event], float], stretch: float = 1.0
) -> list[float]:
    """Seconds of every step. `stretch`: how much longer than recorded this rank computes."""
    now, line, before, ends, marks = 0.0, 0.0, events[0].at, {}, []
    for event in events:
        now += (event.at - before) * stretch
        before = event.at
        if event.kind == STEP:
            marks.append(now)
        elif event.kind == START:
            line = max(now, line) + seconds(event)
            ends[event.number] = line
        elif event.kind == WAIT:
            now = max(now, ends.get(event.number, now))
    return [after - before for before, after in zip(marks, marks[1:], strict=False)]
