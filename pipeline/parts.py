"""From a recipe to its parts: patch, task, network, loss. What is wrong with a recipe shows here,
before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.pipeline.data.masking import check_mask
from segfleet.pipeline.devices.compiler import load_later
from segfleet.pipeline.engines.common import hold_statistics, trainable
from segfleet.pipeline.engines.lora import adapt
from segfleet.pipeline.losses.base import build_loss
from segfleet.pipeline.losses.deep_supervision import DeepSupervision
from segfleet.pipeline.losses.hidden_error import hidden_error
from segfleet.pipeline.recipe import Recipe, members, resolve
from segfleet.pipeline.sections import Mask
from segfleet.pipeline.stage import OVERRIDES
from segfleet.pipeline.stage_data import Manifests, manifests_of, named, stages_of
from segfleet.pipeline.task import RECONSTRUCT, Task, make_task, reconstruction
from segfleet.pipeline.training.transfer import Side, Transfer, plan_transfer, rows_of
from segfleet.preprocess.stores.manifest import Dataset, Manifest

SMALL = 32  # voxels that a network may need along an axis, however small the cases are


def patch_of(recipe: Recipe, manifest: Manifest) -> tuple[int, int, int]:
    """Patch in voxels (z, y, x): the recipe's or the plan's, checked against the network's rule. 2D
    networks get one slice."""
    spec = registry.spec(recipe.model.name)
    suggested = manifest.plan.patch
    if spec.dims == (2,) and manifest.plan.patch_2d:
        suggested = manifest.plan.patch_2d
    patch = recipe.data.patch or suggested
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
    own = 1 if planned else spec.divisor
    divisors = (own,) * dims if isinstance(own, int) else own
    for axis, size, divisor in zip("zyx"[3 - dims :], patch[3 - dims :], divisors, strict=True):
        if size % divisor and recipe.data.patch is not None:
            fitting = max(divisor, round(size / divisor) * divisor)
            raise InputError(
                f"data.patch: {spec.name} needs {axis} sizes that are multiples of {divisor}, "
                f"found {size}; {fitting} would do"
            )
    z, y, x = (  # a plan's patch may grow to what the network takes
        -(-size // divisor) * divisor
        for size, divisor in zip(patch, (*(1,) * (3 - dims), *divisors), strict=True)
    )
    return (1 if dims == 2 else z), y, x


def task_of(recipe: Recipe, manifest: Manifest) -> Task:
    """What the recipe's network is asked to predict, and what of it is averaged."""
    if recipe.task == RECONSTRUCT:
        return reconstruction(manifest.dataset)
    task = make_task(manifest.dataset, recipe.model.head)
    return replace(task, averages=recipe.evaluation.average)


def build_network(recipe: Recipe, manifest: Manifest, task: Task) -> nn.Module:
    """The recipe's network for this data set; what the plan knows is filled in where the network
    asks for it and the recipe is silent."""
    return _built(recipe, manifest, len(manifest.dataset.channels), task.channels)


def channels_last(recipe: Recipe, device: torch.device, flat: bool) -> bool:
    """Whether weights and images lie channels last; `flat`: in 2D."""
    setting = recipe.engine.channels_last
    return device.type != "cpu" or not flat if setting == "auto" else setting


def augments_on_device(recipe: Recipe, device: torch.device) -> bool:
    """Whether patches are computed where the network is, not in the loader."""
    options = recipe.data.augment
    return options is not None and options.device == "auto" and device.type == "cuda"


def in_layout(network: nn.Module, recipe: Recipe, manifest: Manifest) -> nn.Module:
    """The network, on its device, in the memory format that the recipe asks for."""
    flat = patch_of(recipe, manifest)[0] == 1
    if not channels_last(recipe, next(network.parameters()).device, flat):
        return network
    form = torch.channels_last if flat else torch.channels_last_3d
    return network.to(memory_format=form)  # type: ignore[call-overload]  # torch's stubs lack it


