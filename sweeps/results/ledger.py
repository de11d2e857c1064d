"""Where every node of a sweep stands. Disk is the truth: this only remembers what can no longer
change, and what it handed out itself.

RUNS/<uid>/<uid>/...       the nodes, shared by all sweeps and by `segfleet train`
RUNS/sweeps/<name>/        space.json, points.jsonl, stop, the outcome, and of nodes that did not end
                           failed/<uid>.json, pruned/<uid>.json, paused/<uid>.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segfleet.core.files import read_json, write_atomically
from segfleet.core.lock import is_locked
from segfleet.pipeline.run import DONE, LOCK
from segfleet.pipeline.scoring import scored
from segfleet.sweeps.space.tree import StageNode, StageTree

EVALUATION, STOP = scored.EVALUATION, "stop"
MARKS = ("failed", "pruned", "paused")


class Ledger:
    """The state of every node of `tree`, read from the folder of all runs and the sweep's own."""

    def __init__(self, tree: StageTree, runs: Path, folder: Path):
        self.tree, self.runs, self.folder = tree, Path(runs), Path(folder)
        self.taken: set[str] = set()  # handed out by this process and not yet given back
        self._trained: set[str] = set()
        self._complete: set[str] = set()
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
        return node.uid in self._complete

    def _scored(self, node: StageNode) -> bool:
        return scored.is_scored(self.path(node), node.recipe, self.tree.manifests(node.recipe))

    def mark(self, node: StageNode, kind: str, **facts: Any) -> None:
        """Note that a node failed or was pruned; it survives this process."""
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.folder / kind / f"{node.uid}.json",
            json.dumps({"path": str(node.path), **facts}, indent=1),
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
        for node in self.tree.in_order(self.tree.nodes.values()):
            if self.state(node) == "ready":
                self.taken.add(node.uid)
                return node
        return None

    def open(self) -> bool:
        """Whether anything can still happen: a node runs, here or elsewhere, or is ready."""
        return any(self.state(node) in ("running", "ready") for node in self.tree.nodes.values())

    def epochs_done(self) -> int:
        return sum(
            self.tree.epochs(node) for node in self.tree.nodes.values() if self.complete(node)
        )
