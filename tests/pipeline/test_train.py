"""The loop: repeatable to the bit, resumable anywhere, forkable; nothing is trained twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline import checkpoint, events, identity, run
from segfleet.pipeline.jobs import Stores
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.stage import Inherit
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.training import pulse, saves, window
from segfleet.pipeline.training import train as training
from segfleet.pipeline.training.context import Context
from segfleet.preprocess.stores.base import open_store


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(store, stages=2, **changes):
    document = {
        "name": "test",
        "data": {"store": str(store), "batch": 2},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [
            {"name": "base", "epochs": 2, "steps": 3, "lr": 1e-2, "warmup": 2},
            {
                "name": "tune",
                "epochs": 2,
                "steps": 2,
                "lr": 1e-3,
                "schedule": "poly",
                "inherit": "weights+optimizer",
            },
        ][:stages],
        "save_every": 2,
    }
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(document)


def refuse(text):
    """Whatever is said is a failure, but for how busy the machine is."""
    if "waits for data" not in text:
        pytest.fail(text)


def go(recipe, root, stop_after=None, validate=lambda engine, own: {}, warn=refuse, waits=False):
    """Train in this process; stop in order after so many steps."""
    stores = Stores()
    folders = run.stage_folders(root, recipe, stores.manifest)
    asked = iter(range(10**9))
    try:
        training.train(
            Context(
                recipe=recipe,
                stores=stores,
                folders=folders,
                ranks=Ranks(torch.device("cpu")),
                asked_to_stop=lambda: stop_after is not None and next(asked) >= stop_after,
                warn=warn,
                validate=validate,
                waits=waits,
            )
        )
    except Interrupted as stop:
        assert "Run the same command again" in str(stop)
    return folders


def weights(folder, group="weights"):
    return folder.final().tensors(group)


def assert_equal(first, second):
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def logged_steps(folder):
    return [event["step"] for event in events.read_events(folder.path) if event["event"] == "step"]


def logged_losses(folder):
    return [event["loss"] for event in events.read_events(folder.path) if event["event"] == "step"]


def test_twice_the_same_weights_and_nothing_twice(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2))
    one, two = go(recipe, tmp_path / "a"), go(recipe, tmp_path / "b")
    for group in ("weights", "optimizer"):
        assert_equal(weights(one[-1], group), weights(two[-1], group))
    before = {path: path.stat().st_mtime_ns for path in one[-1].path.rglob("*.safetensors")}
    go(recipe, tmp_path / "a")
    assert before == {path: path.stat().st_mtime_ns for path in one[-1].path.rglob("*.safetensors")}
    other = go(recipe_of(tiny_store(dims=2), seed=1), tmp_path / "c")
    first = next(name for name, value in weights(one[-1]).items() if value.ndim == 4)
    assert not torch.equal(weights(one[-1])[first], weights(other[-1])[first])


@pytest.mark.parametrize(
    "engine",
    [{}, {"ema": 0.9, "accumulate": 2}, {"precision": "bf16"}, {"precision": "fp16"}],
    ids=str,
)
def test_stopped_anywhere_and_resumed_is_bitwise_the_same(tiny_store, tmp_path, engine):
    recipe = recipe_of(tiny_store(dims=2), engine=engine)
    straight = go(recipe, tmp_path / "straight")
    # in the middle, at an epoch's end, at a stage's end, right after it, at the end
    for after in (
        1,
        3,
        6,
        7,
        10,
    ):
        folders = go(recipe, tmp_path / f"stopped{after}", stop_after=after)
        go(recipe, tmp_path / f"stopped{after}")
        for stage in (0, 1):
            for group in ("weights", "optimizer", *(("ema", "average") if "ema" in engine else ())):
                assert_equal(weights(straight[stage], group), weights(folders[stage], group))
            steps = logged_steps(folders[stage])
            assert steps == sorted(set(steps)) and set(logged_steps(straight[stage])) <= set(steps)


def test_a_kill_loses_at_most_the_checkpoint_interval(tiny_store, tmp_path, monkeypatch):
    recipe = recipe_of(tiny_store(dims=2), stages=1)
    straight = go(recipe, tmp_path / "straight")

    class Killed(BaseException):
        pass

    original, calls = training.Window.add, []

    def add(self, *values):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        original(self, *values)

    monkeypatch.setattr(training.Window, "add", add)
    with pytest.raises(Killed):
        go(recipe, tmp_path / "killed")
    folders = go(recipe, tmp_path / "killed")
    assert_equal(weights(straight[0]), weights(folders[0]))
    assert [
        e["from_step"] for e in events.read_events(folders[0].path) if e["event"] == "resumed"
    ] == [2]
    assert logged_steps(folders[0]) == [2, 3, 4, 6] == logged_steps(straight[0])


def test_forked_equals_straight_through_and_shares_the_first_stage(tiny_store, tmp_path):
    store = tiny_store(dims=2)
    straight = go(recipe_of(store), tmp_path / "straight")
    first = go(recipe_of(store, stages=1), tmp_path / "forked")
    stamp = (first[0].path / "done.json").stat().st_mtime_ns
    forked = go(recipe_of(store), tmp_path / "forked")
    assert (
        forked[0].path == first[0].path
        and (first[0].path / "done.json").stat().st_mtime_ns == stamp
    )
    assert_equal(weights(straight[-1]), weights(forked[-1]))


def test_stage_two_starts_with_its_own_rate_and_the_right_moments(
    tiny_store, tmp_path, monkeypatch
):
    from segfleet.pipeline.engines import ddp

    seen = []
    original = ddp.Engine.step

    def step(self, micro, lr):
        found = original(self, micro, lr)
        state = self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]
        seen.append((self.optimizer.param_groups[0]["lr"], int(state["step"])))
        return found

    monkeypatch.setattr(ddp.Engine, "step", step)
    go(recipe_of(tiny_store(dims=2)), tmp_path / "kept")
    assert [round(lr, 6) for lr, _ in seen[:3]] == [0.003333, 0.006667, 0.01]
    assert seen[6][0] == 1e-3 and seen[6][1] == 7  # moments were taken over: the seventh update
    seen.clear()
    recipe = recipe_of(tiny_store(dims=2))
    fresh = recipe.model_copy(
        update={
            "stages": (recipe.stages[0], recipe.stages[1].model_copy(update={"inherit": Inherit()}))
        }
    )
    go(fresh, tmp_path / "fresh")
    assert seen[6] == (1e-3, 1)


def test_damaged_newest_checkpoint_is_named_and_the_run_still_ends_the_same(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), stages=1)
    straight = go(recipe, tmp_path / "straight")
    folders = go(recipe, tmp_path / "harmed", stop_after=5)
    newest = checkpoint.steps(folders[0].checkpoints)[-1] / "optimizer.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 255
    newest.write_bytes(raw)
    said = []
    go(recipe, tmp_path / "harmed", warn=said.append)
    assert (
        len(said) == 1
        and "step-00000005 is damaged: optimizer.safetensors does not match its sha256" in said[0]
    )
    assert_equal(weights(straight[0]), weights(folders[0]))


def harm(path):
    (path / "weights.safetensors").unlink()  # what was read from it is mapped, not copied
    (path / "weights.safetensors").write_bytes(b"harmed")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_finished_stage_whose_checkpoint_is_damaged_is_trained_again(tiny_store, tmp_path, stage):
    recipe = recipe_of(tiny_store(dims=2))
    straight = go(recipe, tmp_path / "straight")
    changed = recipe.model_copy(
        update={"stages": (recipe.stages[0], recipe.stages[1].model_copy(update={"lr": 5e-4}))}
    )
    folders = go(recipe, tmp_path / "harmed")
    harm(folders[stage].final().path)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"is damaged: weights.* run `segfleet train` again: it trains this stage again",
    ):
        folders[stage].final()
    said = []
    # another second stage needs the first one
    go(recipe if stage else changed, tmp_path / "harmed", warn=said.append)
    step = (6, 4)[stage]
    assert len(said) == 1 and f"step-{step:08d} of a finished stage is damaged" in said[0], said
    assert f"stage {stage + 1} is trained again from its beginning, for no other is left" in said[0]
    for one, two in zip(straight, folders, strict=True):
        assert_equal(weights(one), weights(two))
    go(recipe, tmp_path / "harmed")  # the child was valid all along


def test_a_damaged_best_checkpoint_comes_back_from_the_one_before(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), stages=1, evaluation={"every": 1, "weights": "best"})
    recipe = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"epochs": 4}),)}
    )
    scores = dict(zip((3, 6, 9, 12), (0.5, 0.9, 0.7, 0.6), strict=True))
    dice = [*scores.values()]
    folder = go(recipe, tmp_path, validate=lambda engine, own: {"dice": dice.pop(0)})[0]
    best, last = checkpoint.steps(folder.checkpoints)
    wanted = checkpoint.load(best).tensors("weights")
    harm(best)
    said, dice = [], [*scores.values()]
    go(recipe, tmp_path, validate=lambda engine, own: {"dice": dice.pop(0)}, warn=said.append)
    assert len(said) == 1 and "step-00000006 of a finished stage is damaged" in said[0] and not dice
    assert_equal(wanted, checkpoint.load(best).tensors("weights"))
    harm(last)
    dice = [0.7, 0.6]  # goes on from the best one
    go(recipe, tmp_path, validate=lambda engine, own: {"dice": dice.pop(0)}, warn=said.append)
    assert (
        "stage 1 is trained again from the checkpoint before it" in said[1]
        and len(said) == 2
        and not dice
    )
    assert folder.done()["best"] == {"dice": {"value": 0.9, "step": 6}}


@pytest.mark.parametrize("state", ["training", "finished"])
def test_a_refused_process_leaves_the_recipe_alone(tiny_store, tmp_path, state):
    recipe = recipe_of(tiny_store(dims=2))
    leaf = go(recipe, tmp_path, stop_after=None if state == "finished" else 8)[-1].path
    other = recipe.model_copy(update={"name": "other", "save_every": 1})
    lock = "held = lock_stage(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    code = f"import pathlib, sys; from segfleet.pipeline.run import lock_stage; {lock}"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(leaf)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(InputError, match="is in use by"):
            go(other, tmp_path)
        assert run.open_run(leaf)[0] == recipe
        holder.communicate("\n")
    go(other, tmp_path)
    assert run.open_run(leaf)[0] == other


def test_one_process_at_a_time(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), stages=1)
    folder = run.stage_folders(tmp_path, recipe, open_store(recipe.data.store).manifest)[0].path
    lock = "held = lock_stage(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    code = f"import pathlib, sys; from segfleet.pipeline.run import lock_stage; {lock}"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "1\n"
        for waits in (False, True):  # nobody waits for its own run
            with pytest.raises(InputError, match=f"is in use by process {holder.pid}"):
                go(recipe, tmp_path, waits=waits)
        holder.communicate("\n")
    go(recipe, tmp_path)


def spoil(monkeypatch, steps):
    """Make the loss of some steps infinite."""
    from segfleet.pipeline.engines import ddp

    original, count = ddp.Engine.step, [0]

    def step(self, micro, lr):
        count[0] += 1
        kept = self.loss
        if count[0] in steps:
            self.loss = lambda output, label: kept(output, label) * float("inf")
        try:
            return original(self, micro, lr)
        finally:
            self.loss = kept

    monkeypatch.setattr(ddp.Engine, "step", step)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_non_finite_step_changes_nothing_and_is_reported_with_its_cases(
    tiny_store, tmp_path, monkeypatch, precision
):
    recipe = recipe_of(tiny_store(dims=2), stages=1, engine={"precision": precision}, save_every=1)
    monkeypatch.setattr(saves, "KEEP", 99)
    spoil(monkeypatch, {4})
    kept = []
    original = checkpoint.copies
    monkeypatch.setattr(
        checkpoint, "copies", lambda tensors: kept.append(original(tensors)) or kept[-1]
    )
    folder = go(recipe, tmp_path)[0]
    assert any("running_var" in name for name in kept[2]["weights"])
    for group in ("weights", "optimizer"):
        assert_equal(kept[2][group], kept[3][group])
        assert not all(
            torch.equal(value, kept[4][group][name]) for name, value in kept[3][group].items()
        )
    reports = [event for event in events.read_events(folder.path) if event["event"] == "non_finite"]
    assert len(reports) == 1 and reports[0]["step"] == 4 and reports[0]["skipped"] == 1
    assert all(case.startswith("case0") for case in reports[0]["cases"]) and reports[0]["cases"]
    assert folder.done()["skipped"] == 1


def test_gives_up_after_too_many_non_finite_steps_in_a_row(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "PATIENCE", 3)
    spoil(monkeypatch, {2, 3, 4, 5})
    with pytest.raises(
        window.Diverged,
        match=r"not finite for 3 steps in a row, the last at step 4, cases case0.*Lower stages.lr",
    ):
        go(recipe_of(tiny_store(dims=2), stages=1, save_every=1), tmp_path)


def test_validation_keeps_the_best_checkpoint(tiny_store, tmp_path):
    scores = iter([0.5, 0.9, 0.7, 0.6])
    recipe = recipe_of(tiny_store(dims=2), stages=1, evaluation={"every": 1, "weights": "best"})
    recipe = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"epochs": 4}),)}
    )
    folder = go(recipe, tmp_path, validate=lambda engine, own: {"dice": next(scores)})[0]
    assert folder.done()["best"] == {"dice": {"value": 0.9, "step": 6}}
    assert [path.name for path in checkpoint.steps(folder.checkpoints)] == [
        "step-00000006",
        "step-00000012",
    ]
    found = [
        (e["step"], e["dice"])
        for e in events.read_events(folder.path)
        if e["event"] == "validation"
    ]
    assert found == [(3, 0.5), (6, 0.9), (9, 0.7), (12, 0.6)]


def test_a_stop_between_an_epoch_and_its_validation_loses_neither(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), stages=1, evaluation={"every": 1})
    seen = []

    def validate(engine, own):
        seen.append(1)
        return {"dice": 0.1 * len(seen)}

    folder = go(recipe, tmp_path, stop_after=3, validate=validate)[0]
    assert not seen
    go(recipe, tmp_path, validate=validate)
    assert [
        event["step"] for event in events.read_events(folder.path) if event["event"] == "validation"
    ] == [3, 6]


def test_patience_ends_a_stage_early_and_the_next_one_starts_from_there(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), evaluation={"every": 1})
    first = recipe.stages[0].model_copy(update={"epochs": 9, "patience": 2})
    recipe = recipe.model_copy(update={"stages": (first, recipe.stages[1])})
    scores = iter([0.5, 0.6, 0.55, 0.6, 0.7, 0.7])
    folders = go(recipe, tmp_path, validate=lambda engine, own: {"dice": next(scores)})
    assert folders[0].done()["steps"] == 12 and folders[0].done()["best"] == {
        "dice": {"value": 0.6, "step": 6}
    }
    assert folders[1].done()["steps"] == 4
    with pytest.raises(InputError, match="a stage with patience needs evaluation.every > 0"):
        parse({**recipe.model_dump(mode="json"), "evaluation": {}})


def test_a_dice_that_is_not_defined_is_no_best_and_no_reason_to_end(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), stages=1, evaluation={"every": 1, "weights": "best"})
    recipe = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"epochs": 6, "patience": 2}),)}
    )
    scores = iter([None, None, None, 0.4, None, 0.3])
    folder = go(recipe, tmp_path / "a", validate=lambda engine, own: {"dice": next(scores)})[0]
    assert folder.done()["steps"] == 18
    assert folder.done()["best"] == {"dice": {"value": 0.4, "step": 12}}


@pytest.mark.parametrize(("select", "step"), [("dice", 6), ("iou_pooled", 9), ("loss", 3)])
def test_every_measure_keeps_its_own_best_checkpoint(tiny_store, tmp_path, select, step):
    """So the choice can be changed after training: it is no part of the run's identity."""
    recipe = recipe_of(
        tiny_store(dims=2), stages=1, evaluation={"every": 1, "weights": "best", "select": select}
    )
    recipe = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"epochs": 4}),)}
    )
    scores = iter(
        {"dice": d, "iou_pooled": i, "loss": x}
        for d, i, x in ((0.5, 0.4, 0.1), (0.9, 0.5, 0.2), (0.7, 0.6, float("nan")), (0.6, 0.1, 0.3))
    )
    folder = go(recipe, tmp_path, validate=lambda engine, own: next(scores))[0]
    assert folder.done()["best"] == {
        "dice": {"value": 0.9, "step": 6},
        "iou_pooled": {"value": 0.6, "step": 9},
        "loss": {"value": 0.1, "step": 3},
    }
    kept = [int(path.name.rpartition("-")[2]) for path in checkpoint.steps(folder.checkpoints)]
    assert kept == [3, 6, 9, 12]
    assert scored.chosen_step(recipe, folder.done()) == step


