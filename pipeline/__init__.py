"""From a store and a recipe to a scored run, and from that to predictions.

from segfleet.pipeline import load_run
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from segfleet.core.faces import public

if TYPE_CHECKING:
    from segfleet.pipeline.data.loader import training_batches
    from segfleet.pipeline.losses.base import build_loss
    from segfleet.pipeline.recipe import load_recipe
    from segfleet.pipeline.scoring.metrics import score_case
    from segfleet.pipeline.task import make_task
    from segfleet.pipeline.trained.loading import load_run

__all__ = ["build_loss", "load_recipe", "load_run", "make_task", "score_case", "training_batches"]
__getattr__ = public(
    __name__,
    {
        "build_loss": "losses.base",
        "load_recipe": "recipe",
        "load_run": "trained.loading",
        "make_task": "task",
        "score_case": "scoring.metrics",
        "training_batches": "data.loader",
    },
)
