"""A sweep over pre-trainings: the stages it trains against those of a plain search.

    python benchmarks/transfer_sweep.py [--work DIR]

2 pre-trainings (labels on, labels off) x 3 networks x 2 rates x 2 targets x 3 seeds are 72 trials
of two stages; tiny networks, tiny synthetic stores, a few steps a stage. First the ratio is
computed from the tree, before anything is trained. Then, all in this process:

- plain: every trial from its beginning, in a folder of its own; nothing is shared,
- shared: every node of the tree once, by the jobs that a sweep hands to its ranks,
- one seed: the same with one seed for all pre-trainings, three for what follows.

Stages and steps are counted from what lies in the folders of runs. Every stage of the plain search
must have the weights of the shared one, bit by bit. (That nothing changes when parts of such a
sweep are killed: tests/sweeps/test_transfer_sweep.py on Ray, tests/slurm/test_slurm_sweep.py on
SLURM.)

Result: benchmarks/results/transfer_sweep.json. In DIR a second run finds what the first has
trained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
from conftest import write_tiny_store  # noqa: E402
from sweep import weights  # noqa: E402

from segfleet.pipeline.jobs import run_job  # noqa: E402
from segfleet.pipeline.launch.job import Train  # noqa: E402
from segfleet.pipeline.ranks import Ranks  # noqa: E402
from segfleet.pipeline.stop import StopRequest  # noqa: E402
from segfleet.sweeps.space.load import parse_search  # noqa: E402
from segfleet.sweeps.space.plan import Plan, make_plan  # noqa: E402

RESULT = HERE / "results" / "transfer_sweep.json"
PRETRAIN, FINETUNE, STEPS = 4, 2, 3  # epochs, and steps of one
NETWORKS = ["unet_lite_standard", "unet_lite_depthwise", "unet_lite_ultralight"]


def stores(work: Path) -> list[str]:
    """A store to pre-train on, and two targets."""
    kinds = [(6, 2), (6, 1), (5, 2)]  # cases, classes
    folders = [work / f"store{number}" for number in range(len(kinds))]
    for folder, (cases, classes) in zip(folders, kinds, strict=True):
        if not folder.exists():
            write_tiny_store(folder, 2, "zarr", cases, classes, 24, 1)
    return [str(folder) for folder in folders]


def space(source: str, *targets: str) -> dict[str, Any]:
    return {
        "name": "transfer",
        "base": {
            "name": "transfer",
            "data": {"store": targets[0], "batch": 2, "patch": [32, 32], "workers": 0},
            "model": {"name": NETWORKS[0], "options": {"width": 4}},
            "stages": [{"epochs": 1, "lr": 1e-3}],
        },
        "axes": {"model.name": NETWORKS, "data.store": list(targets)},
        "stages": [
            {
                "name": "pretrain", "epochs": PRETRAIN, "steps": STEPS, "lr": 1e-2,
                "task": ["segment", "reconstruct"], "data": {"store": source, "split": "all"},
            },
            {
                "name": "finetune", "epochs": FINETUNE, "steps": STEPS, "lr": [1e-3, 1e-4],
                "inherit": {"head": "new"},
            },
        ],
        "seeds": [0, 1, 2],
    }  # fmt: skip


def computed(plan: Plan) -> dict[str, Any]:
    tree = plan.tree
    naive = sum(len(trial.recipe.stages) for trial in plan.trials)
    return {
        "trials": len(tree.trials),
        "plain_stages": naive,
        "shared_stages": len(tree.nodes),
        "ratio_of_stages": round(naive / len(tree.nodes), 3),
        "plain_steps": tree.naive_epochs * STEPS,
        "shared_steps": tree.shared_epochs * STEPS,
        "ratio_of_steps": round(tree.naive_epochs / tree.shared_epochs, 3),
    }


def measured(jobs: Iterable[Train], runs: Path) -> dict[str, Any]:
    """The jobs done, unscored; what lies in `runs` then, and the CPU seconds."""
    began, ranks = time.process_time(), Ranks(torch.device("cpu"))
    for job in jobs:
        run_job(job.model_copy(update={"score": False}), ranks, StopRequest())
    done = [json.loads(path.read_text()) for path in runs.rglob("done.json")]
    return {
        "stages": len(done),
        "steps": sum(one["steps"] for one in done),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def alone(plan: Plan, root: Path) -> Iterable[Train]:
    for trial in plan.trials:
        yield Train(recipe=trial.recipe.model_dump(mode="json"), root=root / str(trial.number))


def main(work: Path) -> None:
    torch.set_num_threads(1)
    document = space(*stores(work))
    plan = make_plan(parse_search(document), work / "shared", build=True)
    document["stages"][0]["seed"] = 0
    few = make_plan(parse_search(document), work / "few", build=True)
    result: dict[str, Any] = {
        "computed": {"a_seed_each": computed(plan), "one_seed": computed(few)}
    }
    print(json.dumps(result), flush=True)
    result["measured"] = rows = {}
    for name, jobs in (
        ("shared", (plan.order(node).job for node in plan.tree.walk())),
        ("one_seed", (few.order(node).job for node in few.tree.walk())),
        ("plain", alone(plan, work / "plain")),
    ):
        rows[name] = measured(jobs, work / {"one_seed": "few"}.get(name, name))
        print(name, rows[name], flush=True)
    ours = weights(work / "shared")
    pairs = [(uid, w) for root in (work / "plain").iterdir() for uid, w in weights(root).items()]
    result["stages_of_the_plain_search"] = len(pairs)
    result["bitwise_the_shared_stage"] = sum(ours[uid] == found for uid, found in pairs)
    result["ratio_of_stages"] = round(rows["plain"]["stages"] / rows["shared"]["stages"], 3)
    result["ratio_of_steps"] = round(rows["plain"]["steps"] / rows["shared"]["steps"], 3)
    result["load"] = os.getloadavg()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    assert all(ours[uid] == found for uid, found in pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="Where stores and runs are kept.")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        main(options.work)
    else:
        with tempfile.TemporaryDirectory(prefix="transfer-sweep-") as scratch:
            main(Path(scratch))
