"""From a search space to a checked plan: trials, tree, what it will cost, and what is odd about
it."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import absolute, parse_json, read_file, read_json, write_atomically
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.recipe import Recipe, resolve
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.stage_data import stage_steps
from segfleet.preprocess.stores.manifest import Manifest, load_manifest
from segfleet.sweeps.order import Order
from segfleet.sweeps.space import population
from segfleet.sweeps.space.checks import check_measures, check_read, with_stores
from segfleet.sweeps.space.growth import changed, grows
from segfleet.sweeps.space.sharing import Sections
from segfleet.sweeps.space.space import Point, Search, SearchSpace, Trial, describe
from segfleet.sweeps.space.tree import StageNode, StageTree
from segfleet.sweeps.space.warm import warm_points

SPACE, POINTS = "space.json", "points.jsonl"


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
    sections: Sections = field(default_factory=Sections)
    suggested: int = 0  # points of Optuna read from disk
    misfits: list[tuple[Point, str]] = field(
        default_factory=list
    )  # points that make no recipe, why
    grown: bool = False  # whether a population has all its generations

    @property
    def folder(self) -> Path:
        return self.runs / "sweeps" / self.search.space.name

    @property
    def trials(self) -> list[Trial]:
        return list(self.tree.trials.values())

    def grow(self, point: Point) -> list[Trial]:
        """Add a point of Optuna's to the tree and to the sweep's folder. No trials: it does not fit
        together."""
        added, line = [], point
        try:
            added = self.trials_at(point)
            check(added, self.stores)
            self.tree.add(added)
        except InputError as error:
            added, line = [], {"point": point, "misfit": str(error)}
            self.misfits.append((point, str(error)))
        with open(self.folder / POINTS, "a", encoding="utf-8") as file:
            # a line of its own, whatever a killed process left of the one before
            file.write("\n" + json.dumps(line) + "\n")
        self.suggested += 1
        return added

    def trials_at(self, point: Point) -> list[Trial]:
        return with_stores(self.search.trials(point, first=len(self.tree.trials)), self.sections)

    @property
    def complete(self) -> bool:
        """Whether no trial can be added any more."""
        if self.search.space.scheduler == "pbt":
            return self.grown
        budget = self.search.space.budget
        enough = self.search.planned or self.points_left <= 0
        return enough or bool(budget.epochs and self.tree.shared_epochs >= budget.epochs)

    @property
    def points_left(self) -> float:
        """How many more points Optuna may be asked for. One that does not fit is replaced, as long
        as there are not more of them than points."""
        most, misfits = self.search.space.budget.trials, len(self.misfits)
        if misfits >= most:
            return 0
        fitting = len({json.dumps(trial.point, sort_keys=True) for trial in self.trials})
        return min(most, self.search.size - misfits) - fitting

    @property
    def ranked(self) -> list[Trial]:
        """The trials that are compared: all, but of a population only the paths that no other one
        continues from."""
        if self.search.space.scheduler != "pbt":
            return self.trials
        parents = {node.parent for node in self.tree.nodes.values()}
        return [t for t in self.trials if self.tree.leaves[t.number] not in parents]

    def catch_up(self) -> None:
        """Add the trials that came up while the sweep ran, from disk: Optuna's points, the
        generations of a population."""
        if self.search.space.search == "optuna":
            points = read_points(self.folder, {axis.label for axis in self.search.axes})
            for line in points[self.suggested :]:
                if line.keys() == {"point", "misfit"}:
                    self.misfits.append((line["point"], line["misfit"]))
                else:
                    self.tree.add(self.trials_at(line))
            self.suggested = len(points)
        if self.search.space.scheduler == "pbt":
            self.tree = StageTree([], self.stores)
            while self.next_generation():
                pass

    def next_generation(self) -> bool | None:
        """Add a generation of a population, as `population.grow` says."""
        added = population.grow(self.search, self.tree, self.score)
        self.grown = added is False
        return added

    def score(self, node: StageNode) -> float | None:
        """What a node that ended was scored, more is better; FAILED if it or one before it failed,
        None before."""
        path = self.runs / node.path
        if scored.is_scored(path, node.recipe, self.stores(node.recipe)):
            objective = self.search.objectives[0]
            value = objective.of(scored.evaluation_of(path))
            if value is None:
                return 0.0 if objective.name == "dice" else population.FAILED
            return objective.sign * value
        marks = (self.folder / "failed" / f"{uid}.json" for uid in node.path.parts)
        return population.FAILED if any(mark.exists() for mark in marks) else None

    @property
    def expected_epochs(self) -> int:
        """Epochs that the sweep will have trained, as far as they are known."""
        epochs = self.tree.shared_epochs
        if self.search.space.scheduler == "pbt" and not self.grown:
            pbt = self.search.space.pbt
            whole = pbt.population * pbt.interval * population.generations_of(self.search)
            return max(epochs, whole)
        return epochs

    def name(self, node: StageNode) -> str:
        """What the node's run is called in `segfleet status`."""
        number = (
            f"t{node.leaf_of[0]:03d}" if node.leaf_of else f"stage{node.index + 1}-{node.uid[:6]}"
        )
        return f"{self.search.space.name}-{number}"

    def order(
        self, node: StageNode, *, ranks: int = 1, threads: int = 1, on: str = "local", **fields: Any
    ) -> Order:
        """What a trial needs to train `node`; `fields`: further fields."""
        recipe = node.recipe.model_copy(update={"name": self.name(node)})
        trunk = self.tree.nodes[node.trunk] if node.trunk else None
        settings = recipe.model_dump(mode="json")
        return Order(
            job=Train(recipe=settings, root=self.runs, score=bool(node.leaf_of)),
            node=node.uid,
            path=self.runs / node.path,
            sweep=self.folder,
            begin=node.begin,
            steps=stage_steps(recipe, self.stores)[-1],
            start=trunk.stage.epochs if trunk else 0,
            trunk=self.runs / trunk.path if trunk else None,
            measure=self.search.objectives[0].validated or "dice",
            ranks=ranks,
            threads=threads,
            on=on,
            **fields,
        )