def test_stop_file_and_time_limit(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        stop = StopRequest(tmp_path / "stop")
        assert not stop.asked()
        stop.deadline = time.time() - 1
        assert stop.asked() and stop.reason == "the time limit"
        stop.reason = stop.deadline = None
        (tmp_path / "stop").touch()
        assert stop.asked() and stop.reason == "the file stop"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.compile
def test_compiled_steps_are_those_of_the_eager_network_and_resume_exactly(tiny_store, tmp_path):
    eager, compiled = (
        recipe_of(tiny_store(dims=2), stages=1, engine={"compile": choice})
        for choice in (False, True)
    )
    plain, straight = go(eager, tmp_path / "eager"), go(compiled, tmp_path / "straight")
    assert plain[0].path.name != straight[0].path.name  # the last bits differ
    for one, two in zip(plain, straight, strict=True):
        assert [*logged_losses(two)] == pytest.approx([*logged_losses(one)], rel=1e-3)
    # a checkpoint knows nothing of it
    assert weights(plain[-1]).keys() == weights(straight[-1]).keys()
    go(compiled, tmp_path / "stopped", stop_after=3)
    for name, value in weights(go(compiled, tmp_path / "stopped")[-1]).items():
        assert torch.equal(value, weights(straight[-1])[name]), name


def test_frozen_parameters_stay(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2))
    second = recipe.stages[1].model_copy(update={"freeze": ("inc", "down1")})
    folders = go(recipe.model_copy(update={"stages": (recipe.stages[0], second)}), tmp_path)
    before, after = weights(folders[0]), weights(folders[1])
    for name in before:
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(before[name], after[name]) == name.startswith(
                ("inc", "down1.", "down1")
            ), name
    wrong = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"freeze": ("nobody",)}),)}
    )
    with pytest.raises(
        InputError, match="no parameter name begins with 'nobody'; .*names begin with: .*inc"
    ):
        go(wrong, tmp_path)


