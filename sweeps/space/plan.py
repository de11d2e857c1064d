"""From a search space to a checked plan: trials, tree, what it will cost, and what is odd about
it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_atomically
from segfleet.pipeline.recipe import Recipe, parse, with_absolute_store
from segfleet.pipeline.run import stage_steps
from segfleet.preprocess.stores.manifest import Manifest, load_manifest
from segfleet.sweeps.space.space import Point, Search, Trial, describe
from segfleet.sweeps.space.tree import StageNode, StageTree

SPACE, POINTS, POPULATION = "space.json", "points.jsonl", "population.json"


@dataclass
class Stores:
    """Manifests of the stores in use, each read once."""

    known: dict[str, Manifest] = field(default_factory=dict)

    def __call__(self, recipe: Recipe) -> Manifest:
        if recipe.data.store not in self.known:
            self.known[recipe.data.store] = load_manifest(Path(recipe.data.store))
        return self.known[recipe.data.store]


@dataclass(kw_only=True)
class Plan:
    """A sweep that could start now. `trials` and `tree` grow under Optuna."""

    search: Search
    runs: Path
    stores: Stores
    tree: StageTree
    warnings: list[str]
    suggested: int = 0  # points of Optuna read from disk

    @property
    def folder(self) -> Path:
        return self.runs / "sweeps" / self.search.space.name

    @property
    def trials(self) -> list[Trial]:
        return list(self.tree.trials.values())

    def grow(self, point: Point) -> list[Trial]:
        """Add a point's trials to the tree."""
        made = with_stores(self.search.trials(point, first=len(self.tree.trials)))
        self.tree.add(made)
        return made

    @property
    def complete(self) -> bool:
        """Whether no trial can be added any more."""
        if self.search.space.scheduler == "pbt":
            return bool(self.tree.trials)
        budget = self.search.space.budget
        enough = self.search.planned or self.suggested >= min(budget.trials, self.search.size)
        return enough or bool(budget.epochs and self.tree.shared_epochs >= budget.epochs)

    def catch_up(self) -> None:
        """Add the trials that came up while the sweep ran, from disk: Optuna's points, a finished
        population."""
        if self.search.space.search == "optuna":
            points = read_points(self.folder)
            for point in points[self.suggested :]:
                self.grow(point)
            self.suggested = len(points)
        if (
            self.search.space.scheduler == "pbt"
            and not self.tree.trials
            and (self.folder / POPULATION).exists()
        ):
            self.add_members(read_json(self.folder / POPULATION, list) or [])

    def add_members(self, members: list[list[dict[str, Any]]]) -> None:
        """Add the paths that the members of a population took: their stages."""
        first = self.search.trials({axis.label: axis.values[0] for axis in self.search.axes})
        recipe = with_stores(first)[0].recipe
        trials = []
        for number, stages in enumerate(members):
            walked = parse({**recipe.model_dump(mode="json"), "stages": stages})
            point = {"member": number} | {
                axis.label: walk_of(walked, axis.label) for axis in self.search.axes
            }
            trials.append(Trial(number=number, point=point, recipe=walked))
        self.tree.add(trials)

    def name(self, node: StageNode) -> str:
        """What the node's run is called in `segfleet status`."""
        number = (
            f"t{node.leaf_of[0]:03d}" if node.leaf_of else f"stage{node.index + 1}-{node.uid[:6]}"
        )
        return f"{self.search.space.name}-{number}"

    def order(
        self, node: StageNode, *, ranks: int = 1, threads: int = 1, on: str = "local", **more: Any
    ) -> dict[str, Any]:
        """What a trial needs to train `node`: plain JSON, see `trial.py`."""
        recipe = node.recipe.model_copy(update={"name": self.name(node)})
        trunk = self.tree.nodes[node.trunk] if node.trunk else None
        job = {
            "do": "train",
            "recipe": recipe.model_dump(mode="json"),
            "root": str(self.runs),
            "score": bool(node.leaf_of),
        }
        return {
            "job": job, "node": node.uid, "path": str(self.runs / node.path), "sweep": str(self.folder), "begin": node.begin,
            "steps": stage_steps(recipe, self.stores(recipe))[-1], "start": trunk.stage.epochs if trunk else 0,
            "trunk": str(self.runs / trunk.path) if trunk else None, "ranks": ranks, "threads": threads, "on": on, **more,
        }  # fmt: skip


def make_plan(search: Search, runs: Path, build: bool = True) -> Plan:
    """Everything that can be known before anything runs; `build`: also whether every network fits
    its data. Raises InputError."""
    runs, stores, tree_trials = Path(runs).resolve(), Stores(), []
    for point in search.points() if search.planned else ():
        tree_trials += with_stores(search.trials(point, first=len(tree_trials)))
    tree_trials, warnings = within_budget(tree_trials, stores, search)
    if build:
        warnings += check(tree_trials, stores)
    plan = Plan(
        search=search,
        runs=runs,
        stores=stores,
        tree=StageTree(tree_trials, stores),
        warnings=warnings,
    )
    if foreign(plan) is None:
        plan.catch_up()
    plan.warnings += oddities(plan)
    return plan