def input_names(recipe: Recipe, manifest: Manifest) -> set[str]:
    """Tensors of the network whose shape depends on the number of image channels."""
    channels, outputs = len(manifest.dataset.channels), task_of(recipe, manifest).channels
    shapes = []
    with torch.device("meta"):
        for extra in (0, 2):  # of slices as channels there must be an odd number
            model = _built(recipe, manifest, channels + extra, outputs)
            shapes.append({name: value.shape for name, value in model.state_dict().items()})
    return {name for name, shape in shapes[0].items() if shapes[1].get(name) != shape}


def _built(recipe: Recipe, manifest: Manifest, channels: int, outputs: int) -> nn.Module:
    patch, spec = patch_of(recipe, manifest), registry.spec(recipe.model.name)
    dims = 2 if patch[0] == 1 else 3
    available = {
        "dims": dims,
        "patch": patch[3 - dims :],
        "spacing": manifest.plan.target_spacing[3 - dims :],
    }
    accepted = inspect.signature(spec.build).parameters
    options = {
        key: value for key, value in available.items() if key in accepted
    } | recipe.model.options
    torch.manual_seed(recipe.seed)
    model = registry.build_model(
        recipe.model.name,
        in_channels=channels,
        num_classes=outputs,
        options=options,
    )
    if recipe.task == RECONSTRUCT:
        model.without_skips = True  # type: ignore[assignment]  # a module takes any attribute
    return model


def transfer_of(
    recipe: Recipe, manifests: Manifests, index: int, model: nn.Module, weights: dict[str, Tensor]
) -> Transfer:
    """What the network of stage `index`, fresh, takes over of the weights `weights` of the stage
    before it. Raises InputError that names what does not fit."""
    own = resolve(recipe, index)
    own_side, before = (
        _side(settings, manifests) for settings in (own, resolve(recipe, index - 1))
    )
    several = len(own_side.channels) != len(before.channels)
    return plan_transfer(
        model,
        registry.spec(own.model.name),
        weights,
        own.stages[index].inherit,
        own_side,
        before,
        inputs=input_names(own, manifests(own)) if several else frozenset(),
    )


def _side(settings: Recipe, manifests: Manifests) -> Side:
    dataset = manifests(settings).dataset
    task = task_of(settings, manifests(settings))
    return Side(
        rows=rows_of(task),
        channels=dataset.channels,
        name=settings.model.name,
        rebuilds=task.head == RECONSTRUCT,
    )


def check_transfer(recipe: Recipe, manifests: Manifests, index: int) -> None:
    """The same before anything is trained, without memory for weights."""
    with torch.device("meta"):
        fresh, before = (
            build_network(own, manifests(own), task_of(own, manifests(own)))
            for own in (resolve(recipe, index), resolve(recipe, index - 1))
        )
    transfer_of(recipe, manifests, index, fresh, before.state_dict())


class Objective(nn.Module):
    """`objective(output, label) -> scalar`: the recipe's loss on the task's target, deep
    supervision included."""

    def __init__(self, recipe: Recipe, task: Task):
        super().__init__()
        self.task = task
        if task.head == RECONSTRUCT:
            return
        name = recipe.loss.name
        if name == "auto":
            name = "dice_ce" if task.head == "softmax" else "bce_dice"
        self.loss = DeepSupervision(
            build_loss(name, head=task.head, options=recipe.loss.options),
            recipe.loss.deep_supervision,
        )

    def forward(self, output: Tensor | list[Tensor], label: Tensor) -> Tensor:
        """output: logits or a list of logits; label (B, *S) uint8, or what is to be reconstructed:
        (B, C + 1, *S) float32, the mask last."""
        if self.task.head == RECONSTRUCT:
            return hidden_error(output[0] if isinstance(output, list) else output, label)
        return self.loss(output, self.task.target(label), self.task.valid(label))


