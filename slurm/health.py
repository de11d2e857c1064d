"""Whether a node can do what it was given for, before a run spends hours on it; and the list of
those that could not."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from segfleet.core.errors import InputError
from segfleet.pipeline.stop import Interrupted

if TYPE_CHECKING:
    import torch

    from segfleet.pipeline.ranks import Ranks

REMEMBERED = 7 * 24 * 3600  # seconds a bad node is left out of new jobs
FREE = 0.5  # share of a granted GPU's memory that must be free
PATIENCE, LOOK = 60.0, 2.0  # s in which the last job may free it, between two looks


class BadNode(RuntimeError):
    """A node failed the health check. New jobs leave it out for a week."""


class Busy(Interrupted):
    """A granted GPU is still held by another job. This start ends; the job comes back."""


def check_node(ranks: Ranks, gpus: int, node: str) -> None:
    """A granted GPU is visible and nearly empty, multiplies rightly, and all ranks reach each
    other.

    Raises BadNode, Busy on every rank, or InputError if this Python cannot use a GPU on any node.
    """
    import torch

    device = ranks.device
    if gpus and device.type != "cuda" and os.environ.get("SEGFLEET_DEVICE", "cuda") == "cuda":
        cpu = "To run on CPUs all the same: SEGFLEET_DEVICE=cpu"
        if torch.version.cuda is None and torch.version.hip is None:
            where = f"torch {torch.__version__} of {sys.executable}"
            raise InputError(
                f"node {node}: {gpus} GPU(s) were granted, but {where} is built for CPUs; install "
                f"a CUDA build. {cpu}"
            )
        raise BadNode(
            f"node {node}: {gpus} GPU(s) were granted and torch sees none (a driver? {cpu})"
        )
    held = next(filter(None, ranks.gather(_held(device, node))), None)
    if held:  # all of them exit together, and no rank waits for a peer
        raise Busy(held)
    values = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0))
    exact = values[0].double() @ values[1].double()
    product = (values[0].to(device) @ values[1].to(device)).double().cpu()
    if not (product - exact).norm() < 1e-2 * exact.norm():
        raise BadNode(f"node {node}: {device} multiplies two matrices wrongly")
    if (count := int(ranks.sum(torch.ones(1, device=device)).item())) != ranks.size:
        raise BadNode(f"node {node}: the ranks add up to {count}, expected {ranks.size}")


def _held(device: torch.device, node: str) -> str | None:
    """What keeps this rank from starting: too little of its GPU becomes free within PATIENCE."""
    import torch

    end = time.monotonic() + PATIENCE
    while device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free >= FREE * total:
            return None
        if time.monotonic() > end:
            share = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB"
            return (
                f"node {node}: only {share} of {device} were free for {PATIENCE:.0f} s; another "
                "process holds the rest. This start ends, the job comes back"
            )
        time.sleep(LOOK)
    return None


def remember(root: Path, node: str, why: str) -> None:
    folder = root / ".bad-nodes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / node).write_text(why + "\n", encoding="utf-8")


def bad_nodes(root: Path) -> list[str]:
    """Nodes that failed the check within the last week. Remove a node's file in RUNS/.bad-nodes to
    use it again."""
    now = time.time()
    return sorted(
        path.name
        for path in (root / ".bad-nodes").glob("*")
        if now - path.stat().st_mtime < REMEMBERED
    )