def make_plan(search: Search, runs: Path, build: bool = True) -> Plan:
    """Everything that can be known before anything runs; `build`: also whether every network fits
    its data. Raises InputError."""
    runs, stores, sections, tree_trials = absolute(runs), Stores(), Sections(), []
    for point in search.points() if search.planned else ():
        tree_trials += with_stores(search.trials(point, first=len(tree_trials)), sections)
    tree_trials, warnings = within_budget(tree_trials, stores, search)
    if build:
        check_measures(search, tree_trials, stores)
        check_read(search, stores)
        warnings += warm_points(search, runs)[1]
        warnings += check(tree_trials, stores)
    plan = Plan(
        search=search,
        runs=runs,
        stores=stores,
        tree=StageTree(tree_trials, stores),
        warnings=warnings,
        sections=sections,
    )
    if foreign(plan) is None:
        plan.catch_up()
        if build and search.space.scheduler == "pbt":
            plan.warnings += check(plan.trials, stores)
    plan.warnings += oddities(plan)
    return plan


def unplanned(search: Search, runs: Path) -> Plan:
    """A plan without points, of a space whose stores are not there yet."""
    stores = Stores()
    tree = StageTree([], stores)
    return Plan(search=search, runs=absolute(runs), stores=stores, tree=tree, warnings=[])


def read_points(folder: Path, axes: set[str]) -> list[dict[str, Any]]:
    """Points that Optuna suggested so far, or {"point", "misfit": why it makes no recipe}. A line
    cut off by a kill is left out, and named if it is not the last one."""
    try:
        text = read_file(folder / POINTS).decode(errors="replace")
    except FileNotFoundError:
        return []
    points = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if not line:
            continue
        try:
            point = parse_json(line)
        except ValueError:
            point = None
        if isinstance(point, dict) and point.keys() in (axes, {"point", "misfit"}):
            points.append(point)
        else:
            sys.stderr.write(
                f"segfleet: {folder / POINTS}, line {number} is damaged and is left out\n"
            )
    return points


def within_budget(
    trials: list[Trial], stores: Stores, search: Search
) -> tuple[list[Trial], list[str]]:
    """The first points, with all their replicates, whose tree fits into budget.epochs."""
    most = search.space.budget.epochs
    if not most or not trials:
        return trials, []
    within: list[Trial] = []
    tree = StageTree([], stores)
    for _, replicates in itertools.groupby(trials, key=lambda trial: trial.point):
        point = list(replicates)
        tree.add(point)
        if tree.shared_epochs > most:
            break
        within += point
    if not within:
        fault = (
            f"budget.epochs is {most}, less than one point: the first takes {tree.shared_epochs} "
            f"epochs with its {len(point)} run(s)"
        )
        raise InputError(f"sweep {search.space.name}: {fault}")
    cut = f"budget.epochs {most} keeps the first {len(within)} of {len(trials)} trials"
    return within, [cut] if len(within) < len(trials) else []