def test_loss_falls(tiny_store, tmp_path):
    recipe = recipe_of(
        tiny_store(dims=3),
        stages=1,
        model={"name": "resenc_unet_3d", "options": {"features": [8, 16]}},
    )
    recipe = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"epochs": 8, "steps": 5}),)}
    )
    folder = go(recipe, tmp_path)[0]
    losses = logged_losses(folder)
    assert losses[-1] < 0.75 * losses[0]
    assert list((folder.path / "tensorboard").iterdir())


def test_checkpoint_remembers_what_made_it(tiny_store, tmp_path):
    recipe = recipe_of(tiny_store(dims=2), stages=1)
    state = json.loads((go(recipe, tmp_path)[0].final().path / "state.json").read_text())
    assert (
        parse(state["recipe"]) == recipe
        and state["versions"]["torch"] == torch.__version__
        and state["step"] == 6
    )


def test_identity_holds_what_changes_the_result_and_nothing_else(tiny_store, tmp_path):
    store = tiny_store(dims=2)
    manifest = open_store(store).manifest
    base = identity.stage_uids(recipe_of(store), manifest)
    other = (
        {"name": "other"},
        {"save_every": 7},
        {"data": {"workers": 2}},
        {"engine": {"name": "other"}},
        {"evaluation": {"every": 3}},
    )
    for change in other:
        assert identity.stage_uids(recipe_of(store, **change), manifest) == base, change
    data = ({"data": {"batch": 4}}, {"data": {"split": "all"}})
    another = (*data, {"seed": 5}, {"engine": {"precision": "bf16"}}, {"optimizer": {"clip": 1}})
    for change in another:
        changed = identity.stage_uids(recipe_of(store, **change), manifest)
        assert changed[0] != base[0] and changed[1] != base[1], change
    later = recipe_of(store)
    later = later.model_copy(
        update={"stages": (later.stages[0], later.stages[1].model_copy(update={"lr": 5e-4}))}
    )
    assert (
        identity.stage_uids(later, manifest)[0] == base[0]
        and identity.stage_uids(later, manifest)[1] != base[1]
    )
    hdf5 = open_store(tiny_store(dims=2, format="hdf5")).manifest
    # the store's format is no part of it
    assert identity.stage_uids(recipe_of(store), hdf5) == base


