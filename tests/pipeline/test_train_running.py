"""A step that is not finite leaves the running statistics of batch normalisation as they were, with
every engine on every rank."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

KINDS = ["ddp", *(["zero0", "zero1", "zero3"] if importlib.util.find_spec("deepspeed") else [])]


def poison(ranks, store: str, kinds: list[str]) -> dict[str, Any]:
    """Two steps, then one with an infinite voxel in the last micro-batch of the last rank. -> kind
    -> its norm and what it changed."""
    import engine_programs as programs

    from segfleet.pipeline import checkpoint

    def state(engine) -> checkpoint.Tensors:
        """With the statistics of this rank: the first one alone has ZeRO 3's tensors."""
        return checkpoint.copies(
            {**engine.tensors(), "running": dict(engine.model.named_buffers())}
        )

    told = {}
    for kind in kinds:
        recipe = programs.recipe_of(kind, model=programs.LITE, accumulate=2)
        engine = programs.make_engine(ranks, store, recipe)
        programs.run_steps(ranks, engine, recipe, range(2))
        before = state(engine)
        norm = programs.run_steps(ranks, engine, recipe, range(2, 3), poison=3)[0][1]
        moved = programs.difference(state(engine), before)
        programs.run_steps(ranks, engine, recipe, range(3, 4))
        told[kind] = {
            "norm": norm,
            "moved": moved,
            "next": programs.difference(state(engine), before),
        }
    return told


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_leaves_running_statistics(tiny_store, run_in_ranks, ranks):
    for told in run_in_ranks(
        "test_train_running.py:poison", ranks, store=str(tiny_store(dims=3, classes=1)), kinds=KINDS
    ):
        for kind, facts in told.items():
            assert facts["norm"] - facts["norm"] != 0, kind
            assert facts["moved"] == "" and facts["next"], f"{kind}: {facts}"


def test_a_log_says_steps_loss_speed_and_validation(monkeypatch):
    from segfleet.pipeline.events import Lines

    clock = [100.0]
    monkeypatch.setattr("segfleet.pipeline.events.time.monotonic", lambda: clock[0])
    written = []
    lines = Lines(written.append)
    lines({"event": "stage_start", "stage": 1, "step": 0, "steps": 600, "ranks": 4})
    facts = {"event": "step", "epoch": 2, "loss": 0.25, "lr": 1e-3, "samples_per_second": 81.5}
    for seconds, step in ((0, 10), (4, 20), (9.9, 30), (10, 40)):
        clock[0] = 100.0 + seconds
        lines({**facts, "step": step})
    lines({"event": "validation", "step": 40, "dice": 0.5})
    lines({"event": "validation", "step": 60, "dice": None})
    assert [line.partition(" ")[2] for line in written] == [
        "stage 2 begins, 4 rank(s)\n",
        "stage 2, epoch 3, step 10/600: loss 0.2500, lr 0.001, 81.5 samples/s\n",
        "stage 2, epoch 3, step 40/600: loss 0.2500, lr 0.001, 81.5 samples/s\n",
        "stage 2, step 40: validation, Dice 0.5000\n",
        "stage 2, step 60: validation, Dice not defined\n",
    ]