def check_data(recipe: Recipe, manifest: Manifest, task: Task) -> None:
    """Raise InputError for what cannot be meant: a 3D recipe of a 2D data set, a patch of mostly
    padding, other channels or classes than the recipe says."""
    dataset, patch = manifest.dataset, patch_of(recipe, manifest)
    if dataset.dims == 2 and patch[0] > 1:
        raise InputError(
            f"data.patch: found {list(patch)}, which is 3D, but {dataset.name} in "
            f"{recipe.data.store} holds 2D images; choose a 2D recipe or the store of a 3D data set"
        )
    for axis, size, largest in beside_the_largest(patch, manifest):
        if recipe.data.patch is not None and size > 2 * largest and size > SMALL:
            raise InputError(
                f"data.patch: found {size} voxels along {axis}, but the largest of the "
                f"{len(manifest.cases)} cases of {dataset.name} in {recipe.data.store} has "
                f"{largest}: most of every patch would be padding; the plan's patch is "
                f"{list(manifest.plan.patch)}, and data.patch=null takes it"
            )
    made_for = recipe.data.made_for
    for key, actual, names in (
        ("channels", len(dataset.channels), dataset.channels),
        ("classes", None if task.head == RECONSTRUCT else len(task.names), task.names),
    ):
        expected = getattr(made_for, key, None)
        if made_for and actual is not None and expected not in (None, actual):
            raise InputError(
                f"data.made_for.{key}: the recipe {recipe.name} is made for {made_for.dataset} "
                f"with {expected}, but {dataset.name} in {recipe.data.store} has {actual} "
                f"({', '.join(names)}); choose another store, or set data.made_for=null"
            )


def doubts(recipe: Recipe, manifest: Manifest | Manifests) -> list[str]:
    """What is legal and maybe not meant in any stage, a sentence each."""
    sentences: dict[str, None] = {}
    masked = rebuilt = False
    for _, own, stored in stages_of(recipe, manifest):
        sentences |= dict.fromkeys(_doubts(own, stored))
        masked |= own.data.mask != Mask()
        rebuilt |= own.task == RECONSTRUCT
    if masked and not rebuilt:
        sentences["data.mask: nothing reads it, for no stage says task: reconstruct"] = None
    return list(sentences)


def _doubts(recipe: Recipe, manifest: Manifest) -> list[str]:
    dataset, made_for = manifest.dataset, recipe.data.made_for
    sentences = []
    if made_for and not _same_dataset(made_for.dataset, dataset):
        sentences.append(
            f"the recipe {recipe.name} was made for {made_for.dataset}, and {recipe.data.store} "
            f"holds {dataset.name} ({dataset.dims}D; {', '.join(dataset.channels)}; "
            f"{', '.join(name for name, value in dataset.labels.items() if value)}): patch, rates "
            "and length may not suit it. data.made_for=null takes this recipe for any data set"
        )
    if recipe.data.patch is not None:
        for axis, size, largest in beside_the_largest(patch_of(recipe, manifest), manifest):
            if size > largest:
                sentences.append(
                    f"data.patch: {size} voxels along {axis}, and the largest case of "
                    f"{dataset.name} has {largest}: the rest of every patch is padding"
                )
    return sentences


def beside_the_largest(patch: Sequence[int], manifest: Manifest) -> Iterator[tuple[str, int, int]]:
    """(axis, size of the patch, largest extent of any case) along z, y and x, voxels; nothing of a
    store without cases, such as that of an imported model."""
    if manifest.cases:
        largest = map(max, zip(*manifest.cases.grids("shape"), strict=True))
        yield from zip("zyx", patch, largest, strict=True)


def _same_dataset(name: str, dataset: Dataset) -> bool:
    """Task04_Hippocampus and Hippocampus are one data set."""
    names = (dataset.name.lower(), dataset.reader.lower())
    return any(name.lower() in other or other in name.lower() for other in names)