def test_options_without_effect_are_no_part_of_the_identity(tiny_store):
    store = tiny_store(dims=2)
    manifest = open_store(store).manifest

    def uids(first: dict, optimizer: dict) -> list[str]:
        made = recipe_of(store, optimizer=optimizer)
        stages = (made.stages[0].model_copy(update=first), *made.stages[1:])
        return identity.stage_uids(made.model_copy(update={"stages": stages}), manifest)

    base = uids({}, {})
    assert (
        uids(
            {"power": 2.0, "floor": 1e-5, "period": 3, "inherit": Inherit(optimizer=True)},
            {"momentum": 0.5, "nesterov": False},
        )
        == base
    )
    poly, sgd = uids({"schedule": "poly"}, {}), uids({}, {"name": "sgd"})
    assert (
        uids({"schedule": "poly", "power": 2.0}, {})
        != poly
        != uids({"schedule": "poly", "floor": 1e-5}, {})
    )
    assert (
        uids({"schedule": "poly", "period": 3}, {}) == poly
        and uids({}, {"name": "sgd", "betas": (0.5, 0.9)}) == sgd
    )
    assert (
        uids({}, {"name": "sgd", "momentum": 0.5}) != sgd
        and uids({}, {"betas": (0.5, 0.9)}) != base
    )


