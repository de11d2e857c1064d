"""From a recipe to its parts: patch, task, network, loss. What is wrong with a recipe shows here,
before it runs."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline.engines.common import trainable
from segfleet.pipeline.losses.base import build_loss
from segfleet.pipeline.losses.deep_supervision import DeepSupervision
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.task import Task, make_task
from segfleet.preprocess.stores.manifest import Manifest


def patch_of(recipe: Recipe, manifest: Manifest) -> tuple[int, int, int]:
    """Patch in voxels (z, y, x): the recipe's or the plan's, checked against the network's rule. 2D
    networks get one slice."""
    spec = registry.spec(recipe.model.name)
    patch = recipe.data.patch or manifest.plan.patch
    if len(patch) == 2:
        patch = (1, *patch)
    if len(patch) != 3:
        raise InputError(
            f"data.patch: found {list(patch)}, expected 2 or 3 sizes in voxels, (y, x) or (z, y, x)"
        )
    dims = 2 if patch[0] == 1 else 3
    if dims not in spec.dims and spec.dims == (2,):
        if recipe.data.patch is not None:
            raise InputError(
                f"data.patch: found {list(patch)}, but {spec.name} is a 2D network; expected (y, x)"
            )
        patch, dims = (1, *patch[1:]), 2
    if dims not in spec.dims:
        raise InputError(
            f"model.name: {spec.name} is a 3D network, but the patch {list(patch)} has one slice; "
            "choose a 2D network"
        )
    # A network planned from the patch has no divisor of its own; `check_recipe` tries it.
    planned = "patch" in inspect.signature(spec.build).parameters and not spec.fixed_patch
    divisors = (
        (1 if planned else spec.divisor,) * dims
        if planned or isinstance(spec.divisor, int)
        else spec.divisor
    )
    for axis, size, divisor in zip("zyx"[3 - dims :], patch[3 - dims :], divisors, strict=True):
        if size % divisor and recipe.data.patch is not None:
            near = max(divisor, round(size / divisor) * divisor)
            raise InputError(
                f"data.patch: {spec.name} needs {axis} sizes that are multiples of {divisor}, "
                f"found {size}; {near} would do"
            )
    rounded = (
        -(-size // divisor) * divisor
        for size, divisor in zip(patch[3 - dims :], divisors, strict=True)
    )
    return (1,) * (3 - dims) + tuple(rounded)  # a plan's patch may grow to what the network takes


def build_network(recipe: Recipe, manifest: Manifest, task: Task) -> nn.Module:
    """The recipe's network for this data set; what the plan knows is filled in where the network
    asks for it and the recipe is silent."""
    patch, spec = patch_of(recipe, manifest), registry.spec(recipe.model.name)
    dims = 2 if patch[0] == 1 else 3
    known = {
        "dims": dims,
        "patch": patch[3 - dims :],
        "spacing": manifest.plan.target_spacing[3 - dims :],
    }
    asked = inspect.signature(spec.build).parameters
    options = {key: value for key, value in known.items() if key in asked} | recipe.model.options
    torch.manual_seed(recipe.seed)
    return registry.build_model(
        recipe.model.name,
        in_channels=len(manifest.dataset.channels),
        num_classes=task.channels,
        options=options,
    )


class Objective(nn.Module):
    """`objective(output, label) -> scalar`: the recipe's loss on the task's target, deep
    supervision included."""

    def __init__(self, recipe: Recipe, task: Task):
        super().__init__()
        name = recipe.loss.name
        if name == "auto":
            name = "dice_ce" if task.head == "softmax" else "bce_dice"
        self.task = task
        self.loss = DeepSupervision(
            build_loss(name, head=task.head, options=recipe.loss.options),
            recipe.loss.deep_supervision,
        )

    def forward(self, output: Tensor | list[Tensor], label: Tensor) -> Tensor:
        """output: logits or a list of logits; label (B, *S) uint8."""
        return self.loss(output, self.task.target(label), self.task.valid(label))


def check_recipe(recipe: Recipe, manifest: Manifest) -> Task:
    """Raise InputError or ModelError for whatever in the recipe does not fit this data set; costs
    no memory for weights."""
    task = make_task(manifest.dataset, recipe.model.head)
    manifest.fold(recipe.data.split, recipe.data.fold)
    with torch.device("meta"), torch.no_grad():
        network, patch = build_network(recipe, manifest, task).eval(), patch_of(recipe, manifest)
        network(
            torch.empty(1, len(manifest.dataset.channels), *(patch[1:] if patch[0] == 1 else patch))
        )
    if patch[0] == 1 and 0 in recipe.evaluation.mirror:
        raise InputError(
            f"evaluation.mirror: found {list(recipe.evaluation.mirror)}, but the network is 2D; "
            "expected 1 (y) and 2 (x)"
        )
    for index, stage in enumerate(recipe.stages):
        try:
            trainable(network, stage)
        except InputError as error:
            raise InputError(f"stages.{index}.{error}") from None
    Objective(recipe, task)
    return task