def check_recipe(recipe: Recipe, manifest: Manifest | Manifests) -> Task:
    """Raise InputError or ModelError for whatever in the recipe does not fit its data sets, and
    name the stage if they differ in settings; costs no memory for weights. The last stage's
    task. `manifest`: of the recipe's own store."""
    tasks: dict[str, Task] = {}
    for index, own, stored in stages_of(recipe, manifest):
        stage = recipe.stages[index]
        unchanged = own is recipe and stage.inherit.plain
        key = repr(
            [*(getattr(own, key) for key in OVERRIDES), stage.freeze, stage.rates, stage.lora]
        )
        try:
            if key not in tasks:
                tasks[key] = _check(own, stored, index)
                check_stores(own, manifests_of(recipe, manifest))
            if index and not unchanged:
                check_transfer(recipe, manifests_of(recipe, manifest), index)
        except (InputError, registry.ModelError) as error:
            raise type(error)(named(error, own is not recipe, index, stage)) from None
    return tasks[key]


def check_stores(recipe: Recipe, manifests: Manifests) -> None:
    """Raises InputError where the stores of a stage cannot share batches: other channels, other
    classes unless they are not asked for, 2D beside 3D."""
    first = manifests(recipe).dataset
    for settings in members(recipe)[1:]:
        other = manifests(settings).dataset
        comparisons: list[tuple[str, Any, Any]] = [
            ("channels", len(first.channels), len(other.channels)),
            ("dims", first.dims, other.dims),
        ]
        if recipe.task != RECONSTRUCT:
            comparisons += [
                ("classes", first.labels, other.labels),
                ("regions", first.regions, other.regions),
                ("ignored label", first.ignore_label, other.ignore_label),
            ]
        for what, expected, actual in comparisons:
            if actual != expected:
                raise InputError(
                    f"data.stores: {settings.data.store} has {what} {actual}, but "
                    f"{recipe.data.store} has {expected}; stores of one stage need the same"
                )


def check_norms(network: nn.Module, recipe: Recipe, index: int) -> None:
    """From now on raise InputError where `network` is given one image and a normalisation is left
    with a single value of each channel, which has no variance: at a small patch's deepest level.
    Batch normalisation takes the images of a micro-batch together, those of all ranks."""
    together = recipe.data.batch // recipe.engine.accumulate
    held = hold_statistics(network, recipe.stages[index], registry.spec(recipe.model.name))

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        samples, channels = inputs[0].shape[:2]
        values, larger = inputs[0].numel() // channels, "data.patch"
        if isinstance(module, _BatchNorm):
            values, larger = values * together, f"{larger} or data.batch"
        else:
            values //= samples
        if values < 2:
            raise InputError(
                f"{recipe.model.name}: found one value of each channel at the layer {name}, with "
                f"data.batch {recipe.data.batch} in {recipe.engine.accumulate} micro-batch(es); "
                f"its normalisation needs two: expected a larger {larger}"
            )

    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm | _InstanceNorm) and not any(m is module for m in held):
            module.register_forward_pre_hook(partial(look, name))


def _check(recipe: Recipe, manifest: Manifest, index: int) -> Task:
    task = task_of(recipe, manifest)
    if recipe.task == RECONSTRUCT:
        check_mask(recipe.data.mask, patch_of(recipe, manifest))
    check_data(recipe, manifest, task)
    load_later()  # PyTorch's own formulas for shapes ask for it
    with torch.device("meta"), torch.no_grad():
        network, patch = build_network(recipe, manifest, task).eval(), patch_of(recipe, manifest)
        check_norms(network, recipe, index)
        network(
            torch.empty(1, len(manifest.dataset.channels), *(patch[1:] if patch[0] == 1 else patch))
        )
    if patch[0] == 1 and 0 in recipe.evaluation.mirror:
        raise InputError(
            f"evaluation.mirror: found {list(recipe.evaluation.mirror)}, but the network is 2D; "
            "expected 1 (y) and 2 (x)"
        )
    try:
        if recipe.stages[index].lora:
            adapt(network, recipe.stages[index], registry.spec(recipe.model.name), recipe.seed)
        trainable(network, recipe.stages[index], registry.spec(recipe.model.name))
    except InputError as error:
        raise InputError(f"stages.{index}.{error}") from None
    Objective(recipe, task)
    return task
