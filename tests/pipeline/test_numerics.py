"""How PyTorch computes on a GPU is said by the recipe; on a CPU nothing changes."""

from __future__ import annotations

import os

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.models.unet_lite import UNetLite
from segfleet.pipeline import identity
from segfleet.pipeline.devices import numerics
from segfleet.pipeline.parts import build_network, task_of
from segfleet.pipeline.scoring.score import with_weights
from segfleet.pipeline.sections import Engine
from segfleet.preprocess.stores.base import open_store
from tests.pipeline.test_train import assert_equal, go, recipe_of, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings() -> dict:
    return {
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "cublas": os.environ.get(numerics.WORKSPACE),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
    }


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setenv(numerics.WORKSPACE, "")
    kept = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_a_gpu_gets_the_settings_of_the_stage_that_begins(restored, monkeypatch):
    before = settings()
    numerics.arrange(Engine(deterministic=True), CPU)
    assert settings() == before
    numerics.arrange(Engine(deterministic=True), CUDA)
    asked = {"cudnn": True, "benchmark": False, "cublas": ":4096:8", "filled": False}
    assert settings() == before | asked
    numerics.arrange(Engine(), CUDA)
    free = {"cudnn": False, "benchmark": True}
    assert settings() == before | asked | free
    monkeypatch.setenv(numerics.WORKSPACE, ":16:8")  # the user's own, as good
    numerics.arrange(Engine(deterministic=True), CUDA)
    assert settings()["cublas"] == ":16:8"


@pytest.mark.parametrize(
    ("tf32", "set_to"),
    [("none", (False, "highest")), ("convolutions", (True, "highest")), ("all", (True, "high"))],
)
def test_tensor_float_32_is_where_it_is_asked_for(restored, tf32, set_to):
    numerics.arrange(Engine(tf32="all" if tf32 == "none" else "none"), CUDA)  # a stage before
    numerics.arrange(Engine(tf32=tf32), CUDA)
    assert settings()["tf32"] == set_to


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("asked", [False, True])
def test_only_a_step_on_a_gpu_that_asks_for_it_is_deterministic(
    tiny_store, restored, device, asked
):
    recipe = recipe_of(tiny_store(dims=2), engine={"deterministic": asked})
    with pytest.raises(RuntimeError, match="another"), numerics.step_of(recipe, device):
        assert torch.are_deterministic_algorithms_enabled() == (asked and device == CUDA)
        raise RuntimeError("another")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_network_that_is_scored_has_its_recipe_s_settings(tiny_store, restored, monkeypatch):
    seen, store = [], open_store(tiny_store(dims=2))
    monkeypatch.setattr(numerics, "arrange", lambda *asked: seen.append(asked))
    recipe = recipe_of(tiny_store(dims=2), engine={"tf32": "none"})
    network = build_network(recipe, store.manifest, task_of(recipe, store.manifest))
    with_weights(recipe, store.manifest, network.state_dict(), "here", CPU)
    assert seen == [(recipe.engine, CPU)]


def test_on_a_cpu_the_bits_are_the_same(tiny_store, tmp_path):
    plain, ordered = (
        recipe_of(tiny_store(dims=2), stages=1, engine={"deterministic": choice})
        for choice in (False, True)
    )
    found = [go(one, tmp_path)[0] for one in (plain, ordered)]
    assert found[0].path != found[1].path
    assert_equal(weights(found[0]), weights(found[1]))


def test_an_operation_without_an_order_is_refused_by_name(
    tiny_store, tmp_path, monkeypatch, restored
):
    forward = UNetLite.forward

    def unordered(self, image):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))  # on a CPU, too
        return forward(self, image)

    monkeypatch.setattr(UNetLite, "forward", unordered)
    torch.use_deterministic_algorithms(True)
    recipe = recipe_of(tiny_store(dims=2), stages=1, engine={"deterministic": True})
    with pytest.raises(
        InputError, match=r"engine.deterministic: .*unet_lite_standard .* computes 'put_'"
    ):
        go(recipe, tmp_path)


def test_what_was_added_later_changes_no_uid_unless_it_is_said(tiny_store):
    manifest = open_store(tiny_store(dims=2)).manifest
    recipe = recipe_of(tiny_store(dims=2))
    before = {"precision", "accumulate", "channels_last", "compile", "ema"}
    facts = identity.stage_facts(recipe, manifest, 0)["engine"]
    assert facts.keys() == before and facts["compile"] is False
    for choice in ({"compile": False}, {"compile": "auto"}, {"tf32": "convolutions"}):
        same = recipe_of(tiny_store(dims=2), engine=choice)
        assert identity.stage_uids(same, manifest) == identity.stage_uids(recipe, manifest), choice
    for said in ({"deterministic": True}, {"tf32": "all"}, {"compile": True}):
        other = recipe_of(tiny_store(dims=2), engine=said)
        assert identity.stage_facts(other, manifest, 0)["engine"] == facts | said
