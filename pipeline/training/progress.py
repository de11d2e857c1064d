"""How far a stage has come, and which of its checkpoints are the best."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from segfleet.pipeline import checkpoint
from segfleet.pipeline.recipe import Recipe

# what the best checkpoint may have, each kept: 1 the highest, -1 the lowest
MEASURES = {"dice": 1, "iou_pooled": 1, "loss": -1}


@dataclass
class Progress:
    """What a checkpoint remembers of a stage besides tensors."""

    step: int = 0
    skipped: int = 0  # steps with a non-finite gradient; they changed nothing
    skipped_in_a_row: int = 0
    validated: int = 0  # step of the last validation
    # measure of a validation -> {"value", "step"} of the best one so far
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    stale: int = 0  # validations since the best one by `evaluation.select`

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> Progress:
        return cls(**saved.state["progress"])

    def state(self, recipe: Recipe, index: int) -> dict[str, Any]:
        fields = {
            "stage": index,
            "recipe": recipe.model_dump(mode="json"),
            "versions": checkpoint.versions(),
        }
        return {**fields, "progress": asdict(self)}

    def validation_due(self, recipe: Recipe, steps: int) -> bool:
        """Whether an epoch (of `steps`) that is to be validated ended with the last step and has
        not been validated yet, here or before a stop."""
        every = recipe.evaluation.every * steps if recipe.task == "segment" else 0
        return bool(every) and self.step > self.validated and self.step % every == 0

    def note(self, scores: dict[str, Any], select: str) -> None:
        """The step is validated; remember of which measures it is the best so far."""
        self.validated = self.step
        for measure, sign in MEASURES.items():
            # not defined or not finite: it says neither better nor worse
            value = scores.get(measure)
            if value is None or not math.isfinite(value):
                continue
            earlier = self.best.get(measure)
            better = earlier is None or sign * value > sign * earlier["value"]
            if better:
                self.best[measure] = {"value": value, "step": self.step}
            if measure == select:
                self.stale = 0 if better else self.stale + 1

    @property
    def best_steps(self) -> set[int]:
        return {best["step"] for best in self.best.values()}
