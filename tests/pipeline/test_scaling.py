"""The model behind benchmarks/scaling.py: its arithmetic, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from network import START, STEP, WAIT, Cluster, Event, Link, gloo, replay


def event(call: str, size: int) -> Event:
    return Event(at=0.0, kind=START, call=call, size=size)


@pytest.mark.parametrize(
    ("call", "size", "ranks", "seconds"),
    [
        # 2 ranks, twice: half of 4 MB at 20 MB/s, and a message that waits for its receiver
        ("all_reduce", 4_000_000, 2, 2 * (0.1 + 0.002)),
        ("all_reduce", 4_000_000, 4, 2 * (0.15 + 0.002)),
        # so small that nothing but the delay counts: three hops there, three hops back
        ("all_reduce", 0, 4, 2 * 3 * 0.002),
        ("all_gather", 4_000_000, 4, 0.15 + 0.002),
        ("broadcast", 0, 4, 2 * 0.002),
    ],
)
def test_gloo_takes_what_its_messages_take(call, size, ranks, seconds):
    link = Link(rate=20e6, delay=1e-3)
    assert gloo(event(call, size), ranks, link) == pytest.approx(seconds)


def test_nccl_gathers_around_and_reduces_in_a_tree():
    cluster = Cluster(hop_inside=1e-6, hop_between=10e-6, inside=100e9, between=100e9)
    # 64 nodes of 8: 64 hops between nodes and 448 within
    assert cluster.nccl(event("all_gather", 0), 512) == pytest.approx(64 * 10e-6 + 448e-6)
    # six levels of nodes and the seven others of a node, up and down
    assert cluster.nccl(event("all_reduce", 0), 512) == pytest.approx(2 * (6 * 10e-6 + 7e-6))
    # what is large goes around: each byte twice
    assert cluster.nccl(event("all_reduce", 10**10), 8) == pytest.approx(2 * 7 / 8 * 0.1, rel=1e-3)


def test_a_collective_costs_what_is_not_hidden_behind_the_computing():
    def step(*moments: tuple[float, str, int]) -> list[Event]:
        return [Event(at=at, kind=kind, number=number, size=1) for at, kind, number in moments]

    events = step(
        (0, STEP, 0), (1, START, 0), (1.5, START, 1), (3, WAIT, 0), (3, WAIT, 1), (4, STEP, 0)
    )
    assert replay(events, lambda event: 0.0) == [4.0]
    assert replay(events, lambda event: 0.75) == [4.0]  # both end before they are waited for
    assert replay(events, lambda event: 2.0) == [6.0]  # one after the other: from 1 to 5
    assert replay(events, lambda event: 2.0, 2.0) == [8.0]  # twice as long to compute: all hidden
