"""A recipe meets a store: what cannot be meant is refused before it trains for hours, what is odd
is said."""

from __future__ import annotations

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.parts import channels_last, check_recipe, doubts, in_layout, task_of
from segfleet.pipeline.scoring.score import forward_of
from segfleet.preprocess.stores.manifest import load_manifest

NET_2D = {"name": "unet_lite_standard", "options": {"width": 4}}
NET_3D = {"name": "plain_unet_3d", "options": {"features": [4, 8]}}


@pytest.fixture
def meet(tiny_store):
    """`meet(dims, model, patch, made_for)`: a recipe and the manifest of a store of 24 to 29 voxels
    along z."""

    def make(dims, model, patch=None, made_for=None):
        store = tiny_store(dims=dims)
        document = {
            "name": "mine",
            "data": {"store": str(store), "patch": patch, "made_for": made_for},
            "model": model,
            "stages": [{"epochs": 1, "lr": 1e-3}],
        }
        return recipes.parse(document), load_manifest(store)

    return make


@pytest.mark.parametrize(
    ("dims", "model", "patch", "made_for", "words"),
    [
        (
            2,
            NET_3D,
            [16, 16, 16],
            None,
            r"\[16, 16, 16\], which is 3D, but tiny in .* holds 2D images",
        ),
        (2, NET_3D, None, None, "plain_unet_3d is a 3D network, but the patch"),
        (
            3,
            NET_3D,
            [64, 16, 16],
            None,
            "found 64 voxels along z, but the largest of the 6 cases of tiny in .* has 29: .* the "
            r"plan's patch is \[16, 16, 16\]",
        ),
        (3, NET_2D, [256, 16], None, "found 256 voxels along y, but the largest"),
        (
            3,
            NET_3D,
            None,
            {"dataset": "BRATS", "channels": 4},
            r"channels: the recipe mine is made for BRATS with 4, but tiny in .* has 1 \(a\)",
        ),
        (3, NET_3D, None, {"dataset": "x", "classes": 3}, r"has 2 \(blob1, blob2\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(meet, dims, model, patch, made_for, words):
    with pytest.raises(InputError, match=words):
        check_recipe(*meet(dims, model, patch, made_for))


def test_what_can_be_meant_is_not(meet):
    for dims, model, patch, made_for in (
        (3, NET_2D, [16, 16], None),  # slice by slice
        (3, NET_3D, [32, 32, 32], None),
        (2, NET_2D, [64, 64], {"dataset": "tiny", "channels": 1, "classes": 2}),
    ):
        check_recipe(*meet(dims, model, patch, made_for))


def test_another_data_set_is_named_beside_the_one_a_recipe_was_made_for(meet):
    assert doubts(*meet(3, NET_3D, None, {"dataset": "Task09_Tiny"})) == []
    (sentence,) = doubts(*meet(3, NET_3D, None, {"dataset": "Hippocampus"}))
    assert "mine was made for Hippocampus" in sentence and "holds tiny (3D; a; blob1" in sentence
    (sentence,) = doubts(*meet(3, NET_3D, [32, 16, 16]))
    assert "32 voxels along z, and the largest case of tiny has 29" in sentence


def test_a_mask_that_no_stage_reads_is_said(meet):
    recipe, manifest = meet(3, NET_3D)
    document = recipe.model_dump(mode="json", exclude_defaults=True)
    stages, masked = document["stages"], document["data"] | {"mask": {"ratio": 0.5}}
    assert doubts(recipe, manifest) == []
    (sentence,) = doubts(recipes.parse(document | {"data": masked}), manifest)
    assert sentence.startswith("data.mask: nothing reads it")
    rebuilding = [{**stages[0], "task": "reconstruct"}, *stages]
    assert doubts(recipes.parse(document | {"data": masked, "stages": rebuilding}), manifest) == []


def test_the_data_set_a_recipe_was_made_for_is_no_part_of_a_result(meet):
    from segfleet.pipeline.identity import stage_uids

    plain, noted = meet(3, NET_3D), meet(3, NET_3D, None, {"dataset": "Hippocampus"})
    assert stage_uids(*plain) == stage_uids(*noted)


@pytest.mark.parametrize(
    ("asked", "cpu", "solid", "gpu"),
    [(True, True, True, True), (False, False, False, False), ("auto", False, True, True)],
)
def test_memory_format_by_device(meet, asked, cpu, solid, gpu):
    recipe, manifest = meet(2, NET_2D)
    document = recipe.model_dump(mode="json")
    document["engine"]["channels_last"] = asked
    recipe = recipes.parse(document)
    assert channels_last(recipe, torch.device("cuda"), flat=True) is gpu
    assert channels_last(recipe, torch.device("cpu"), flat=True) is cpu
    assert channels_last(recipe, torch.device("cpu"), flat=False) is solid
    seen = []

    def network(image):
        seen.append(image.is_contiguous(memory_format=torch.channels_last))
        return torch.zeros(1, task_of(recipe, manifest).channels, 8, 8)

    forward = forward_of(network, task_of(recipe, manifest), recipe, torch.device("cpu"))
    forward(torch.zeros(1, 3, 8, 8))
    assert seen == [cpu]
    model = in_layout(torch.nn.Conv2d(3, 4, 3), recipe, manifest)
    assert model.weight.is_contiguous(memory_format=torch.channels_last) is cpu
