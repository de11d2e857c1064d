"""What points are ranked by: a metric of their scored cases, or what they cost.

dice              mean over the structures of each structure's mean over cases
nsd:liver         the mean over cases of one structure
gpu_hours         a cost, see COSTS
hd95 <= 10        as a constraint
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segfleet.core.errors import InputError, did_you_mean

COSTS = {
    "gpu_hours": "Hours of training along the point's path, times its ranks (CPU ranks count as "
    "well).",
    "epochs": "Epochs along the point's path.",
    "parameters": "Parameters of the network.",
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One measure of a point. `structure` None: the mean over the structures."""

    metric: str
    structure: str | None = None

    @property
    def name(self) -> str:
        return f"{self.metric}:{self.structure}" if self.structure else self.metric

    @property
    def label(self) -> str:
        return "Dice" if self.name == "dice" else self.name

    @property
    def cost(self) -> bool:
        return self.metric in COSTS

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if self.cost or (self.metric != "dice" and self.metric in _smaller()) else 1

    @property
    def validated(self) -> str | None:
        """Its key in the validations of a training, which measure Dice alone."""
        if self.metric != "dice":
            return None
        return f"dice_{self.structure}" if self.structure else "dice"

    def of(self, evaluation: Mapping[str, Any]) -> float | None:
        """Its value in an evaluation.json; None where it is not defined."""
        summary = evaluation["summary"]
        if self.metric == "parameters":
            return evaluation["parameters"]
        if self.name == "dice":
            return summary["mean_foreground_dice"]
        means = [scores[self.metric]["mean"] for scores in self._of(summary["structures"])]
        defined = [value for value in means if value is not None]
        return sum(defined) / len(defined) if defined else None

    def interval(self, evaluation: Mapping[str, Any]) -> list[float] | None:
        """Its 95 % interval over patients, where the evaluation has one."""
        summary = evaluation["summary"]
        if self.cost:
            return None
        if self.name == "dice":
            return summary["mean_foreground_dice_ci95"]
        scores = self._of(summary["structures"])
        return scores[0][self.metric]["ci95"] if len(scores) == 1 else None

    def of_case(self, case: Mapping[str, Any]) -> float | None:
        """Its value of one case of an evaluation.json; None for costs, too."""
        if self.cost:
            return None
        if self.name == "dice":
            return case["mean_dice"]
        values = [scores[self.metric] for scores in self._of(case["scores"])]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    def _of(self, structures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [structures[self.structure]] if self.structure else list(structures.values())


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A bound that a point must keep to be chosen."""

    objective: Objective
    relation: str  # <= or >=
    bound: float

    @property
    def name(self) -> str:
        return f"{self.objective.name} {self.relation} {self.bound:g}"

    def violation(self, value: float | None) -> float:
        """0 where it is kept, else by how much it is not, as a share of the bound."""
        if value is None:
            return 1.0
        over = value - self.bound if self.relation == "<=" else self.bound - value
        return max(0.0, over) / (abs(self.bound) or 1.0)


def parse_objective(text: str, where: str) -> Objective:
    """Raises InputError for an unknown measure."""
    metric, _, structure = text.strip().partition(":")
    if metric != "dice" and metric not in COSTS:
        legal = [*_measured(), *COSTS]
        if metric not in legal:
            raise InputError(
                f"{where}: nobody measures '{metric}'; expected one of: {', '.join(legal)}."
                f"{did_you_mean(metric, legal)}"
            )
    if structure and metric in COSTS:
        raise InputError(f"{where}: {metric} is a cost of the whole point; found '{text}'")
    return Objective(metric=metric, structure=structure.strip() or None)


def parse_constraint(text: str, where: str) -> Constraint:
    """Raises InputError."""
    parts = re.fullmatch(r"\s*(\S.*?)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        bound = float(parts[3]) if parts else None
    except ValueError:
        bound = None
    if bound is None or bound != bound:
        raise InputError(
            f"{where}: found '{text}', expected a measure, <= or >=, and a number: 'hd95 <= 10'"
        )
    return Constraint(objective=parse_objective(parts[1], where), relation=parts[2], bound=bound)


def check_structures(
    objectives: Sequence[Objective], structures: Collection[str], where: str
) -> None:
    """Raises InputError for a structure that the data set does not have."""
    for objective in objectives:
        if objective.structure and objective.structure not in structures:
            raise InputError(
                f"{where}: {objective.name}: the data set has no structure "
                f"'{objective.structure}'; expected one of: {', '.join(structures)}."
                f"{did_you_mean(objective.structure, structures)}"
            )


def fronts(points: Sequence[tuple[float, Sequence[float]]]) -> list[int]:
    """Of every point the number of its Pareto front, 1 is best: how many layers of others that are
    nowhere worse and somewhere better lie over it. `points`: (violation of the constraints, values
    of which more is better). A point that keeps all constraints comes before one that does not; of
    these the smaller violation is (Deb et al. 2002, constrained domination)."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], [-v for v in points[i][1]]))
    layers: list[list[int]] = []  # a point comes after all that dominate it in this order
    for i in order:
        place = bisect.bisect_left(
            layers,
            True,
            key=lambda layer, i=i: not any(_dominates(points[j], points[i]) for j in layer),
        )
        layers[place:place] = [[]] if place == len(layers) else []
        layers[place].append(i)
    return [
        number
        for _, number in sorted((i, k) for k, members in enumerate(layers, 1) for i in members)
    ]


def _dominates(point: tuple[float, Sequence[float]], other: tuple[float, Sequence[float]]) -> bool:
    if point[0] or other[0]:
        return point[0] < other[0]
    pairs = list(zip(point[1], other[1], strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _measured() -> list[str]:
    """Metrics of which more or less is better. They are imported where they are asked for: SciPy
    comes with them."""
    from segfleet.pipeline.scoring.compare import NEITHER
    from segfleet.pipeline.scoring.metrics import METRICS

    return [metric for metric in METRICS if metric not in NEITHER]


def _smaller() -> set[str]:
    from segfleet.pipeline.scoring.compare import SMALLER_IS_BETTER

    return SMALLER_IS_BETTER
