"""The learning rate of a step, from the step number alone. It is written into the optimizer every
step, so no fork keeps an old one."""

from __future__ import annotations

import math

from segfleet.pipeline.stage import Stage


def learning_rate(stage: Stage, step: int, total: int) -> float:
    """Rate of step `step` (0 <= step < total) of a stage of `total` steps."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / (stage.warmup + 1)
    if stage.schedule == "constant":
        return stage.lr
    length = total - stage.warmup
    if stage.schedule == "cosine" and stage.period:
        length = total * stage.period / stage.epochs
    done = (step - stage.warmup) / max(1, length)
    share = (
        (1 - done) ** stage.power
        if stage.schedule == "poly"
        else 0.5 * (1 + math.cos(math.pi * done))
    )
    return stage.floor + (stage.lr - stage.floor) * share
