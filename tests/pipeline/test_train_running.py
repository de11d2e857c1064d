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

    told = {}
    for kind in kinds:
        recipe = programs.recipe_of(kind, model=programs.LITE, accumulate=2)
        engine = programs.make_engine(ranks, store, recipe)
        programs.run_steps(ranks, engine, recipe, range(2))
        before = checkpoint.copies(engine.tensors())
        norm = programs.run_steps(ranks, engine, recipe, range(2, 3), poison=3)[0][1]
        moved = programs.difference(engine.tensors(), before)
        programs.run_steps(ranks, engine, recipe, range(3, 4))
        told[kind] = {
            "norm": norm,
            "moved": moved,
            "next": programs.difference(engine.tensors(), before),
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
