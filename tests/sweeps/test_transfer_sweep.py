"""Pre-trainings are stages: every fine-tuning that begins with one shares it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from segfleet.core.errors import InputError
from segfleet.pipeline.events import read_events
from segfleet.pipeline.jobs import Stores, run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.parts import build_network, task_of
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import resolve
from segfleet.pipeline.stop import StopRequest
from segfleet.sweeps import trial
from segfleet.sweeps.space.load import parse_search
from segfleet.sweeps.space.plan import make_plan

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


def test_networks_that_share_an_encoder_share_its_pretraining(space, tmp_path, tiny_store):
    """The pre-training says its own network; what follows takes the encoder of it."""
    networks = [
        {"name": name, "options": {"widths": [16, 16, 16, 16, 16], "slices": "middle"}}
        for name in ("rec_unet", "rec_unet_em")
    ]
    space["stages"][0] |= {"task": "reconstruct", "model": networks[0]}
    space["stages"][1] |= {"inherit": {"weights": "encoder"}, "lr": 1e-3}
    space |= {"axes": {"model": networks}, "seeds": []}
    tree = plan_of(space, tmp_path).tree
    assert len(tree.trials) == 2 and [node.index for node in tree.walk()] == [0, 1, 1]
    first, *others = tree.walk()
    assert first.recipe.model.name == "rec_unet" and len(first.trials) == 2
    assert {node.recipe.model.name for node in others} == {"rec_unet", "rec_unet_em"}


def test_mixtures_of_stores_and_lengths_branch_off_one_trunk(space, tmp_path):
    """50, 100 and 150 epochs on one mixture at a constant rate are 150; at each, a cooldown on
    either of two mixtures branches off, and fine-tunings follow."""
    source, *targets = (space["stages"][0]["data"]["store"], *space["axes"]["data.store"])
    mixtures = [
        [{"store": source, "weight": weight}, {"store": targets[1], "weight": 1}]
        for weight in (1, 3)
    ]
    pretrain, finetune = space["stages"]
    pretrain |= {"epochs": [50, 100, 150], "task": "reconstruct"}
    pretrain["data"] = {"stores": {"grid": [mixtures[0]]}, "split": "all"}
    cooldown = {
        **pretrain, "name": "cooldown", "epochs": 10, "schedule": "cosine",
        "data": {"stores": {"grid": mixtures}, "split": "all"},
    }  # fmt: skip
    space |= {"axes": {}, "seeds": [], "stages": [pretrain, cooldown, finetune]}
    tree = plan_of(space, tmp_path).tree
    assert len(tree.trials) == 3 * 2 * 2 and len(tree.nodes) == 3 + 6 + 12
    assert tree.naive_epochs == 2 * 2 * (50 + 100 + 150) + 12 * (10 + FINETUNE)
    assert tree.shared_epochs == 150 + 6 * 10 + 12 * FINETUNE


def test_a_pretraining_of_no_epochs_is_the_way_without(space, tmp_path):
    """So one space asks whether pre-training helps: its first way begins with nothing."""
    space["stages"][0] |= {"epochs": [0, 50], "task": "reconstruct"}
    space["stages"][1] |= {"lr": 1e-3, "data": {"cases": [1, 2]}}
    space |= {"axes": {}, "seeds": []}
    plan = plan_of(space, tmp_path)
    assert len(plan.tree.trials) == 4 and plan.tree.shared_epochs == 50 + 4 * FINETUNE
    zero = next(node for node in plan.tree.walk() if node.recipe.stages[0].epochs == 0)
    job = plan.order(zero).job
    run_job(job, Ranks(torch.device("cpu")), StopRequest())
    found = load_file(next((plan.runs / zero.path).glob("checkpoints/*/weights.safetensors")))
    own = resolve(zero.recipe, 0)
    manifest = Stores().manifest(own)
    fresh = build_network(own, manifest, task_of(own, manifest)).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in found.items())


@pytest.mark.parametrize(
    ("change", "axis"),
    [
        ({"data": {"batch": [2, 4]}}, "stages.1.data.batch"),
        ({"data": {"patch": [[32, 32], [16, 16]]}}, "stages.1.data.patch"),
        ({"data": {"cases": [1, 2]}}, "stages.1.data.cases"),
        ({"data": {"patch": [None, [16, 16]]}}, "stages.1.data.patch"),
        ({"inherit": {"weights": ["encoder", "head"]}}, None),
        ({"inherit": {"weights": [["all"], ["encoder"]]}}, "stages.1.inherit.weights"),
        ({"inherit": {"weights": ["all", ["encoder", "head"]]}}, "stages.1.inherit.weights"),
        ({"inherit": {"head": "map", "classes": {"blob1": "blob2"}}}, None),
        ({"inherit": {"head": "map", "classes": {"blob1": ["blob1", "blob2"]}}},
         "stages.1.inherit.classes.blob1"),
        ({"inherit": [{"head": "new"}, {"head": "map"}]}, "stages.1.inherit"),
        ({"freeze": [[], ["encoder"]]}, "stages.1.freeze"),
        ({"layer_decay": [1.0, 0.7]}, "stages.1.layer_decay"),
        ({"freeze": ["encoder"], "unfreeze_at": [1, 2]}, "stages.1.unfreeze_at"),
        ({"rates": [{"encoder": 0.1}, {"encoder": 1.0}]}, "stages.1.rates"),
        ({"rates": {"encoder": 0.1, "head": 2.0}}, None),
        ({"rates": {"encoder": [0.1, 1.0], "head": 2.0}}, "stages.1.rates.encoder"),
        ({"rates": {"down1.conv": {"loguniform": [0.01, 1.0]}}}, "stages.1.rates.down1.conv"),
        ({"evaluation": {"tolerance": {"blob1": 1.0}}}, None),
        ({"anchor": [0, 0.01]}, "stages.1.anchor"),
        ({"lora": {"rank": [2, 4]}}, "stages.1.lora.rank"),
        ({"seed": [1, 2]}, "stages.1.seed"),
        ({"loss": {"name": ["dice_ce", "ss"]}}, "stages.1.loss.name"),
        ({"loss": {"options": {"x": 1}}}, None),
        ({"optimizer": {"weight_decay": {"loguniform": [1e-5, 1e-2]}}},
         "stages.1.optimizer.weight_decay"),
    ],
)  # fmt: skip
def test_keys_of_a_stage_and_of_its_sections_are_axes(space, change, axis):
    space["stages"][1] = {"epochs": 1, "lr": 1e-3, **change}
    space |= {"axes": {}, "search": "random", "budget": {"trials": 1}}
    labels = [found.label for found in parse_search(space).axes]
    assert [label for label in labels if "stages.1" in label] == ([axis] if axis else [])


def test_an_axis_below_a_name_with_points_in_it_changes_that_name_alone(space):
    """Parameters are called `down1.conv.0`; keys of a recipe are not."""
    space["stages"][1] = {"epochs": 1, "lr": 1e-3, "rates": {"down1.conv": [0.1, 1.0], "head": 2.0}}
    space |= {"axes": {"stages.1.rates.up1.conv": [3.0]}}
    search = parse_search(space)
    found = []
    for point in search.every_point():
        rates = search.trials(point)[0].recipe.stages[1].rates
        found += [rates] if rates not in found else []
    rest = {"head": 2.0, "up1.conv": 3.0}
    assert found == [{"down1.conv": 0.1} | rest, {"down1.conv": 1.0} | rest]


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        (1, {"rates": {"encoder": [1.0, 0.1]}}, None),
        (1, {"rates": [{"encoder": 0.1}, {"encodr": 0.1}]}, "begins with 'encodr'"),
        (0, {"task": "reconstruct", "data": {"mask": {"block": [8, 64]}}},
         "data.mask.block: found 64"),
        (1, {"lora": [None, {"rank": 100_000}]}, "stages.1.lora"),
        (0, {"data": {"stores": [["SOURCE"], ["SOURCE", "OTHER"]]}}, "data.stores: .* has classes"),
    ],
)  # fmt: skip
def test_what_one_value_of_an_axis_breaks_is_found_before_anything_runs(
    space, tmp_path, tiny_store, stage, change, words
):
    """Whatever the first value is: equal settings are looked at once, others are not equal."""
    source = stores_of(tiny_store)[0]
    text = json.dumps(change).replace("SOURCE", source)
    change = json.loads(text.replace("OTHER", str(tiny_store(dims=2, classes=1))))
    own = space["stages"][stage]
    own |= {"task": "segment"} | change if stage == 0 else change
    if stage == 0:
        own["data"] = {"split": "all"} | ({} if "stores" in change["data"] else {"store": source})
        own["data"] |= change["data"]
    space |= {"axes": {}, "seeds": []}
    if words is None:
        plan_of(space, tmp_path, build=True)
        return
    with pytest.raises(InputError, match=words):
        plan_of(space, tmp_path, build=True)


def test_all_beside_parts_is_no_axis_and_says_how_one_is_written(space):
    space["stages"][1] |= {"inherit": {"weights": ["all", "encoder"]}}
    with pytest.raises(InputError, match=r"inherit.weights: found .* \[\[all\], \[encoder\]\]"):
        parse_search(space)


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


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_sweep_on_ray_ends_as_if_nobody_had_killed_a_rank_and_its_controller(
    space, tmp_path, monkeypatch
):
    """The same ranking and weights as when every path is trained alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    space["axes"], space["seeds"] = {"data.store": space["axes"]["data.store"]}, []
    space["base"]["save_every"] = 5
    space["stages"][0] |= {"epochs": 40, "steps": 5}
    space["stages"][1] |= {"epochs": 4, "steps": 5, "lr": 1e-3}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))

    def sweep(runs: str) -> subprocess.Popen:
        words = ["space.yaml", "--slots", "2", "--runs", runs, "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "segfleet.cli.main", "sweep", *words], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=open(tmp_path / f"{runs}.log", "a"), text=True,
        )  # fmt: skip

    def ranking(process: subprocess.Popen, runs: str) -> list[tuple]:
        out, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, (tmp_path / f"{runs}.log").read_text()
        rows = json.loads(out)["ranking"]
        return [(row["rank"], row["name"], row["score"], row["ci95"]) for row in rows]

    def when_done(runs: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / runs).rglob("done.json")}

    plan = make_plan(parse_search(space), tmp_path / "calm")
    nodes = list(plan.tree.walk())
    for one in plan.trials:
        job = Train(recipe=one.recipe.model_dump(mode="json"), root=plan.runs)
        run_job(job, Ranks(torch.device("cpu")), StopRequest())
    before = when_done("calm")
    expected = ranking(sweep("calm"), "calm")
    assert len(nodes) == len(before) == 6 and when_done("calm") == before, "all was there"

    command = sweep("runs")

    def wait_for(index: int, pattern: str) -> Path:
        """The folder of a stage of this number as soon as it has such a file."""
        deadline = time.monotonic() + 900
        while True:
            for node in nodes:
                folder = tmp_path / "runs" / node.path
                if node.index == index and any(folder.glob(pattern)):
                    return folder
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    victim = wait_for(0, "checkpoints/step-*")
    rank = int((victim / "lock").read_text().split()[1])
    os.kill(rank, signal.SIGKILL)
    wait_for(1, "events.jsonl")
    family = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.communicate()
    psutil.wait_procs(family, timeout=60)
    finished = when_done("runs")
    assert 1 <= len(finished) < len(nodes), "killed in the middle"

    assert ranking(sweep("runs"), "runs") == expected and len(expected) == 4
    after = when_done("runs")
    assert len(after) == len(nodes) and all(after[path] == t for path, t in finished.items())
    assert [e for e in read_events(victim) if e["event"] == "resumed"], "the rank was at work"
    for node in nodes:
        ours, alone = (final(root / node.path) for root in (tmp_path / "runs", plan.runs))
        assert ours.keys() == alone.keys() and all(torch.equal(ours[n], alone[n]) for n in ours)