def check(trials: list[Trial], stores: Stores) -> list[str]:
    """Every network once against its data set; nothing is trained before all of them fit. What is
    legal and maybe not meant, a sentence each."""
    from segfleet.models.registry import ModelError
    from segfleet.pipeline.parts import check_recipe, doubts

    seen, doubtful = set(), {}
    for trial in trials:
        recipe = trial.recipe
        parts = [
            (own.task, own.model, own.loss, own.data.patch, own.data.batch, own.data.store,
             own.data.stores, own.data.split, own.data.fold, own.data.made_for, own.data.mask,
             own.engine.accumulate, own.evaluation.mirror, own.stages[index].freeze,
             own.stages[index].rates, own.stages[index].lora, own.stages[index].inherit)
            for index, own in enumerate(resolve(recipe, i) for i in range(len(recipe.stages)))
        ]  # fmt: skip
        key = repr(parts)
        if key not in seen:
            seen.add(key)
            try:
                check_recipe(recipe, stores)
            except (InputError, ModelError) as error:
                raise InputError(f"sweep at {describe(trial.point)}: {error}") from None
            doubtful |= dict.fromkeys(doubts(recipe, stores))
    return list(doubtful)


def oddities(plan: Plan) -> list[str]:
    """What is legal and probably not meant."""
    tree, search, warnings = plan.tree, plan.search, []
    by_leaf: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        by_leaf.setdefault(tree.leaves[trial.number], []).append(trial)
    same = [members for members in by_leaf.values() if len(members) > 1]
    if same and search.planned:
        first, second = same[0][:2]
        labels = [label for label in first.point if first.point[label] != second.point[label]]
        warnings.append(
            f"{sum(map(len, same))} trials fall together in {len(same)}: {', '.join(labels)} does "
            "not change what is trained"
        )
    if (
        search.planned
        and search.space.search == "grid"
        and len(search.points()) == search.space.budget.trials
    ):
        warnings.append(
            f"budget.trials keeps the first {search.space.budget.trials} points of the grid"
        )
    if search.planned and len(plan.trials) > 1 and tree.shared_epochs == tree.naive_epochs:
        warnings.append(f"no two trials share a stage: {_why_not(plan)}")
    first = search.objectives[0]
    if search.space.scheduler == "asha" and not first.validated:
        warnings.append(f"asha stops by the Dice of validations; {first.name} ranks what is left")
    return warnings


def _why_not(plan: Plan) -> str:
    stages = plan.trials[0].recipe.stages
    early = next((axis for axis in plan.search.axes if axis.continuous and axis.stage == 0), None)
    if early:
        return (
            f"{early.label} is drawn anew for every trial; set forks to draw later stages several "
            "times per draw of it"
        )
    longer = any(key == "stages.0.epochs" for axis in plan.search.axes for key in axis.keys)
    if longer and stages[0].schedule != "constant":
        return (
            f"stages.0.epochs varies, and lengths of a {stages[0].schedule} schedule have no "
            "common beginning (a constant one has)"
        )
    if len(stages) == 1:
        return "there is one stage; what differs must come in a later one"
    return "every axis changes the first stage"


def prepare_folder(plan: Plan, code: list[dict[str, Any]]) -> None:
    """Make the sweep's folder, or check that it is this sweep's. `code`: the versions of segfleet
    that trained its stages, oldest first. Raises InputError."""
    if fault := foreign(plan):
        raise InputError(fault)
    plan.folder.mkdir(parents=True, exist_ok=True)
    document = {
        "identity": plan.search.identity,
        "space": plan.search.space.model_dump(mode="json"),
        "base": plan.search.base,
        "code": code,
    }
    write_atomically(plan.folder / SPACE, json.dumps(document, indent=1))


def codes_of(plan: Plan) -> list[dict[str, Any]]:
    """The versions of segfleet that trained stages for this sweep so far: hash, commit."""
    return (read_json(plan.folder / SPACE) or {}).get("code") or []


def foreign(plan: Plan) -> str | None:
    """Why the folder cannot be used, or None. A space may grow: what it had before stays in it."""
    recorded = read_json(plan.folder / SPACE)
    if recorded is None or not isinstance(recorded.get("space"), dict):
        return None
    if recorded.get("identity") == plan.search.identity:
        return None
    space, was = plan.search.space.model_dump(mode="json"), recorded["space"]
    defaults = SearchSpace(name="x", base="x").model_dump(mode="json")  # for keys of later versions
    differing = []
    for key, value in space.items():
        old = was.get(key, defaults[key])
        if old != value and not grows(key, old, value, space):
            differing += changed(key, old, value)
    bases = [recorded.get("base"), plan.search.base]
    if space["stages"] is not None:  # the base holds their first values
        bases = [base and {**base, "stages": None} for base in bases]
    if bases[0] != bases[1] and not any(change.startswith("base") for change in differing):
        differing.append("base")
    if not differing:
        return None
    return (
        f"sweep: {plan.folder} belongs to another space of the same name (they differ in: "
        f"{'; '.join(differing)}). A space may grow by trials, epochs, hours, seeds, folds and, as "
        "a grid or with optuna, by values of its lists. "
        "Give this one another name: stages that both need are trained once all the same, and "
        f"with optuna `warm_start: [{plan.search.space.name}]` takes the scores along."
    )