def test_a_hanging_run_shows_where_it_hangs(tiny_store, tmp_path):
    program = tmp_path / "hang.py"
    program.write_text(
        "import sys, time, pathlib, torch\n"
        "from segfleet.pipeline import run\n"
        "from segfleet.pipeline.training import context, train\n"
        "from segfleet.pipeline.engines import ddp\n"
        "from segfleet.pipeline.ranks import Ranks\n"
        "from segfleet.pipeline.recipe import parse\n"
        "from segfleet.preprocess.stores.base import open_store\n"
        "import json\n"
        "recipe = parse(json.loads(sys.argv[1]))\n"
        "store = open_store(recipe.data.store)\n"
        "def hang_here(self, micro, lr): time.sleep(2); raise SystemExit\n"
        "ddp.Engine.step = hang_here\n"
        "never, ranks = (lambda: False), Ranks()\n"
        "folders = run.stage_folders(pathlib.Path(sys.argv[2]), recipe, store.manifest)\n"
        "train.train(context.Context(recipe=recipe, stores=lambda own: store, folders=folders, "
        "ranks=ranks, asked_to_stop=never, warn=print, validate=print))\n"
    )
    recipe = recipe_of(tiny_store(dims=2), stages=1)
    command = [
        sys.executable,
        str(program),
        json.dumps(recipe.model_dump(mode="json")),
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "SEGFLEET_WATCHDOG": "0.7"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        "Timeout" in done.stderr
        and "in hang_here" in done.stderr
        and "in train_stage" in done.stderr
    )


