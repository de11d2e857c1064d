"""Three ranks that are stopped by a signal and begin again as new processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

STAGES = [
    {"name": "base", "epochs": 1, "steps": 15, "lr": 1e-2},
    {"name": "tune", "epochs": 1, "steps": 10, "lr": 1e-3, "inherit": "weights+optimizer"},
]


def train(ranks, recipe: dict, root: str, terminate: int = 0) -> str:
    """What the ranks say when they stop in order; empty if they come to the end. Before the step
    `terminate` rank 0 gets a SIGTERM."""
    from segfleet.pipeline.engines import ddp
    from segfleet.pipeline.jobs import run_job
    from segfleet.pipeline.stop import Interrupted, StopRequest
    from segfleet.pipeline.training import agreement

    agreement.SECONDS = 0.0  # a question in every other step
    steps, plain = [], ddp.Engine.step

    def step(*arguments):
        steps.append(None)
        if len(steps) == terminate and ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    ddp.Engine.step = step
    from segfleet.pipeline.launch.job import Train

    job = Train(recipe=recipe, root=root, score=False)
    try:
        run_job(job, ranks, StopRequest())
    except Interrupted as stopped:
        return str(stopped)
    return ""


def final_weights(root: Path) -> dict[str, torch.Tensor]:
    """Of both stages, by file and name."""
    return {
        f"{path.relative_to(root)} {name}": tensor
        for path in root.rglob("weights.safetensors")
        for name, tensor in load_file(path).items()
        if path.parent.name in ("step-00000015", "step-00000010")
    }


def test_three_ranks_resume_to_the_bit(tiny_recipe, run_in_ranks, tmp_path):
    """From three on, the order of sums in a ring depends on how gradients are put into buckets."""
    model = {"name": "unet_lite_standard", "options": {"width": 16}}
    folder = tiny_recipe(STAGES, batch=6, model=model)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"

    def go(root: Path, **more) -> list[str]:
        return run_in_ranks("test_ranks_resume.py:train", 3, recipe=recipe, root=str(root), **more)

    assert go(straight) == [""] * 3
    first = go(stopped, terminate=7)
    assert all("of 15 of stage 1; all saved" in said for said in first), first
    assert not list(stopped.rglob("done.json"))
    assert go(stopped) == [""] * 3
    wanted, found = final_weights(straight), final_weights(stopped)
    assert wanted.keys() == found.keys() and len({key.split()[0] for key in wanted}) >= 2
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
