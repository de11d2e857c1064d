"""Where every node of a sweep stands. Disk is the truth: this only remembers what can no longer
change, and what it handed out itself. Every node is looked at once at the start, later those alone
that something happened to.

RUNS/<uid>/<uid>/...       the nodes, shared by all sweeps and by `segfleet train`
RUNS/sweeps/<name>/        space.json, points.jsonl, stop, the outcome, and of nodes that did not
                           end failed/<uid>.json, pruned/<uid>.json, paused/<uid>.json
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

from segfleet.core.files import read_json, write_atomically
from segfleet.core.lock import is_locked
from segfleet.pipeline.run import DONE, LOCK
from segfleet.pipeline.scoring import scored
from segfleet.sweeps.space.tree import StageNode, StageTree

EVALUATION, STOP = scored.EVALUATION, "stop"
MARKS = ("failed", "pruned", "paused")
LOOK = 5.0  # seconds between looks at what other processes train


class Ledger:
    """The state of every node of `tree`, read from the folder of all runs and the sweep's own."""

    def __init__(self, tree: StageTree, runs: Path, folder: Path):
        self.tree, self.runs, self.folder = tree, Path(runs), Path(folder)
        self.taken: set[str] = set()  # handed out by this process and not yet given back
        self._trained: set[str] = set()
        self._complete: set[str] = set()
        self._epochs = 0  # of the complete ones
        self._seen = 0  # nodes of the tree that were looked at
        self._ready: list[tuple[int, int, int, str]] = []  # a heap: longest way to go first
        self._elsewhere: set[str] = set()  # at work in another process
        self._looked = -math.inf
        self._marks = {
            kind: {path.stem for path in (self.folder / kind).glob("*.json")} for kind in MARKS
        }

    def path(self, node: StageNode) -> Path:
        return self.runs / node.path

    def trained(self, node: StageNode) -> bool:
        """Its last checkpoint is published: what comes after it may start."""
        if node.uid not in self._trained and (self.path(node) / DONE).exists():
            self._trained.add(node.uid)
        return node.uid in self._trained

    def complete(self, node: StageNode) -> bool:
        """Trained and, if a trial ends here, scored as its recipe asks for."""
        if (
            node.uid not in self._complete
            and self.trained(node)
            and (not node.leaf_of or self._scored(node))
        ):
            self._complete.add(node.uid)
            self._epochs += self.tree.epochs(node)
        return node.uid in self._complete

    def _scored(self, node: StageNode) -> bool:
        return scored.is_scored(self.path(node), node.recipe, self.tree.manifests(node.recipe))

    def mark(self, node: StageNode, kind: str, **fields: Any) -> None:
        """Note that a node failed or was pruned; it survives this process."""
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.folder / kind / f"{node.uid}.json",
            json.dumps({"path": str(node.path), **fields}, indent=1),
        )
        self._marks[kind].add(node.uid)

    def unmark(self, node: StageNode, kind: str) -> None:
        (self.folder / kind / f"{node.uid}.json").unlink(missing_ok=True)
        self._marks[kind].discard(node.uid)

    def marked(self, kind: str) -> set[str]:
        """Uids of nodes of this tree."""
        return self._marks[kind] & self.tree.nodes.keys()

    def note(self, node: StageNode, kind: str) -> dict[str, Any]:
        """What was noted of a failed or pruned node."""
        return read_json(self.folder / kind / f"{node.uid}.json") or {}

    def forget_failures(self) -> None:
        """A new start tries again what failed."""
        for uid in self._marks["failed"]:
            (self.folder / "failed" / f"{uid}.json").unlink(missing_ok=True)
        self._marks["failed"].clear()

    def state(self, node: StageNode) -> str:
        """done, failed, pruned, paused, lost (something before it failed, was pruned or is paused),
        running, ready or waiting."""
        if self.complete(node):
            return "done"
        for kind, uids in self._marks.items():
            if node.uid in uids:
                return kind
        before = self.tree.before(node)
        if before and not self.trained(before):
            return "lost" if self.state(before) in (*MARKS, "lost") else "waiting"
        return "running" if node.uid in self.taken or is_locked(self.path(node) / LOCK) else "ready"

    def states(self) -> dict[str, str]:
        return {uid: self.state(node) for uid, node in self.tree.nodes.items()}

    def next(self) -> StageNode | None:
        """The ready node with the longest way to go; it is taken."""
        self._look_at_new()
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            for uid in sorted(self._elsewhere):
                self.look(self.tree.nodes[uid])
        while self._ready:
            node = self.tree.nodes[heapq.heappop(self._ready)[-1]]
            if (state := self.state(node)) == "ready":
                self.taken.add(node.uid)
                return node
            if state == "running" and node.uid not in self.taken:
                self._elsewhere.add(node.uid)
            elif state == "done":
                self._look_below(node)
        return None

    def give_back(self, node: StageNode) -> None:
        """It is no longer at work here."""
        self.taken.discard(node.uid)
        self.look(node)

    def look(self, node: StageNode) -> None:
        """Something may have happened to a node: what may start now is ready."""
        state = self.state(node)
        self._elsewhere.discard(node.uid)
        if state == "ready":
            priority = -self.tree.remaining[node.uid]
            heapq.heappush(self._ready, (priority, node.trials[0], node.index, node.uid))
        elif state == "running" and node.uid not in self.taken:
            self._elsewhere.add(node.uid)
        if self.trained(node):
            self._look_below(node)

    def _look_below(self, node: StageNode) -> None:
        for child in self.tree.children.get(node.uid, ()):
            if child.uid not in self._complete:
                self.look(child)

    def _look_at_new(self) -> None:
        """At nodes that were added since the last time; the first time, at all."""
        if self._seen < len(self.tree.nodes):
            new = list(itertools.islice(self.tree.nodes.values(), self._seen, None))
            self._seen = len(self.tree.nodes)
            for node in new:
                before = self.tree.before(node)
                if before is None or self.trained(before):
                    self.look(node)

    def open(self) -> bool:
        """Whether anything can still happen: a node runs, here or elsewhere, or is ready."""
        return any(self.state(node) in ("running", "ready") for node in self.tree.nodes.values())

    def epochs_done(self) -> int:
        """Epochs of the nodes that are known to be complete."""
        self._look_at_new()
        return self._epochs
