"""The model behind benchmarks/scaling.py: its arithmetic, by hand."""

from __future__ import annotations

import json
import subprocess
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


RECORDED = """\
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from recorder import pretend

tape = pretend(4)
torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(300, 100), torch.nn.Linear(100, 10))
images = torch.randn(8, 300)
plain(images).square().sum().backward()
own = [weights.grad.clone() for weights in plain.parameters()]
plain.zero_grad(set_to_none=True)
network = DistributedDataParallel(plain)
begun = len(tape.events)
network(images).square().sum().backward()
tape.backward_ended()
shared = [weights.grad for weights in plain.parameters()]
step = tape.events[begun:]
begun = len(tape.events)
numbers = torch.arange(8.0)
gathered, part, asked = torch.zeros(4, 8), torch.zeros(2), torch.tensor([3.0])
dist.all_gather(list(gathered.unbind()), numbers)
dist.reduce_scatter_tensor(part, numbers)
dist.broadcast(asked, 0)
dist.all_reduce(numbers, async_op=True)  # nobody waits
print(json.dumps({
    "same": all(torch.allclose(a, b) for a, b in zip(own, shared)),
    "bytes": sum(weights.numel() * 4 for weights in plain.parameters()),
    "step": [vars(event) for event in step],
    "calls": [vars(event) for event in tape.events[begun:]],
    "gathered": gathered.tolist(), "part": part.tolist(), "sum": numbers.tolist(),
}), flush=True)
os._exit(0)  # a recorded process group may hang a process at its end
"""


def test_what_ranks_send_is_recorded_and_answered_as_by_ranks_that_hold_the_same():
    """Rank 0 of 4: DistributedDataParallel's own calls, their bytes, and when it waits for them."""
    benchmarks = str(Path(__file__).resolve().parents[2] / "benchmarks")
    done = subprocess.run(
        [sys.executable, "-c", RECORDED, benchmarks], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["same"], "the mean over four ranks that hold the same is what one rank has"
    assert told["gathered"] == [list(range(8))] * 4
    assert told["part"] == [0.0, 4.0] and told["sum"] == [4.0 * number for number in range(8)]
    sent = [event for event in told["step"] if event["kind"] == START]
    assert {event["call"] for event in sent} == {"all_reduce"}
    assert sum(event["size"] for event in sent) == told["bytes"]
    for event in sent:
        [wait] = [e for e in told["step"] if (e["kind"], e["number"]) == (WAIT, event["number"])]
        assert wait["at"] >= event["at"]
    calls = [event for event in told["calls"] if event["kind"] == START]
    assert [(event["call"], event["size"]) for event in calls] == [
        ("all_gather", 4 * 32), ("reduce_scatter", 32), ("broadcast", 4), ("all_reduce", 32),
    ]  # fmt: skip
    waited = {event["number"] for event in told["calls"] if event["kind"] == WAIT}
    assert waited == {event["number"] for event in calls[:3]}