def walk_of(recipe: Recipe, label: str) -> str:
    """What an axis of a population became, generation by generation."""
    values = [getattr(stage, label.split(".")[2]) for stage in recipe.stages]
    return " > ".join(
        f"{value:.3g}" if isinstance(value, float) else str(value) for value in values
    )


def read_points(folder: Path) -> list[Point]:
    """Points that Optuna suggested so far; a last line cut off by a kill is left out."""
    try:
        lines = (folder / POINTS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def with_stores(trials: Iterable[Trial]) -> list[Trial]:
    """The same trials with absolute store folders, so that any working folder will do."""
    return [replace(trial, recipe=with_absolute_store(trial.recipe)) for trial in trials]


def within_budget(
    trials: list[Trial], stores: Stores, search: Search
) -> tuple[list[Trial], list[str]]:
    """The first points, with all their replicates, whose tree fits into budget.epochs."""
    most = search.space.budget.epochs
    if not most or not trials:
        return trials, []
    kept: list[Trial] = []
    tree = StageTree([], stores)
    for _, replicates in itertools.groupby(trials, key=lambda trial: trial.point):
        point = list(replicates)
        tree.add(point, link=False)
        if tree.shared_epochs > most:
            break
        kept += point
    if not kept:
        found = f"budget.epochs is {most}, less than one point: the first takes {tree.shared_epochs} epochs with its {len(point)} run(s)"
        raise InputError(f"sweep {search.space.name}: {found}")
    cut = f"budget.epochs {most} keeps the first {len(kept)} of {len(trials)} trials"
    return kept, [cut] if len(kept) < len(trials) else []


def check(trials: list[Trial], stores: Stores) -> list[str]:
    """Every network once against its data set; nothing is trained before all of them fit. What is
    legal and maybe not meant, a sentence each."""
    from segfleet.models.registry import ModelError
    from segfleet.pipeline.parts import check_recipe, doubts

    seen, doubtful = set(), {}
    for trial in trials:
        recipe = trial.recipe
        parts = [
            recipe.model.model_dump(),
            recipe.loss.model_dump(),
            recipe.data.patch,
            recipe.data.store,
            recipe.data.fold,
            recipe.data.made_for and recipe.data.made_for.model_dump(),
        ]
        key = json.dumps(
            [*parts, recipe.evaluation.mirror, [stage.freeze for stage in recipe.stages]]
        )
        if key not in seen:
            seen.add(key)
            try:
                check_recipe(recipe, stores(recipe))
            except (InputError, ModelError) as error:
                raise InputError(f"sweep at {describe(trial.point)}: {error}") from None
            doubtful |= dict.fromkeys(doubts(recipe, stores(recipe)))
    return list(doubtful)


def oddities(plan: Plan) -> list[str]:
    """What is legal and probably not meant."""
    tree, search, found = plan.tree, plan.search, []
    by_leaf: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        by_leaf.setdefault(tree.leaves[trial.number], []).append(trial)
    same = [members for members in by_leaf.values() if len(members) > 1]
    if same and search.planned:
        first, second = same[0][:2]
        labels = [label for label in first.point if first.point[label] != second.point[label]]
        found.append(
            f"{sum(map(len, same))} trials fall together in {len(same)}: {', '.join(labels)} does "
            "not change what is trained"
        )
    if (
        search.planned
        and search.space.search == "grid"
        and len(search.points()) == search.space.budget.trials
    ):
        found.append(
            f"budget.trials keeps the first {search.space.budget.trials} points of the grid"
        )
    if search.planned and len(plan.trials) > 1 and tree.shared_epochs == tree.naive_epochs:
        found.append(f"no two trials share a stage: {_why_not(plan)}")
    return found


def _why_not(plan: Plan) -> str:
    stages = plan.trials[0].recipe.stages
    early = next((axis for axis in plan.search.axes if axis.continuous and axis.stage == 0), None)
    if early:
        return f"{early.label} is drawn anew for every trial; set forks to draw later stages several times per draw of it"
    longer = any(key == "stages.0.epochs" for axis in plan.search.axes for key in axis.keys)
    if longer and stages[0].schedule != "constant":
        return f"stages.0.epochs varies, and lengths of a {stages[0].schedule} schedule have no common beginning (a constant one has)"
    if len(stages) == 1:
        return "there is one stage; what differs must come in a later one"
    return "every axis changes the first stage"


def claim(plan: Plan) -> None:
    """Make the sweep's folder, or check that it is this sweep's. Raises InputError."""
    if fault := foreign(plan):
        raise InputError(fault)
    plan.folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "identity": plan.search.identity,
        "space": plan.search.space.model_dump(mode="json"),
        "base": plan.search.base,
    }
    write_atomically(plan.folder / SPACE, json.dumps(facts, indent=1))


def foreign(plan: Plan) -> str | None:
    """Why the folder cannot be used, or None."""
    known = read_json(plan.folder / SPACE)
    if known is None or not isinstance(known.get("space"), dict):
        return None
    if known.get("identity") == plan.search.identity:
        return None
    differing = [
        key
        for key, value in plan.search.space.model_dump(mode="json").items()
        if known["space"].get(key) != value
    ] or ["base"]
    return (
        f"sweep: {plan.folder} belongs to another space of the same name (they differ in: "
        f"{', '.join(differing)}). "
        "Give this one another name; stages that both need are trained once all the same."
    )
