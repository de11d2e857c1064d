"""The stage tree: every distinct prefix of the trials once. Pure functions of recipes and
manifests; nothing is read or written.

A node is a stage with everything before it. Two trials with equal first stages meet in the same
node, because its uid is the same hash that names its folder. Stages of a constant rate that differ
only in length form a trunk: the longer one goes on where the shorter ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from segfleet.pipeline.recipe import Recipe, Stage
from segfleet.pipeline.run import stage_facts, stage_uid
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
        None  # the next shorter stage of its family: it goes on from that one's last checkpoint
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
        # family, or a node that has none -> epochs of its longest stage
        self._lengths: dict[str, int] = {}
        self.add(trials)

    def add(self, trials: Iterable[Trial], link: bool = True) -> None:
        """More trials, in the middle of a sweep. Without links only `shared_epochs` is right, but a
        point costs the same in any tree."""
        for trial in trials:
            self._insert(trial)
        if link:
            self._link()

    def _insert(self, trial: Trial) -> None:
        recipe, manifest = trial.recipe, self.manifests(trial.recipe)
        uid, path, begin = None, PurePosixPath(), 0
        for index, stage in enumerate(recipe.stages):
            facts = stage_facts(recipe, manifest, index)
            parent, uid = uid, stage_uid(uid, facts)
            path /= uid
            if uid not in self.nodes:
                cut = recipe.model_copy(update={"stages": recipe.stages[: index + 1]})
                family = family_of(parent, facts, stage)
                self.nodes[uid] = StageNode(
                    uid=uid,
                    path=path,
                    parent=parent,
                    index=index,
                    recipe=cut,
                    begin=begin,
                    family=family,
                )
                alike = family or uid
                self._lengths[alike] = max(stage.epochs, self._lengths.get(alike, 0))
            self.nodes[uid].trials.append(trial.number)
            begin += stage.epochs
        self.nodes[uid].leaf_of.append(trial.number)
        self.trials[trial.number], self.leaves[trial.number] = trial, uid

    def _link(self) -> None:
        """Trunks, children and the longest path below every node."""
        families: dict[str, list[StageNode]] = {}
        for node in self.nodes.values():
            if node.family:
                families.setdefault(node.family, []).append(node)
        for members in families.values():
            members.sort(key=lambda node: node.stage.epochs)
            for shorter, longer in zip(members, members[1:], strict=False):
                longer.trunk = shorter.uid
        self.children: dict[str | None, list[StageNode]] = {}
        for node in self.nodes.values():
            self.children.setdefault(node.after, []).append(node)
        self.remaining: dict[str, int] = {}
        order = list(self.walk())
        for node in reversed(order):
            below = max(
                (self.remaining[child.uid] for child in self.children.get(node.uid, ())), default=0
            )
            self.remaining[node.uid] = self.epochs(node) + below

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
    def shared_epochs(self) -> int:
        return sum(self._lengths.values())

    @property
    def naive_epochs(self) -> int:
        """Epochs if every trial trained all its stages."""
        return sum(
            sum(stage.epochs for stage in trial.recipe.stages) for trial in self.trials.values()
        )

    def in_order(self, nodes: Iterable[StageNode]) -> list[StageNode]:
        """Longest remaining path first: it decides when the sweep ends. Ties in the order of the
        trials."""
        return sorted(
            nodes, key=lambda node: (-self.remaining[node.uid], node.trials[0], node.index)
        )


def family_of(parent: str | None, facts: dict, stage: Stage) -> str | None:
    """What stages share that differ in length alone, if the rate of a step does not depend on that
    length."""
    endless = stage.schedule == "constant" or (stage.schedule == "cosine" and stage.period)
    if not endless or stage.patience:
        return None
    return stage_uid(
        parent,
        {
            **facts,
            "stage": {key: value for key, value in facts["stage"].items() if key != "epochs"},
        },
    )
