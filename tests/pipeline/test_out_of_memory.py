"""A GPU that is full is one message that says what was asked and what to lower."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.devices import out_of_memory
from segfleet.pipeline.devices.out_of_memory import OutOfMemory
from segfleet.pipeline.engines import ddp
from segfleet.pipeline.inference import ensemble, restore
from segfleet.pipeline.jobs import run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import load_recipe
from segfleet.pipeline.scoring import evaluate
from segfleet.pipeline.stop import StopRequest
from segfleet.pipeline.task import Task

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def full(*_, **__):
    raise FULL


@pytest.fixture
def job(tiny_recipe, tmp_path):
    folder = tiny_recipe([{"name": "one", "epochs": 1, "steps": 2, "lr": 1e-3}], 4)
    recipe = load_recipe(str(folder / "tiny.yaml"), ["data.patch=[32,32]"])
    recipe = recipe.model_dump(mode="json")

    def with_engine(**engine):
        return Train(recipe=recipe | {"engine": recipe["engine"] | engine}, root=tmp_path)

    return with_engine


def message(job) -> str:
    with pytest.raises(OutOfMemory) as error:
        run_job(job, Ranks(CPU), StopRequest())
    assert error.value.exit_code == 2 and isinstance(error.value, InputError)
    return str(error.value)


def test_training_names_what_was_asked_and_what_helps(job, monkeypatch):
    monkeypatch.setattr(ddp.Engine, "step", full)
    said = message(job())
    for words in (
        "out of memory on cpu while training unet_lite_standard in fp32",
        "4 patch(es) of 1x32x32 at once on each of 1 GPU(s), data.batch 4",
        "engine.accumulate (1)",
        "engine.checkpoint_activations=true",
        "engine.precision=bf16",
        "lower data.batch; or lower data.patch",
    ):
        assert words in said, (words, said)


def test_what_is_done_already_is_not_advised(job, monkeypatch):
    monkeypatch.setattr(ddp.Engine, "step", full)
    said = message(job(accumulate=4, checkpoint_activations=True, precision="bf16"))
    assert "1 patch(es)" in said
    for words in ("accumulate", "checkpoint_activations", "precision=bf16"):
        assert words not in said


def test_scoring_has_its_own_words(job, monkeypatch):
    monkeypatch.setattr(evaluate, "sliding_window", full)
    said = message(job())
    assert "while scoring unet_lite_standard in fp32: tiles of 1x32x32, evaluation.batch 1" in said
    assert "SEGFLEET_DEVICE=cpu" in said and "data.batch" not in said


def test_predicting_has_its_own_words(monkeypatch):
    monkeypatch.setattr(ensemble, "sliding_window", full)
    member = SimpleNamespace(
        name="unet in bf16", patch=(1, 32, 32), batch=2, forward=None, window=dict, task=None
    )
    image = SimpleNamespace(image_CZYX=None, scale=1.0)
    with pytest.raises(
        OutOfMemory, match="out of memory on cpu with unet in bf16, tiles of"
    ) as one:
        ensemble.predict_maps([member], lambda _: image)
    assert "1x32x32, 2 at once. Free the GPU of other processes; or predict on" in str(one.value)


def test_other_errors_of_the_machine_stay_what_they_are(job, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(ddp.Engine, "step", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_job(job(), Ranks(CPU), StopRequest())


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"]
)
def test_what_the_libraries_say_is_known(words):
    assert out_of_memory.is_out_of_memory(RuntimeError(words))
    assert not out_of_memory.is_out_of_memory(ValueError(words))


def test_the_card_is_named_with_what_others_hold(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 48 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    said = out_of_memory.card(torch.device("cuda", 1))
    assert said == "cuda:1 (NVIDIA A100, 80.0 GiB: 48.0 held here, 30.0 by others)"


def test_labels_are_made_on_the_host_if_the_device_has_no_room(monkeypatch):
    calls, combine = [], restore._combine

    def once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise FULL
        return combine(*arguments)

    monkeypatch.setattr(restore, "_combine", once)
    task = Task(head="softmax", names=("a",), members=((1,),), values=(0, 1))
    found = torch.zeros(2, 1, 2, 2)
    found[1, 0, 0] = 1
    label = restore.restore(found, task, crop=((0, 1), (0, 2), (0, 2)), raw_shape=(1, 2, 2))
    assert np.array_equal(label, [[[1, 1], [0, 0]]]) and len(calls) == 2
