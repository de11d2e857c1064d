"""`--max-time` ends a run at its time, and not before."""

from __future__ import annotations

import pytest
import torch

from segfleet.pipeline import stop as module
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.stop import Interrupted, StopRequest


@pytest.mark.parametrize(("seconds", "ends"), [(3600, False), (1e-3, True)])
def test_a_run_has_its_time(seconds, ends, tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    recipe = parse(
        {
            "name": "tiny", "data": {"store": str(tiny_store(dims=2)), "batch": 4,
                                     "patch": [16, 16]},
            "model": {"name": "unet_lite_standard", "options": {"width": 4}},
            "stages": [{"epochs": 1, "steps": 3, "lr": 1e-2}],
        }
    )  # fmt: skip
    job = Train(
        recipe=recipe.model_dump(mode="json"), root=tmp_path, score=False, max_seconds=seconds
    )
    if ends:
        with pytest.raises(Interrupted):
            run_job(job, Ranks(torch.device("cpu")), StopRequest())
    else:
        run_job(job, Ranks(torch.device("cpu")), StopRequest())
    assert bool(list(tmp_path.glob("*/done.json"))) is not ends
