"""What the tests of this room share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_in_ranks():
    """`run_in_ranks("file.py:function", ranks, **arguments)`: see rank_runner.py."""
    spec = importlib.util.spec_from_file_location(
        "rank_runner", Path(__file__).with_name("rank_runner.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runner = module.RankRunner()
    yield runner
    runner.close()


@pytest.fixture
def two_stages(tiny_store):
    """`two_stages(first, second, **more)`: the document of a tiny 2D recipe, the stages with these
    changes, the recipe with these further keys."""

    def made(first, second, **more):
        stages = [
            {"name": "first", "epochs": 1, "steps": 2, "lr": 1e-2, **first},
            {"name": "second", "epochs": 1, "steps": 2, "lr": 1e-3, **second},
        ]
        data = {"store": str(tiny_store(dims=2)), "batch": 2, "patch": [32, 32], "workers": 0}
        model = {"name": "unet_lite_standard", "options": {"width": 4}}
        return {"name": "tiny", "data": data, "model": model, "stages": stages, **more}

    return made


@pytest.fixture
def go():
    """`go(document, root, *changes, stop_after, warn)`: its stages trained by one rank, unscored;
    their folders. `stop_after`: so many questions later it is asked to stop."""
    import torch

    from segfleet.pipeline import run
    from segfleet.pipeline.jobs import Stores
    from segfleet.pipeline.ranks import Ranks
    from segfleet.pipeline.recipe import override, parse, with_absolute_store
    from segfleet.pipeline.stop import Interrupted
    from segfleet.pipeline.training.context import Context
    from segfleet.pipeline.training.train import train

    def trained(document, root, *changes, stop_after=None, warn=lambda text: None):
        recipe = with_absolute_store(parse(override(document, list(changes))))
        stores, asked = Stores(), iter(range(10**9))
        folders = run.stage_folders(root, recipe, stores.manifest)
        context = Context(
            recipe=recipe,
            stores=stores,
            folders=folders,
            ranks=Ranks(torch.device("cpu")),
            asked_to_stop=lambda: stop_after is not None and next(asked) >= stop_after,
            warn=warn,
            validate=lambda engine, own: {},
        )
        try:
            train(context)
        except Interrupted:
            assert stop_after is not None
        return folders

    return trained
