"""The stage tree: every distinct prefix of the trials once. Pure functions of recipes and
manifests; nothing is read or written.

A node is a stage with everything before it. Two trials with equal first stages meet in the same
node, because its uid is the same hash that names its folder. Stages of a constant rate that differ
only in length form a trunk: the longer one continues where the shorter ended.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from segfleet.pipeline.identity import stage_facts, stage_uid
from segfleet.pipeline.recipe import Recipe, cut
from segfleet.pipeline.stage import Stage
from segfleet.pipeline.stage_data import stages_of
from segfleet.preprocess.stores.manifest import Manifest
from segfleet.sweeps.space.space import Trial

Manifests = Callable[[Recipe], Manifest]


@dataclass(kw_only=True, eq=False)
class StageNode:
    """One stage to be trained once, whoever needs it."""

    uid: str
    path: PurePosixPath  # below the folder of all runs
    parent: str | None  # the stage it inherits from
    index: int  # which stage of the recipe
    recipe: Recipe  # stages up to this one
    begin: int  # epochs of the stages before
    # equal for stages that differ in length alone and may share; None: shares with none
    family: str | None
    trunk: str | None = (
        None  # the next shorter stage of its family: it continues from that one's last checkpoint
    )
    trials: list[int] = field(default_factory=list)  # that pass through
    leaf_of: list[int] = field(default_factory=list)  # that end here

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[-1]

    @property
    def end(self) -> int:
        """Epochs along the path when this node is done."""
        return self.begin + self.stage.epochs

    @property
    def after(self) -> str | None:
        """The node whose checkpoint this one starts from."""
        return self.trunk or self.parent


class StageTree:
    """Nodes by uid, parents before children."""

    def __init__(self, trials: Iterable[Trial] = (), manifests: Manifests | None = None):
        self.nodes: dict[str, StageNode] = {}
        self.trials: dict[int, Trial] = {}
        self.leaves: dict[int, str] = {}  # trial number -> uid of its last stage
        self.manifests = manifests
        self.children: dict[str | None, list[StageNode]] = {}
        self.remaining: dict[str, int] = {}  # epochs of the longest way from a node to an end
        self.shared_epochs = 0  # if every stage is trained once
        self._families: dict[str, list[StageNode]] = {}  # by length
        self.add(trials)

    def add(self, trials: Iterable[Trial]) -> None:
        """More trials, in the middle of a sweep, too: what it costs depends on them alone."""
        for trial in trials:
            self._insert(trial)

    def _insert(self, trial: Trial) -> None:
        recipe = trial.recipe
        path, begin, uid = PurePosixPath(), 0, ""
        for index, parent, uid, identity in self._way(recipe):
            stage = recipe.stages[index]
            path /= uid
            if uid not in self.nodes:
                own = cut(recipe, index)
                node = StageNode(
                    uid=uid,
                    path=path,
                    parent=parent,
                    index=index,
                    recipe=recipe if own == recipe else own,  # of a leaf: not twice in memory
                    begin=begin,
                    family=family_of(parent, identity, stage),
                )
                node.trials.append(trial.number)
                self.nodes[uid] = node
                self._link(node)
            else:
                self.nodes[uid].trials.append(trial.number)
            begin += stage.epochs
        self.nodes[uid].leaf_of.append(trial.number)
        self.trials[trial.number], self.leaves[trial.number] = trial, uid

    def _way(self, recipe: Recipe) -> Iterator[tuple[int, str | None, str, dict]]:
        """Of every stage its number, its parent's uid, its own, and what decides its result."""
        parent = None
        for index, own, _ in stages_of(recipe, self.manifests):
            identity = stage_facts(own, self.manifests, index)
            uid = stage_uid(parent, identity)
            yield index, parent, uid, identity
            parent = uid

    def price(
        self, trials: Iterable[Trial], trained: Callable[[PurePosixPath], bool] = lambda path: False
    ) -> int:
        """Epochs that these trials would add to what is to be trained. `trained`: whether a stage
        that is not in the tree lies finished below the folder of all runs, from another sweep."""
        epochs, seen = 0, set()
        for trial in trials:
            path = PurePosixPath()
            for index, parent, uid, identity in self._way(trial.recipe):
                path /= uid
                if uid in self.nodes or uid in seen:
                    continue
                seen.add(uid)
                if trained(path):
                    continue
                stage = trial.recipe.stages[index]
                family = self._families.get(family_of(parent, identity, stage) or "", ())
                longest = max((node.stage.epochs for node in family), default=0)
                epochs += max(0, stage.epochs - longest)
        return epochs

    def _link(self, node: StageNode) -> None:
        """Give a new node its place: after the next shorter one of its family, before the next
        longer one."""
        self.shared_epochs += node.stage.epochs
        longer = None
        if node.family:
            members = self._families.setdefault(node.family, [])
            place = bisect.bisect([member.stage.epochs for member in members], node.stage.epochs)
            node.trunk = members[place - 1].uid if place else None
            longer = members[place] if place < len(members) else None
            members.insert(place, node)
            whole = self.nodes[node.trunk].stage.epochs if node.trunk else 0
            self.shared_epochs -= node.stage.epochs if longer else whole
        self.children.setdefault(node.after, []).append(node)
        self.remaining[node.uid] = self.epochs(node)
        if longer:
            self.children[longer.after].remove(longer)
            longer.trunk = node.uid
            self.children.setdefault(node.uid, []).append(longer)
            self.remaining[longer.uid] -= self.epochs(node)
            self.remaining[node.uid] += self.remaining[longer.uid]
        self._lengthen(node)

    def _lengthen(self, node: StageNode) -> None:
        """The ways through everything before a node are at least as long as its own."""
        above = self.before(node)
        while (
            above
            and (length := self.epochs(above) + self.remaining[node.uid])
            > self.remaining[above.uid]
        ):
            self.remaining[above.uid] = length
            node, above = above, self.before(above)

    def walk(self) -> Iterable[StageNode]:
        """Every node after the one it starts from, depth first."""
        waiting = list(reversed(self.children.get(None, ())))
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(self.children.get(node.uid, ()))

    def epochs(self, node: StageNode) -> int:
        """Epochs that this node itself trains: a trunk's are not trained again."""
        return node.stage.epochs - (self.nodes[node.trunk].stage.epochs if node.trunk else 0)

    def before(self, node: StageNode) -> StageNode | None:
        return self.nodes[node.after] if node.after else None

    @property
    def naive_epochs(self) -> int:
        """Epochs if every trial trained all its stages."""
        return sum(
            sum(stage.epochs for stage in trial.recipe.stages) for trial in self.trials.values()
        )


def family_of(parent: str | None, identity: dict, stage: Stage) -> str | None:
    """What stages share that differ in length alone, if the rate of a step does not depend on that
    length."""
    endless = stage.schedule == "constant" or (stage.schedule == "cosine" and stage.period)
    if not endless or stage.patience:
        return None
    return stage_uid(
        parent,
        {
            **identity,
            "stage": {key: value for key, value in identity["stage"].items() if key != "epochs"},
        },
    )
