"""What the ranks decide together while they train, without a step that waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from segfleet.pipeline.ranks import Ranks

SECONDS = 0.1  # between two questions
LONGEST = 1000  # steps between two questions, however short they are


class Agreement:
    """Answers that are the same on every rank at the same step: whether any rank asks for a thing.

    A question is sent at one step and answered at the next, so that the network works while the
    step is computed. The next one comes after a tenth of a second, counted in steps of the slowest
    rank: with 512 ranks, a collective or a look at a shared disk in every step would take longer
    than the step. A single rank answers at once, in every step.
    """

    def __init__(self, ranks: Ranks, *questions: Callable[[], bool]):
        """Every rank must make it with the same questions and call `answers` before every step."""
        self.ranks, self.questions = ranks, questions
        self.pending: Callable[[], Tensor] | None = None
        self.asked_at, self.steps = 0.0, 0  # of the last question; steps since then
        self.wait = 0  # steps until the next one

    def answers(self) -> list[bool]:
        """One per question: whether any rank asked for it, as far as it is known by now."""
        if self.ranks.size == 1:
            return [question() for question in self.questions]
        if self.pending:
            *flags, seconds = self.pending().tolist()
            self.pending, self.steps = None, self.steps + 1
            self.wait = min(LONGEST, int(SECONDS / max(seconds, 1e-9)))
            return [flag > 0 for flag in flags]
        if self.wait:
            self.wait, self.steps = self.wait - 1, self.steps + 1
        else:
            now = time.monotonic()
            # seconds; unknown before the first step
            step = (now - self.asked_at) / self.steps if self.steps else SECONDS
            flags = [float(question()) for question in self.questions]
            self.pending = self.ranks.start_max(torch.tensor([*flags, step], dtype=torch.float64))
            self.asked_at, self.steps = now, 0
        return [False] * len(self.questions)

    def close(self) -> None:
        """Wait for a question that is on its way. All ranks or none."""
        if self.pending:
            self.pending()
            self.pending = None