def test_the_watch_for_hangs_is_armed_anew_now_and_then_not_every_step(monkeypatch):
    """To arm it starts a thread, which costs more than everything else that the loop adds."""
    armed, now = [], [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        pulse.faulthandler, "dump_traceback_later", lambda s, repeat: armed.append(now[0])
    )
    monkeypatch.setenv("SEGFLEET_WATCHDOG", "100")
    dump = pulse.HangDump()
    for now[0] in np.arange(0, 10, 0.01):  # 1,000 steps in ten seconds
        dump.rearm()
    assert len(armed) == 10 and max(np.diff(armed)) < 1.02


def test_a_run_that_is_moved_while_it_is_trained_is_an_error(two_stages, go, tmp_path, monkeypatch):
    """Before, training went on in a new folder, and its beginning was lost without a word."""
    runs, away, document = tmp_path / "runs", tmp_path / "away", two_stages({}, {})
    rate = training.learning_rate

    def moving(stage, step, total):
        if step == 1 and not away.exists():
            runs.rename(away)
        return rate(stage, step, total)

    monkeypatch.setattr(training, "learning_rate", moving)
    with pytest.raises(InputError, match="runs/[0-9a-f]{12} was moved or removed while"):
        go(document, runs)
    assert not runs.exists()
    away.rename(runs)
    monkeypatch.undo()
    moved, straight = go(document, runs), go(document, tmp_path / "straight")
    for one, other in zip(moved, straight, strict=True):
        assert_equal(weights(one), weights(other))
