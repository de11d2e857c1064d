"""Pre-trainings are stages: every fine-tuning that begins with one shares it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segfleet.core.errors import InputError
from segfleet.pipeline.events import read_events
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import resolve
from segfleet.pipeline.stop import StopRequest
from segfleet.sweeps import trial
from segfleet.sweeps.space.plan import make_plan
from segfleet.sweeps.space.space import parse_search

PRETRAIN, FINETUNE = 50, 10  # epochs


def stores_of(tiny_store):
    """A pre-training store and two targets."""
    return [str(tiny_store(dims=2, **more)) for more in ({}, {"classes": 1}, {"cases": 5})]


@pytest.fixture
def space(tiny_store):
    source, *targets = stores_of(tiny_store)
    return {
        "name": "transfer",
        "base": {
            "name": "tiny",
            "data": {"store": targets[0], "batch": 2, "patch": [32, 32], "workers": 0},
            "model": {"name": "unet_lite_standard", "options": {"width": 4}},
            "stages": [{"epochs": 1, "lr": 1e-3}],
            "save_every": 1,
        },
        "axes": {
            "model.name": ["unet_lite_standard", "unet_lite_depthwise", "unet_lite_ultralight"],
            "data.store": targets,
        },
        "stages": [
            {
                "name": "pretrain",
                "epochs": PRETRAIN,
                "steps": 1,
                "lr": 1e-2,
                "task": ["segment", "reconstruct"],
                "data": {"store": source, "split": "all"},
            },
            {
                "name": "finetune",
                "epochs": FINETUNE,
                "steps": 1,
                "lr": [1e-3, 1e-4],
                "inherit": {"head": "new"},
            },
        ],
        "seeds": [0, 1, 2],
    }


def plan_of(space, root, build=False):
    return make_plan(parse_search(space), root / "runs", build=build)


def test_two_pretrainings_three_networks_two_rates_two_targets_three_seeds(space, tmp_path):
    """By hand: 2 x 3 x 2 x 2 x 3 = 72 trials of two stages are 144 for a plain search. A
    pre-training depends on its task, its network and its seed: 18. With the 72 fine-tunings 90."""
    tree = plan_of(space, tmp_path).tree
    assert len(tree.trials) == 72 and len(tree.nodes) == 18 + 72
    assert tree.naive_epochs == 72 * (PRETRAIN + FINETUNE)
    assert tree.shared_epochs == 18 * PRETRAIN + 72 * FINETUNE
    first = [node for node in tree.nodes.values() if node.index == 0]
    assert {len(node.trials) for node in first} == {4}  # 2 rates x 2 targets
    # one seed for the pre-trainings, three for what follows: 6 instead of 18
    space["stages"][0]["seed"] = 0
    tree = plan_of(space, tmp_path).tree
    assert len(tree.nodes) == 6 + 72 and tree.shared_epochs == 6 * PRETRAIN + 72 * FINETUNE


def test_folds_of_the_target_share_a_pretraining_on_another_store(space, tmp_path):
    space |= {"seeds": [], "folds": [0], "axes": {}}
    space["base"]["data"]["split"] = "all"  # of the tiny store: one fold
    tree = plan_of(space, tmp_path).tree
    leaf = tree.nodes[tree.leaves[0]]
    assert resolve(leaf.recipe, 0).data.fold == 0 and leaf.recipe.data.fold == 0
    search = parse_search(space)
    trials = [search.trials(point)[0] for point in search.points()]
    assert len(trials) == 4
    made = parse_search({**space, "folds": [0, 3]}).trials(search.points()[0])
    assert [resolve(one.recipe).data.fold for one in made] == [0, 3]
    assert [resolve(one.recipe, 0).data.fold for one in made] == [0, 0]


def test_lengths_of_a_pretraining_of_constant_rate_are_one_trunk(space, tmp_path):
    space["stages"][0] |= {"epochs": [50, 100, 150], "task": "reconstruct"}
    space |= {"axes": {}, "seeds": []}
    tree = plan_of(space, tmp_path).tree
    assert tree.shared_epochs == 150 + 3 * 2 * FINETUNE


@pytest.mark.parametrize(
    ("change", "axis"),
    [
        ({"data": {"batch": [2, 4]}}, "stages.1.data.batch"),
        ({"data": {"patch": [[32, 32], [16, 16]]}}, "stages.1.data.patch"),
        ({"data": {"cases": [1, 2]}}, "stages.1.data.cases"),
        ({"inherit": {"weights": ["all", "encoder"]}}, None),
        ({"inherit": [{"head": "new"}, {"head": "map"}]}, "stages.1.inherit"),
        ({"freeze": [[], ["encoder"]]}, "stages.1.freeze"),
        ({"layer_decay": [1.0, 0.7]}, "stages.1.layer_decay"),
        ({"loss": {"name": ["dice_ce", "ss"]}}, "stages.1.loss.name"),
        ({"loss": {"options": {"x": 1}}}, None),
        ({"optimizer": {"weight_decay": {"loguniform": [1e-5, 1e-2]}}}, "stages.1.optimizer.weight_decay"),
    ],
)  # fmt: skip
def test_keys_of_a_stage_and_of_its_sections_are_axes(space, change, axis):
    space["stages"][1] = {"epochs": 1, "lr": 1e-3, **change}
    space |= {"axes": {}, "search": "random", "budget": {"trials": 1}}
    labels = [found.label for found in parse_search(space).axes]
    assert [label for label in labels if "stages.1" in label] == ([axis] if axis else [])


def test_an_axis_inside_a_stage_that_no_stage_reads_is_named(space):
    space["stages"][1]["data"] = {"bach": [1, 2]}
    with pytest.raises(InputError, match="axis stages.1.data.bach: 'bach' is an unknown key"):
        parse_search(space)


def final(folder: Path):
    done = json.loads((folder / "done.json").read_text())
    return load_file(folder / "checkpoints" / done["checkpoint"] / "weights.safetensors")


@pytest.mark.slow
def test_a_shared_path_is_bitwise_the_path_alone_even_after_kill_9(space, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    space["axes"], space["seeds"] = {"data.store": space["axes"]["data.store"]}, []
    space["stages"][0] |= {"epochs": 6, "task": "reconstruct"}
    space["stages"][1] |= {"epochs": 4, "lr": 1e-3, "freeze": ["encoder"], "unfreeze_at": 2}
    plan = plan_of(space, tmp_path, build=True)
    plan.folder.mkdir(parents=True)
    nodes = list(plan.tree.walk())
    assert len(nodes) == 3
    killed = []

    def kill(path):
        """Once the second stage has a checkpoint of its own."""
        while not killed:
            if any(path.glob("checkpoints/step-0000000[123]")):
                killed.append(int((path / "lock").read_text().split()[1]))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.002)

    threading.Thread(target=kill, args=(plan.runs / nodes[1].path,), daemon=True).start()
    for node in nodes:  # a stage whose rank is killed is tried once more
        assert trial.perform(plan.order(node), lambda report: None) == {"state": "done"}
    resumed = [
        event for event in read_events(plan.runs / nodes[1].path) if event["event"] == "resumed"
    ]
    assert killed and killed[0] != os.getpid() and len(resumed) == 1
    for number, leaf in plan.tree.leaves.items():
        recipe = plan.trials[number].recipe
        settings, root = recipe.model_dump(mode="json"), tmp_path / f"alone{number}"
        job = Train(recipe=settings, score=False, root=root)
        run_job(job, Ranks(torch.device("cpu")), StopRequest())
        path = plan.tree.nodes[leaf].path
        ours, alone = final(plan.runs / path), final(tmp_path / f"alone{number}" / path)
        assert ours.keys() == alone.keys() and all(torch.equal(ours[n], alone[n]) for n in ours)
